"""Take the loss back through a model one decoder layer at a time, so that gradients need no more memory than a layer.

The walk forward leaves what every layer put out on disk. The way back takes the layers from the last to the first: a
layer is loaded, run again on its input with gradients of activations (never of weights), and the gradient of the loss
with respect to what it put out becomes that of what the layer before put out. What lies between two layers is the
model's own code, run cut short as in the walk forward, and gradients pass through it, too.

The loss is the next-token loss summed, not averaged, over all predicted tokens: a block's gradients are then its own,
whatever runs beside it in a batch, and sums over blocks add up. Models run as for inference (no dropout, no auxiliary
loss).
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from understudy.activations import ActivationStore, _name
from understudy.collectors.gradients import Gradients
from understudy.errors import NumericError
from understudy.processes import Processes
from understudy.quality import vocabulary
from understudy.runtime import all_finite
from understudy.skeleton import Skeleton
from understudy.walk import Observe, Walk

_CHUNK_BYTES = 64 << 20  # of the logits of one chunk of positions in float32


class EveryLayer(ActivationStore):
    """Outputs of all finished layers, not of the last one only; those before the last are read from disk.

    It needs a folder, and as much room there as all layers' outputs take.
    """

    def commit(self, layer: int) -> None:
        """Make what was put the generation that is read, and keep the ones before."""
        self._last = None  # nothing to remove
        super().commit(layer)

    def latest(self, batches: int) -> int | None:
        """Return the last layer up to which all layers are there whole; None where not even the first is."""
        layer = -1
        while self._is_whole(layer + 1, batches):
            layer += 1
        return layer if layer >= 0 else None

    def resume(self, layer: int, batches: int) -> bool:
        """Make a layer that an earlier store committed the one that is read, and drop those after it."""
        kept = layer + 1 if all(self._is_whole(n, batches) for n in range(layer + 1)) else 0
        for path in [*self.folder.glob("layer-*"), self._next()]:
            if path not in [self._layer(n) for n in range(kept)]:
                shutil.rmtree(path, ignore_errors=True)
        if kept:
            self.open(layer, batches)
        return kept > 0

    def open(self, layer: int, batches: int) -> None:
        """Make a committed layer the one that is read."""
        self._read = {n: self._layer(layer) / _name(n) for n in range(batches)}


class Backward(Walk):
    """A walk back through a skeleton, over the token blocks and the outputs of a walk forward.

    Args:
        skeleton: the model; its part outside the layers is resident inside `ready()`.
        ids: token ids `[N, S]`, integer, the same as forward.
        batch_size: blocks that run together, the same as forward.
        outputs: what every layer put out.
        gradients: where the gradients between two layers are kept; commits are numbered from 0 at the head.
        samples: blocks that are walked back through, rounded up to whole batches, spread evenly; None for all.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        ids: np.ndarray,
        batch_size: int,
        outputs: EveryLayer,
        gradients: ActivationStore,
        samples: int | None = None,
    ) -> None:
        super().__init__(skeleton, ids, batch_size, outputs)
        self.outputs, self.gradients = outputs, gradients
        count = min(len(self.batches), math.ceil((samples or len(ids)) / batch_size))
        self.numbers = [place * len(self.batches) // count for place in range(count)]  # of the batches

    def to_layer(
        self, last: int, observe: Observe, *, committed: int = -1, done: Callable[[int], None] | None = None
    ) -> None:
        """Go from the head down to layer `last`; `done(i)` is called when layer `i` is through.

        `observe(i, layer)` gives a context that surrounds the run of one layer forth and back. With `committed`, the
        number of the last commit of the gradients, it goes on from there.

        Raises:
            NumericError: a gradient is NaN or infinite.
        """
        if committed < 0:
            self.outputs.open(self.depth - 1, len(self.batches))
            for place, number in enumerate(self.numbers):
                self.gradients.put(place, self._through_head(number))
            self.gradients.commit(0)
        for index in range(self.depth - 1 - max(committed, 0), last - 1, -1):
            if index:
                self.outputs.open(index - 1, len(self.batches))
            with self.skeleton.resident(index) as layer, observe(index, layer):
                for place in range(len(self.numbers)):
                    self.gradients.put(place, self._through_layer(layer, index, place, further=index > last))
            self.gradients.commit(self.depth - index)
            if done:
                done(index)

    def _through_head(self, number: int) -> list[torch.Tensor]:
        """Gradients of the loss with respect to what the last layer put out, a few positions of the head at a time."""
        batch, device = self.batches[number], self.skeleton.device
        output, leaves = _requiring(self.outputs.get(number))
        targets = torch.from_numpy(np.ascontiguousarray(batch[:, 1:])).long().to(device)
        positions = torch.arange(targets.shape[1], device=device)
        chunked = "logits_to_keep" in inspect.signature(self.skeleton.model.forward).parameters
        size = max(1, _CHUNK_BYTES // (4 * len(batch) * vocabulary(self.skeleton))) if chunked else len(positions)
        for part in positions.split(size):
            more = {"logits_to_keep": part} if chunked else {}
            with torch.enable_grad():
                logits = self._cut_short(self.depth, batch, _copied(output), **more).logits
                logits = logits if chunked else logits[:, :-1]
                logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
                nn.functional.cross_entropy(logits, targets[:, part].flatten(), reduction="sum").backward()
        return self._gradients_of(leaves, self.depth)

    def _through_layer(self, layer: nn.Module, index: int, place: int, *, further: bool) -> list[torch.Tensor]:
        """Run a layer forth and back; gradients with respect to what the layer before put out, if it goes further."""
        number = self.numbers[place]
        before = self.outputs.get(number) if index else None
        leaves: list[torch.Tensor] = []
        if further:
            before, leaves = _requiring(before)
        with torch.enable_grad():
            args, kwargs = self._arguments(index, number, self.batches[number], _copied(before))
            output = self._run(layer, index, args, kwargs)
        pairs = zip(_floating(output), self.gradients.get(place), strict=True)
        reached = [(out, gradient) for out, gradient in pairs if out.requires_grad]
        torch.autograd.backward([out for out, _ in reached], [gradient for _, gradient in reached])
        return self._gradients_of(leaves, index)

    def _gradients_of(self, leaves: list[torch.Tensor], index: int) -> list[torch.Tensor]:
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        if not all(map(all_finite, gradients)):
            where = "the head" if index == self.depth else f"decoder layer {index}"
            raise NumericError(
                f"{self.skeleton.checkpoint.folder}: the gradient of the loss at {where} is NaN or infinite in "
                f"{self.skeleton.dtype}; try --dtype float32 or bfloat16"
            )
        return gradients


def check_gradients(skeleton: Skeleton) -> None:
    """Make sure, before any text is read, that the gradients of a model can be taken.

    Raises:
        UnsupportedModelError: its experts do not show their activations, or it has no head.
    """
    vocabulary(skeleton)
    for layer in skeleton.layers:
        Gradients(skeleton.model.get_submodule(layer.name), layer.num_experts)


def sum_gradients(
    back: Backward,
    keep: Callable[[str, dict[str, np.ndarray]], None],
    is_kept: Callable[[str], bool],
    processes: Processes | None = None,
    done: Callable[[int], None] | None = None,
    grams: bool = False,
) -> None:
    """Go back through a model and hand out the sums of each MoE layer, or what is left of them after an interruption.

    Args:
        back: the walk; its stores are those of an interrupted one, or empty of gradients.
        keep: called with the key of a MoE layer and its sums, before the layer is committed.
        is_kept: whether `keep` was called for that key in an interrupted run.
        processes: those that go back together, each over its own blocks.
        done: called with the index of each decoder layer that is through.
        grams: also sum up products of gradients at the output of the experts.

    Raises:
        NumericError: a gradient is NaN or infinite.
        UnsupportedModelError: a family whose experts do not show their activations.
    """
    processes, model, batches = processes or Processes(), back.skeleton.model, len(back.numbers)
    layers = back.skeleton.layers

    @contextmanager
    def observe(index: int, module: nn.Module) -> Iterator[None]:
        here = [layer for layer in layers if layer.index == index]
        watched = {x.key: Gradients(model.get_submodule(x.name), x.num_experts, grams) for x in here}
        with ExitStack() as stack:
            for gradients in watched.values():
                stack.enter_context(gradients.attached())
            yield
        # While the layer is there, and before the commit: a kill in between repeats the layer.
        for key, gradients in watched.items():
            keep(key, gradients.sums())

    committed = back.gradients.latest(batches)
    if committed is None or not all(is_kept(x.key) for x in layers if x.index >= back.depth - committed):
        committed = -1
    common = processes.minimum(committed)
    if not processes.minimum(back.gradients.resume(common, batches)):
        common = -1
    back.to_layer(min(layer.index for layer in layers), observe, committed=common, done=done)


def _floating(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _requiring(value: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return what a layer put out with its floating-point tensors asking for gradients, and those tensors."""

    def ask(x: Any) -> Any:
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.detach().clone().requires_grad_() if floating else x

    asking = pytree.tree_map(ask, value)
    return asking, _floating(asking)


def _copied(value: Any) -> Any:
    """Return it in tensors that the model may change in place."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)
