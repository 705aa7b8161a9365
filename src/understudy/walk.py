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
from understudy.errors import NumericError, UnsupportedModelError
from understudy.runtime import all_finite
from understudy.skeleton import ROOT, Skeleton

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
        self,
        observe: Observe | None = None,
        *,
        start: int = 0,
        done: Callable[[int], None] | None = None,
        again: Observe | None = None,
    ) -> None:
        """Run all batches through the layers from `start` on; `done(i)` is called when layer `i` is committed.

        `observe(i, layer)` gives a context that surrounds the run of one layer. `again(i, layer)`, entered after that,
        may change the layer and say so by giving True: then it runs once more, and what it puts out then counts.

        Raises:
            NumericError: a layer puts out NaN or infinity.
        """
        for index in range(start, self.depth):
            with self.skeleton.resident(index) as layer:
                with observe(index, layer) if observe else nullcontext():
                    self._through(layer, index)
                with again(index, layer) if again else nullcontext(False) as changed:
                    if changed:
                        self._through(layer, index)
            self.store.commit(index)
            if done:
                done(index)

    def _through(self, layer: nn.Module, index: int) -> None:
        for number in range(len(self.batches)):
            self.store.put(number, self.run_layer(layer, index, number, self.store.get(number) if index else None))

    @torch.no_grad()
    def run_layer(self, layer: nn.Module, index: int, number: int, before: Any) -> Any:
        """Put one batch through a resident layer, where the layer before it has put out `before`; the first reads none.

        Raises:
            NumericError: the layer puts out NaN or infinity.
        """
        args, kwargs = self._arguments(index, number, self.batches[number], before)
        return self._run(layer, index, args, kwargs)

    @torch.no_grad()
    def logits(self, number: int) -> torch.Tensor:
        """Logits `[B, S, V]` of a batch whose last layer's output is in the store."""
        return self._finish(self.batches[number], self.store.get(number))

    @torch.no_grad()
    def logit_chunks(self, number: int, size: int) -> Iterator[torch.Tensor]:
        """Logits of a batch, `[B, C, V]` of `size` positions at a time; the last, which predicts nothing, is left out.

        A few families give logits for all positions only; theirs are computed at once and handed out in pieces.
        """
        batch, output = self.batches[number], self.store.get(number)
        positions = torch.arange(batch.shape[1] - 1, device=self.skeleton.device)
        if "logits_to_keep" in inspect.signature(self.skeleton.model.forward).parameters:
            for part in positions.split(size):
                yield self._finish(batch, output, logits_to_keep=part)
        else:
            yield from self.logits(number)[:, :-1].split(size, dim=1)

    def _arguments(
        self, index: int, number: int, batch: np.ndarray, before: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model hands a layer after the layer before it has put out `before`."""
        try:
            self._cut_short(index, batch, before)
        except _Reached as reached:
            if index > 1 and number == 0 and any(_has_nan(x) for x in pytree.tree_leaves(reached.arguments)):
                raise self._unsupported("read what layers before the previous one put out") from None
            return reached.arguments
        raise AssertionError(f"the model's forward never called decoder layer {index}")

    def _run(self, layer: nn.Module, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            output = layer(*args, **kwargs)
        except (KeyError, AttributeError) as error:  # looks for something that an earlier layer left somewhere
            raise self._unsupported(f"cannot run one by one (layer {index}: {error!r})") from error
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not all_finite(tensor):
                raise self._not_finite(f"decoder layer {index}")
        return output

    def _finish(self, batch: np.ndarray, output: Any, **more: Any) -> torch.Tensor:
        logits = self._cut_short(self.depth, batch, output, **more).logits
        if _has_nan(logits):
            if _has_nan(self._cut_short(self.depth, batch, output, poisoned=False, **more).logits):
                raise self._not_finite("the head")
            raise self._unsupported("are read again by the head, other than the last")
        return logits

    def _cut_short(self, index: int, batch: np.ndarray, output: Any, *, poisoned: bool = True, **more: Any) -> Any:
        """Run the model's forward with layer `index - 1` answering `output` and layer `index` raising.

        Layers before those answer NaN: a model that reads what lies further back than the previous layer would go
        silently wrong here, and shows itself by passing the NaN on.
        """
        earlier = pytree.tree_map(_poison, output) if poisoned else output

        def stand_for(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if i == index:
                    raise _Reached(args, kwargs)
                return output if i == index - 1 else earlier

            return forward

        layers = self.skeleton.decoder_layers
        for i, layer in enumerate(layers):
            layer.forward = stand_for(i)  # an attribute of the object shadows the class's method
        try:
            ids = torch.from_numpy(np.ascontiguousarray(batch)).long().to(self.skeleton.device)
            return self.skeleton.model(input_ids=ids, use_cache=False, **more)
        finally:
            for layer in layers:
                del layer.forward

    def _not_finite(self, where: str) -> NumericError:
        return NumericError(
            f"{self.skeleton.checkpoint.folder}: {where} puts out NaN or infinity in {self.skeleton.dtype}; "
            "try --dtype float32, or check the checkpoint"
        )

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.skeleton.model).__name__} is not supported: its decoder layers {what}, and a walk keeps only "
            "what the last layer put out"
        )


def _poison(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.full((), float("nan"), dtype=value.dtype, device=value.device).expand(value.shape)
    return value


def _has_nan(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any())
