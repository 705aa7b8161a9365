"""Assemble stacked expert weights straight from their per-expert tensors, each read into its place.

transformers' converters collect all tensors of a layer, stack them, then concatenate: three layers' worth of memory at
the peak. The commonest chain, "stack over experts, then put gate and up side by side", needs none of that. Every other
chain is left to transformers; the contract tests compare the two.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, dot_natural_key

from understudy.checkpoint import Weights


@dataclass(frozen=True)
class Stack:
    """Sources of one stacked weight: for each part of dim 1, the tensor of each expert in the order of the rows."""

    target: str
    columns: tuple[tuple[str, ...], ...]

    @property
    def keys(self) -> set[str]:
        """Every checkpoint tensor in it."""
        return {key for column in self.columns for key in column}

    def read(self, checkpoint: Weights, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Read the stacked weight of the given shape; the caller has checked that it fits."""
        weight = torch.empty(shape, dtype=dtype)
        start = 0
        for column in self.columns:
            size = checkpoint.entries[column[0]].shape[0]
            for row, key in enumerate(column):
                checkpoint.read_into(key, weight[row, start : start + size])
            start += size
        return weight

    def fits(self, checkpoint: Weights, shape: torch.Size) -> bool:
        """Whether the tensors have the shapes that make up the weight."""
        shapes = [{checkpoint.entries[key].shape for key in column} for column in self.columns]
        if len(shape) != 3 or any(len(s) != 1 or len(next(iter(s))) != 2 for s in shapes):
            return False
        parts = [next(iter(s)) for s in shapes]
        whole = (sum(p[0] for p in parts), shape[2])
        return whole == tuple(shape[1:]) and all(p[1] == shape[2] for p in parts) and self._rows() == {shape[0]}

    def _rows(self) -> set[int]:
        return {len(column) for column in self.columns}


def find_stacks(targets: dict[str, str], patterns: dict[str, str], conversions: list[object]) -> dict[str, Stack]:
    """Find the weights that are plain stacks, by name.

    `targets` maps checkpoint tensors to model tensors, `patterns` to the converter pattern that they matched.
    """
    by_pattern = {p: c for c in conversions if isinstance(c, WeightConverter) for p in c.source_patterns}
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, pattern in patterns.items():
        if _is_plain(by_pattern[pattern]):
            groups[targets[key]][pattern].append(key)
    found = {}
    for target, columns in groups.items():
        order = by_pattern[next(iter(columns))].source_patterns
        if set(columns) == set(order):
            found[target] = Stack(target, tuple(tuple(sorted(columns[p], key=dot_natural_key)) for p in order))
    return found


def _is_plain(converter: WeightConverter) -> bool:
    if len(converter.target_patterns) != 1 or not isinstance(converter.operations[0], MergeModulelist):
        return False
    merge, *rest = converter.operations
    if merge.dim != 0:
        return False
    if not rest:
        return len(converter.source_patterns) == 1
    return len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1
