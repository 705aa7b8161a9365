"""Train or repair one decoder layer after the other, each toward what the same layer of the teacher puts out.

Block-wise distillation: the student's layer sees what the student's earlier layers, already trained, put out, and is to
answer what the teacher's layer answers behind the teacher's own, so that later layers also repair what earlier ones
spoilt. In memory there are the embeddings and one layer of each model, with gradients and moments of what is trained in
it; what the text looks like between two layers lies on disk. Within a layer the error is squared, summed over the
tokens that are no padding, and counted as a share of what the teacher's layer adds to its input.

How a layer is fitted is for `descent` and `repairing` to say. One that is not better on held-out text after that keeps
the weights that it had.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from understudy.activations import ActivationStore
from understudy.errors import OutputError, UnderstudyError, reason
from understudy.facts import parse_bytes
from understudy.layerwise.descent import descend
from understudy.layerwise.onelayer import OneLayer
from understudy.layerwise.repairing import repair
from understudy.recipe import Recovery
from understudy.skeleton import Skeleton
from understudy.training import trainable
from understudy.training.lessons import Lessons
from understudy.training.loop import Run, batches, peak_of, reset_peak
from understudy.training.losses import distillation_loss, lm_loss
from understudy.walk import Walk

Progress = Callable[[str, int, int], None]

_MEMORY = "4GB"  # of what lies between two layers; past it, files are mapped


@dataclass(frozen=True)
class What:
    """What of the student is trained: one of `trainable.WHAT`, with what `trainable.prepare` wants to know."""

    name: str
    rank: int
    condensed: Sequence[str]
    parameters: Sequence[str]  # names of all that are trained


@dataclass(frozen=True)
class _Layer:
    """How one decoder layer was trained, by its index; for the rest see `Run`."""

    layer: int
    before: float
    after: float
    losses: list[dict[str, float]]


def train_layers(
    student: Skeleton,
    teacher: Skeleton,
    text: tuple[Lessons, Lessons],
    settings: Recovery,
    what: What,
    folder: Path,
    progress: Progress,
) -> tuple[Run, dict[str, Tensor]]:
    """Train layer by layer and return how it went, and what was trained, by the names of the live model.

    A later call with the same arguments goes on from the last finished layer.

    Args:
        student: what is trained, on the device and in the dtype of the training; its weights on disk are only read.
        teacher: the original, likewise.
        text: what to train on, and what to measure on.
        settings: of the run; `steps` are those of each layer.
        what: the choice of parameters.
        folder: for what is finished.
        progress: called with what goes on, and the decoder layers done and their number.

    Raises:
        NumericError: an error or gradient that is not finite; says in which layer, and at which step.
        OutputError: the disk is full or not writable.
    """
    if settings.precision == "fp16":
        raise UnderstudyError("--precision fp16 is not for --loss layers; use bf16 or no")
    reset_peak(student.device)
    found, figures, state = _Layerwise(student, teacher, text, settings, what, folder, progress).run()
    steps = [(x.layer, entry) for x in found for entry in x.losses]
    losses = [{"step": n, "layer": layer, "beta": 0.0, **entry} for n, (layer, entry) in enumerate(steps, 1)]
    seconds = sum(entry["seconds"] for entry in losses)
    layers = [{"layer": x.layer, "before": x.before, "after": x.after} for x in found]
    return Run(0.0, losses, figures, seconds, *peak_of(student.device), layers), state


class _Layerwise:
    def __init__(
        self, student: Skeleton, teacher: Skeleton, text: tuple[Lessons, Lessons], settings: Recovery, what: What,
        folder: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.settings, self.what = student, teacher, settings, what
        self.folder, self.progress = folder, progress
        self.size, self.accumulate = batches(settings, 1)
        # in the order of the text a batch would hold one source alone
        lessons, held = text
        order = np.random.default_rng([settings.seed, 2]).permutation(len(lessons))
        order = order[: len(order) // self.size * self.size or len(order)]
        self.training = math.ceil(len(order) / self.size)  # batches; the others are held out
        rows = [(lessons, at) for at in _batches(order, self.size)]
        rows += [(held, at) for at in _batches(np.arange(len(held)), self.size)]
        self.masks, self.labels = [part.mask[at] for part, at in rows], [part.labels[at] for part, at in rows]
        ids = [part.ids[at] for part, at in rows]
        store = ActivationStore(parse_bytes(_MEMORY), folder / "between", student.device)
        self.store = store  # of each batch what student and teacher put out last
        self.walks = [_Walk(skeleton, ids, store) for skeleton in (student, teacher)]

    def run(self) -> tuple[list[_Layer], dict[str, float], dict[str, Tensor]]:
        """Return how each layer with something to train went, the figures on held-out text, and what was trained."""
        self.folder.mkdir(parents=True, exist_ok=True)
        count = len(self.masks)
        latest = self.store.latest(count)
        done = -1 if latest is None or not self.store.resume(latest, count) else latest
        depth = len(self.student.decoder_layers)
        with ExitStack() as stack:
            for walk in self.walks:
                stack.enter_context(walk.ready())
            for index in range(done + 1, depth):
                self.progress("train layers", index, depth)
                self._layer(index)
                self.store.commit(index)
            self.progress("train layers", depth, depth)
            figures = self._measured()
        runs = [_Layer(**json.loads(path.read_text(encoding="utf-8"))) for path in self._records()]
        state = {k: v for run in runs for k, v in load_file(self._file(run.layer, ".safetensors")).items()}
        return runs, figures, state

    def _layer(self, index: int) -> None:
        """Take a decoder layer of both models over all text, and train the student's in between."""
        student, teacher = self.walks
        before = self.store.get if index else (lambda number: (None, None))
        targets = ActivationStore(parse_bytes(_MEMORY), device=self.student.device)
        with self.teacher.resident(index) as layer:
            for number in range(len(self.masks)):
                targets.put(number, teacher.run_layer(layer, index, number, before(number)[1]))
        targets.commit(index)
        with self.student.resident(index) as layer:
            with self._trained_of(index) as parameters:
                if parameters:
                    self._train(layer, index, parameters, before, targets)
            for number in range(len(self.masks)):
                mine = student.run_layer(layer, index, number, before(number)[0])
                self.store.put(number, (mine, targets.get(number)))

    @contextmanager
    def _trained_of(self, index: int) -> Iterator[dict[str, Tensor]]:
        """Let what is to be trained of a resident layer ask for gradients, and give it by name."""
        model, here = self.student.model, set(self.student.names[index])
        wanted = [name for name in self.what.parameters if name in here]
        if wanted:
            layers = [layer for layer in self.student.layers if layer.index == index]
            inside = f"{self.student.stack}.{index}."
            condensed = [block for block in self.what.condensed if block.startswith(inside)]
            trainable.prepare(model, layers, self.what.name, self.what.rank, self.settings.seed, condensed)
        try:
            yield {name: self.student.get(name) for name in wanted}
        finally:
            model.requires_grad_(False)

    def _train(
        self, layer: Any, index: int, parameters: dict[str, Tensor], before: Callable[[int], Any], targets: Any
    ) -> None:
        """Train or repair one layer, keep the better of what was and what came out, and write it."""
        s, start = self.settings, {name: p.detach().clone() for name, p in parameters.items()}

        def run(number: int) -> Any:
            with torch.autocast(self.student.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
                return self.walks[0].graph(layer, index, number, before(number)[0])

        one = OneLayer(index, run, lambda number: before(number)[1], targets, self.masks, self.training)
        first = one.missed()
        if s.loss == "repair":
            losses = repair(one, parameters, s.rounds, s.seed)
        else:
            losses = descend(one, parameters, s, self.accumulate)
        last = one.missed()
        if not last < first:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(start[name])
        self._keep(_Layer(index, first, last if last < first else first, losses), parameters)  # last may be NaN

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        """Return the mean loss, the perplexity and the distance to the teacher on held-out text, as other losses do."""
        lm = kd = count = 0.0
        for number in range(self.training, len(self.masks)):
            mine, theirs = (walk.logits_of(number, x) for walk, x in zip(self.walks, self.store.get(number)))
            labels = torch.from_numpy(self.labels[number].astype(np.int64)).to(mine.device)
            lm += float(lm_loss(mine, labels))
            kd += float(distillation_loss(mine, theirs, labels, self.settings.temperature))
            count += float((labels[:, 1:] >= 0).sum())
        loss = lm / max(count, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "kd": kd / max(count, 1)}

    def _keep(self, run: _Layer, parameters: dict[str, Tensor]) -> None:
        """Write what was trained of a layer, and last the record that says it is there."""
        weights, record = (self._file(run.layer, end) for end in (".safetensors", ".json"))
        try:
            tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
            save_file(tensors, weights.with_suffix(".tmp"))
            os.replace(weights.with_suffix(".tmp"), weights)
            record.with_suffix(".tmp").write_text(json.dumps(vars(run)), encoding="utf-8")
            os.replace(record.with_suffix(".tmp"), record)
        except OSError as error:
            raise OutputError(f"{weights}: cannot be written ({reason(error)})") from None

    def _file(self, index: int, end: str) -> Path:
        return self.folder / f"layer-{index:04d}{end}"

    def _records(self) -> list[Path]:
        return sorted(self.folder.glob("layer-*.json"))


class _Walk(Walk):
    """A walk whose store holds what two models put out, over batches that are given."""

    def __init__(self, skeleton: Skeleton, batches: list[np.ndarray], store: ActivationStore) -> None:
        super().__init__(skeleton, np.concatenate(batches), 1, store)
        self.batches = batches

    def graph(self, layer: Any, index: int, number: int, before: Any) -> Any:
        """Put one batch through a resident layer, with gradients of what asks for them."""
        with torch.no_grad():
            args, kwargs = self._arguments(index, number, self.batches[number], before)
        return self._run(layer, index, args, kwargs)

    def logits_of(self, number: int, output: Any) -> Tensor:
        """Return logits `[B, S, V]` of a batch of which the last layer put out `output`."""
        return self._finish(self.batches[number], output)


def _batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
