"""Run text through a model one decoder layer at a time: every batch through a layer before the next layer is loaded.

No code per family: the arguments of a layer (masks, rotary embeddings, positions, sliding windows, per-layer inputs)
come from the model's own forward, run with its decoder layers cut short. Layers before the wanted one hand through what
the last finished layer really returned, so state that travels beside the hidden states is right, too; after the last
layer the model's own final norm and head run the same way. Hidden states are bit-identical to a whole model's run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from understudy.activations import ActivationStore
from understudy.errors import NumericError
from understudy.skeleton import ROOT, Skeleton, all_finite

Observe = Callable[[int, nn.Module], AbstractContextManager[Any]]


class _Reached(Exception):
    """Carries the arguments of a decoder layer out of the model's forward."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = args, kwargs


class Walk:
    """A walk of token blocks through a skeleton.

    Args:
        skeleton: the model; its part outside the layers is resident inside `ready()`.
        ids: token ids `[N, S]`, integer.
        batch_size: blocks that run together.
        store: where the outputs of the last finished layer are.
    """

    def __init__(self, skeleton: Skeleton, ids: np.ndarray, batch_size: int, store: ActivationStore) -> None:
        self.skeleton, self.store = skeleton, store
        self.batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
        self.depth = len(skeleton.decoder_layers)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Hold embeddings, head and whatever else is outside the layers."""
        with self.skeleton.resident(ROOT):
            yield

    @torch.no_grad()
    def through_layers(
        self, observe: Observe | None = None, *, start: int = 0, done: Callable[[int], None] | None = None
    ) -> None:
        """Run all batches through the layers from `start` on; `done(i)` is called when layer `i` is committed.

        `observe(i, layer)` gives a context that surrounds the run of one layer.

        Raises:
            NumericError: a layer puts out NaN or infinity.
        """
        for index in range(start, self.depth):
            with self.skeleton.resident(index) as layer:
                with observe(index, layer) if observe else nullcontext():
                    for number, batch in enumerate(self.batches):
                        args, kwargs = self._arguments(index, number, batch)
                        output = layer(*args, **kwargs)
                        self._check(output, index)
                        self.store.put(number, output)
            self.store.commit(index)
            if done:
                done(index)

    @torch.no_grad()
    def logits(self, number: int) -> torch.Tensor:
        """Logits `[B, S, V]` of a batch whose last layer's output is in the store."""
        return self._cut_short(self.depth, self.batches[number], self.store.get(number)).logits

    @torch.no_grad()
    def logit_chunks(self, number: int, size: int) -> Iterator[torch.Tensor]:
        """Logits of a batch, `size` positions at a time, `[B, C, V]`; without the last position, which predicts nothing.

        A few families give logits for all positions only; theirs are computed at once and handed out in pieces.
        """
        batch, output = self.batches[number], self.store.get(number)
        positions = torch.arange(batch.shape[1] - 1, device=self.skeleton.device)
        if "logits_to_keep" in inspect.signature(self.skeleton.model.forward).parameters:
            for part in positions.split(size):
                yield self._cut_short(self.depth, batch, output, logits_to_keep=part).logits
        else:
            yield from self.logits(number)[:, :-1].split(size, dim=1)

    def _arguments(self, index: int, number: int, batch: np.ndarray) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            self._cut_short(index, batch, self.store.get(number) if index else None)
        except _Reached as reached:
            return reached.arguments
        raise AssertionError(f"the model's forward never called decoder layer {index}")

    def _cut_short(self, index: int, batch: np.ndarray, output: Any, **more: Any) -> Any:
        """Run the model's forward with layers below `index` answering `output` and layer `index` raising."""

        def hand_through(*args: Any, **kwargs: Any) -> Any:
            return output

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(args, kwargs)

        layers = self.skeleton.decoder_layers
        for i, layer in enumerate(layers):
            layer.forward = hand_through if i < index else stop  # an attribute of the object shadows the class's
        try:
            ids = torch.from_numpy(np.ascontiguousarray(batch)).long().to(self.skeleton.device)
            return self.skeleton.model(input_ids=ids, use_cache=False, **more)
        finally:
            for layer in layers:
                del layer.forward

    def _check(self, output: Any, index: int) -> None:
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not all_finite(tensor):
                raise NumericError(
                    f"{self.skeleton.checkpoint.folder}: decoder layer {index} puts out NaN or infinity in "
                    f"{self.skeleton.dtype}; try --dtype float32, or check the checkpoint"
                )
