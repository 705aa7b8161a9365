"""The checkpoint that training leads to: the tensors of the source, and those that were trained in their places.

One layer is in memory at a time: what was trained is put into it, low-rank parts on kept experts are added to their
weights, and what comes out is written in the dtype that the source has for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from understudy.adapters import Adapters
from understudy.cut import tensor_bytes
from understudy.errors import CheckpointError
from understudy.experts import StandInExperts
from understudy.runtime import quiet_transformers
from understudy.shards import Lazy, Piece, whole
from understudy.skeleton import ROOT, Skeleton
from understudy.weights import DTYPES

_ADDED = ".adapters."  # in names of low-rank parts of kept experts; those of bases stay apart


def recovered(source: Skeleton, state: Mapping[str, Tensor]) -> list[Piece]:
    """Say what tensors a trained model has, by the names of the source's checkpoint and in its order.

    Args:
        source: the model that was trained, as it was before, in float32.
        state: what was trained, by the names of the live model.

    Raises:
        CheckpointError: transformers would save a trained tensor under a name that the source has not.
    """
    by_part: dict[int, list[str]] = {}
    for part, names in source.names.items():
        changed = [name for name in names if name in state]
        for layer in source.layers:
            if layer.index == part and _added_to(layer.name, state):
                experts: Any = source.model.get_submodule(layer.name)
                changed += [f"{layer.name}.{leaf}" for leaf in _stacked(experts, layer.num_experts)]
        if changed:
            by_part[part] = sorted(set(changed))
    workshop = _Workshop(source, state, by_part)
    new: dict[str, Piece] = {}
    for part, names in by_part.items():
        outline = {name: source.get(name) for name in names}
        assert all(tensor.is_meta for tensor in outline.values())
        for key, tensor in workshop.saved(outline).items():
            entry = source.checkpoint.entries.get(key)
            if entry is None or entry.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{source.checkpoint.folder}: transformers would save a trained tensor as {key} "
                    f"{tuple(tensor.shape)}, which the checkpoint has not; it cannot be written"
                )
            new[key] = Piece(key, entry.dtype, entry.shape, (workshop.promise(part, key, entry.nbytes, entry.dtype),))
    return [new.get(key, whole(entry)) for key, entry in source.checkpoint.entries.items()]


class _Workshop:
    """Computes the tensors of a part when the first of them is asked for, and keeps one part's at a time."""

    def __init__(self, source: Skeleton, state: Mapping[str, Tensor], by_part: Mapping[int, list[str]]) -> None:
        self.source, self.state, self.by_part = source, state, by_part
        self._held: tuple[int, dict[str, Tensor]] | None = None

    def saved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn tensors by their names in the model into those of the checkpoint."""
        self.source.model._weight_conversions = self.source.used_conversions  # loading a part sets that part's
        with quiet_transformers():
            return dict(revert_weight_conversion(self.source.model, dict(tensors)))

    def promise(self, part: int, key: str, nbytes: int, dtype: str) -> Lazy:
        """Promise one tensor of the checkpoint."""
        return Lazy(nbytes, lambda: tensor_bytes(self._tensors(part)[key].to(getattr(torch, DTYPES[dtype][0]))))

    @torch.no_grad()
    def _tensors(self, part: int) -> dict[str, Tensor]:
        if self._held is None or self._held[0] != part:
            self._held = None
            with self.source.resident(part):
                for name in self.by_part[part]:
                    if name in self.state:
                        self.source.get(name).copy_(self.state[name])
                for layer in self.source.layers if part != ROOT else ():
                    if layer.index == part and (added := _added_to(layer.name, self.state)):
                        _merge(self.source.model.get_submodule(layer.name), added)
                found = {name: self.source.get(name).detach() for name in self.by_part[part]}
                self._held = (part, self.saved(found))
        return self._held[1]


def _added_to(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the low-rank parts on the kept experts of a layer, by their own names."""
    start = f"{name}{_ADDED}"
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def _merge(experts: Any, added: Mapping[str, Tensor]) -> None:
    rows, rank = added["down_a"].shape[:2]
    adapters = Adapters(experts, rows, rank)
    for name, value in added.items():
        adapters._parameters[name].copy_(value)  # type: ignore[union-attr]  # all of them are there
    for row in range(rows):
        adapters.merge_into(experts, row, row)


def _stacked(experts: Any, num_experts: int) -> list[str]:
    """Names of the parameters that low-rank parts are added to."""
    rows = len(experts.kept) if isinstance(experts, StandInExperts) else num_experts
    named = experts._parameters.items()
    return [n for n, p in named if p is not None and n.endswith("_proj") and p.shape[0] == rows]
