"""The search of CD-MoE on a model: experts of each layer while the original runs over the text, then layers in turn.

Source: CD-MoE (arXiv 2412.00069, METHODS 4.4 and 4.5). The authors run the text for every expert that might come next,
some ten thousand times. Here every expert runs once, on a sample of the tokens, and each round of the search adds up
what it put out: exact but for rounding, and the same choice wherever the sample is all of the text.

Letters: L decoder layers, E experts, K top-k, T tokens, N of them in the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from understudy.collectors import Resident
from understudy.collectors.candidates import Candidates, Sample, gram_of, outputs_of
from understudy.condensed.choosing import Chosen, Products, greedy, mean_gates, weighing
from understudy.condensed.layers import LayerSearch, Taken
from understudy.condensed.running import Outputs
from understudy.errors import UnsupportedModelError
from understudy.facts import parse_bytes
from understudy.methods import Task
from understudy.moe import MoELayer
from understudy.recipe import Calibration, Selection


def search_model(
    task: Task, chosen: MutableMapping[str, Chosen], enough: Callable[[list[str]], bool]
) -> tuple[Taken, list[str]]:
    """Return the layers to condense, until there are enough, and notes; fills in what each layer would keep.

    What an interrupted search left is not searched again.

    Raises:
        UnsupportedModelError: the criterion cannot be had for this family.
    """
    source, settings, selection = task.source, task.settings, task.problem.settings
    keys, memory = list(task.problem.layers), parse_bytes(settings.activation_memory) // 2
    left = task.left
    chosen.update({key: Chosen(*map(tuple, parts)) for key, parts in left.values.get("chosen", {}).items()})
    weights = {key: found.by_id for key, found in chosen.items()}
    calibration = Calibration(dense_tokens=settings.dense_tokens, batch_size=settings.batch_size)
    dense = 0.0  # runs of the model that were spent on sending tokens through every expert

    @contextmanager
    def watching(layer: MoELayer, decoder: nn.Module) -> Iterator[None]:
        nonlocal dense
        if layer.key in chosen:
            yield
            return
        batches = search.walk.batches
        resident = Resident(source, layer, decoder, calibration, batches=batches, total=task.blocks.ids.size)
        seen = Candidates(resident)
        with seen.attached():
            yield
        if (sample := seen.sample()) is None:
            raise UnsupportedModelError(f"layer {layer.key}: its experts do not see every token once")
        gates_E = mean_gates(task.problem.stats.layers[layer.key])
        chosen[layer.key] = choose_experts(sample, resident.experts, gates_E, selection, settings.criterion, memory)
        weights[layer.key] = chosen[layer.key].by_id
        dense += layer.num_experts * len(sample.hidden_NH) / (layer.top_k * task.blocks.ids.size * len(keys))
        left.keep(chosen={key: (found.ids, found.weights, found.path) for key, found in chosen.items()})
        task.report("experts", len(chosen), len(keys))

    search = LayerSearch(
        source, task.blocks.ids, settings.batch_size, settings.criterion, weights, keys, memory, watching
    )
    search.known = {tuple(layers): values for layers, values in left.values.get("known", ())}
    search.remember = lambda: left.keep(known=list(search.known.items()))
    taken = search.run(enough, selection.beam, task.report)
    return taken, _notes(task, search, taken, dense)


def choose_experts(
    sample: Sample, experts: Any, gates_E: np.ndarray, selection: Selection, criterion: str, memory: int
) -> Chosen:
    """Choose the experts of one layer by what its decoder layer would put out, live: `js`, else by relative L2 error.

    Raises:
        UnsupportedModelError: `js`, and the family does more than add up.
    """
    E, H = len(gates_E), sample.routed_NH.shape[1]
    outputs = Outputs(sample, experts, E, memory) if criterion == "js" else None
    products = None
    if outputs is None or selection.weights == "fitted":
        chunks = outputs.chunks() if outputs else outputs_of(sample.hidden_NH, experts, E, H)
        products = Products.of(gram_of(sample, chunks, E))
    weigh, candidates = weighing(selection.weights, gates_E, products)
    measure = outputs.js if outputs else products.error if products else None
    assert measure is not None
    return greedy(candidates, selection.keep_experts, weigh, measure, selection.beam)


def _notes(task: Task, search: LayerSearch, taken: Taken, dense: float) -> list[str]:
    """Say in which order layers were taken, and what it cost."""
    depth, steps = search.walk.depth, zip(taken.layers, taken.path, strict=True)
    path = ", ".join(f"{key} ({value:.3g})" for key, value in steps)
    return [
        f"layers in the order in which they were condensed, and {task.settings.criterion} with each: {path}",
        f"cost in runs of the model over the text: {search.first_runs / depth + dense:.2f} for experts, "
        f"{search.later_runs / depth:.2f} for layers",
    ]
