"""Which layers to condense, by what the whole model then puts out: greedy, with no run of what is known already.

Source: CD-MoE (arXiv 2412.00069, METHODS 4.4 and 4.5). The authors run the whole model for every candidate. Here a
candidate runs only the layers behind it, on what its own layer, condensed, puts out; that is kept for all candidates,
and made anew only behind the layer that was taken last. All candidates of a round move through the model together, so
that weights are read once a round. With L layers of which all can be condensed, n rounds run no more than n L/2 times
the model over the text; in units of layers, L (L - 1) / 2 in each round and L - 1 more over all of them.

Letters: L decoder layers, N tokens of a batch, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from understudy.activations import ActivationStore
from understudy.condensed.running import condensed, hidden_js
from understudy.moe import MoELayer
from understudy.quality import KL, TOKENS, predict
from understudy.skeleton import Skeleton
from understudy.walk import Walk

logger = logging.getLogger(__name__)
Watching = Callable[[MoELayer, nn.Module], AbstractContextManager[None]]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Taken:
    """Layers in the order in which they were condensed, and the criterion after each."""

    layers: tuple[str, ...] = ()
    path: tuple[float, ...] = ()
    behind: dict[str, ActivationStore] = field(default_factory=dict, repr=False, compare=False)
    # what each layer that is left puts out, condensed, on the stream of this choice


class LayerSearch:
    """Takes one layer after the other.

    Args:
        skeleton: the original model.
        ids: token ids `[N, S]`.
        batch_size: blocks that run together.
        criterion: `js` or `l2` of what the last layer puts out, or `kl` of what the model predicts; original to model.
        weights: what each layer that can be condensed keeps, weights by expert; may be filled by `watching`.
        memory: bytes of activations that may be held in memory.
        watching: surrounds the first run of each of these layers over the text, with the original before it.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        ids: np.ndarray,
        batch_size: int,
        criterion: str,
        weights: Mapping[str, Mapping[int, float]],
        keys: list[str],
        memory: int,
        watching: Watching | None = None,
    ) -> None:
        self.skeleton, self.ids, self.batch_size = skeleton, ids, batch_size
        self.criterion, self.weights, self.watching = criterion, weights, watching
        self.layers = {layer.key: layer for layer in skeleton.layers if layer.key in keys}
        self.by_depth: dict[int, list[str]] = {}
        for key, layer in self.layers.items():
            self.by_depth.setdefault(layer.index, []).append(key)
        self._limit, self.walk = memory, Walk(skeleton, ids, batch_size, ActivationStore(0, device=skeleton.device))
        self.original: ActivationStore | None = None
        self.known: dict[tuple[str, ...], dict[str, float]] = {}  # layers taken -> criterion with each that is left
        self.remember: Callable[[], None] = lambda: None  # called when that has grown
        self.runs = 0  # of decoder layers over the whole text
        self.first_runs = 0  # of these, those with nothing or one layer condensed on the stream of the original

    @property
    def later_runs(self) -> int:
        """Runs of decoder layers that the choice of layers took."""
        return self.runs - self.first_runs

    def run(self, enough: Callable[[list[str]], bool], beam: int = 1, report: Report | None = None) -> Taken:
        """Take layers until there are enough, or all are taken; with `beam`, hold that many choices between rounds."""
        self._limit //= (beam + 1) * len(self.layers) + 2
        held = [Taken()]
        while not enough(list(held[0].layers)) and len(held[0].layers) < len(self.layers):
            grown: dict[frozenset[str], Taken] = {}
            for taken in held:
                for key, value in self._values(taken).items():
                    more = Taken((*taken.layers, key), (*taken.path, value), dict(taken.behind))
                    known = grown.setdefault(frozenset(more.layers), more)
                    if value < known.path[-1]:  # the same layers by another way: equal but for rounding
                        grown[frozenset(more.layers)] = more
            place = {key: number for number, key in enumerate(self.layers)}
            held = sorted(grown.values(), key=lambda t: (t.path[-1], [place[key] for key in t.layers]))[:beam]
            logger.info("condensing layers %s: %s %.3g", ", ".join(held[0].layers), self.criterion, held[0].path[-1])
            if report:
                report("layers", len(held[0].layers), len(self.layers))
        return held[0]

    def _values(self, taken: Taken) -> dict[str, float]:
        """Return the criterion with each layer that is left; what an earlier search found is believed."""
        if taken.layers not in self.known:
            if self.original is None and taken.layers:
                self._run_original()
            self.known[taken.layers] = {key: self._distance(end) for key, end in self._ends(taken).items()}
            self.remember()
        return self.known[taken.layers]

    # ---- runs ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _ends(self, taken: Taken) -> dict[str, ActivationStore]:
        """Return what the last layer puts out with each layer that is left condensed beside those taken.

        What a layer puts out condensed is made anew behind the last one taken; in the first round, everywhere.
        """
        first, start, stream = self.original is None, 0, None
        left = [key for key in self.layers if key not in taken.layers]
        if taken.behind and len(self.by_depth[self.layers[taken.layers[-1]].index]) == 1:
            start, stream = self.layers[taken.layers[-1]].index + 1, taken.behind[taken.layers[-1]]
        last = self.walk.depth if first else max(self.layers[key].index for key in left)
        ends: dict[str, ActivationStore] = {}
        with self.walk.ready():
            for index in range(self.walk.depth):
                here, anew = [key for key in left if self.layers[key].index == index], start <= index <= last
                if ends or anew:
                    with self.skeleton.resident(index) as layer, self._condensed(index, taken.layers):
                        if anew:
                            stream = self._anew(taken, layer, index, stream, here, goes_on=index < last)
                        for key, end in ends.items():
                            ends[key] = self._through(layer, index, end)
                ends.update({key: taken.behind[key] for key in here})
        if first:
            self.original = stream
        return ends

    @torch.no_grad()
    def _run_original(self) -> None:
        with self.walk.ready():
            stream = None
            for index in range(self.walk.depth):
                with self.skeleton.resident(index) as layer:
                    stream = self._through(layer, index, stream)
        self.original, self.first_runs = stream, self.runs

    def _anew(
        self,
        taken: Taken,
        layer: nn.Module,
        index: int,
        stream: ActivationStore | None,
        here: list[str],
        goes_on: bool,
    ) -> ActivationStore | None:
        """Run a layer as the choice so far has it, if that is wanted, and with each layer that is left condensed."""
        first, runs, after = self.original is None, self.runs, None
        with ExitStack() as stack:
            for key in here if first and self.watching else ():
                assert self.watching is not None
                stack.enter_context(self.watching(self.layers[key], layer))
            if goes_on:
                after = self._through(layer, index, stream)
        for key in here:
            with self._condensed(index, (key,)):
                taken.behind[key] = self._through(layer, index, stream)
        self.first_runs += self.runs - runs if first else 0
        return after

    def _through(self, layer: nn.Module, index: int, stream: ActivationStore | None) -> ActivationStore:
        self.runs += 1
        after = ActivationStore(2 * self._limit, device=self.skeleton.device)  # of its two generations one is used
        for number in range(len(self.walk.batches)):
            before = None if stream is None else _copied(stream.get(number))
            after.put(number, self.walk.run_layer(layer, index, number, before))
        after.commit(index)
        return after

    @contextmanager
    def _condensed(self, index: int, keys: tuple[str, ...]) -> Iterator[None]:
        """Run those of the layers condensed that are at this depth."""
        with ExitStack() as stack:
            for key in self.by_depth.get(index, ()):
                if key in keys:
                    experts = self.skeleton.model.get_submodule(self.layers[key].name)
                    stack.enter_context(condensed(experts, self.weights[key]))
            yield

    # ---- criteria -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _distance(self, end: ActivationStore) -> float:
        """Return the criterion of what the last layer put out."""
        assert self.original is not None
        if self.criterion == "kl":
            sums_N5 = predict([self._walk(end), self._walk(self.original)], lambda what, done, total: None)
            return float(sums_N5[:, KL].sum() / sums_N5[:, TOKENS].sum())
        above, below = 0.0, 0.0
        for number in range(len(self.walk.batches)):
            one_NH, other_NH = (hidden_of(store.get(number)) for store in (self.original, end))
            if self.criterion == "js":
                above += float(hidden_js(one_NH, other_NH).sum(dtype=torch.float64))
                below += len(one_NH)
            else:
                above += float((other_NH - one_NH).square().sum(dtype=torch.float64))
                below += float(one_NH.square().sum(dtype=torch.float64))
        return above / below if self.criterion == "js" else (above / below) ** 0.5

    def _walk(self, store: ActivationStore) -> Walk:
        return Walk(self.skeleton, self.ids, self.batch_size, store)


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states of what a decoder layer puts out, float32 `[N, H]`."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    return hidden.reshape(-1, hidden.shape[-1]).float()


def _copied(value: Any) -> Any:
    """Copy tensors: some families change what they are handed, and here it is read again."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)
