"""NAEE's loss of every subset of a layer's experts, for layers of few experts.

Source: arXiv 2402.14800, METHODS 5: a layer gives up the experts without which its output changes least, all subsets
tried, every layer on the inputs that it has in the unpruned model. A subset is run as removal would leave it: rows of
the router go with the experts, so that its tokens are routed among those that stay.

Letters: E experts, S = 2^E subsets as bit masks (bit e set: expert e stays).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from understudy.collectors import Collector, Resident
from understudy.moe import expert_dim

MOST = 10  # experts; there are 2^E subsets


class Subsets(Collector):
    """Sums over blocks of text of |F(x) - F_subset(x)|_F, F the output of the MoE block."""

    group = "subsets"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        layer = resident.layer
        self._loss = np.full(1 << layer.num_experts if layer.num_experts <= MOST else 0, np.inf)
        fits = layer.num_experts <= MOST and layer.removable is None and layer.groups == 1
        self._blocks = dict(self._copies()) if fits and resident.block is not resident.decoder else {}
        self._loss[list(self._blocks)] = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Run every subset on what enters the block."""
        if not self._blocks:
            yield
            return
        handle = self.resident.block.register_forward_hook(self._compare, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def sums(self) -> dict[str, Any]:
        """Return the loss of each subset; infinite where too few experts stay, and none at all for too many experts."""
        many = self.resident.layer.num_experts > MOST
        return {"subset_loss": self._loss} if self._blocks or many else {}

    def _compare(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        whole = _first(output).float()
        length = self.resident.seq_len
        for mask, without in self._blocks.items():
            changed = whole - _first(without(*args, **kwargs)).float()
            norms = torch.linalg.vector_norm(changed.reshape(-1, length * changed.shape[-1]), dim=1)
            self._loss[mask] += float(norms.sum(dtype=torch.float64))

    def _copies(self) -> Iterator[tuple[int, nn.Module]]:
        layer = self.resident.layer
        for mask in range(1 << layer.num_experts):
            kept = [e for e in range(layer.num_experts) if mask >> e & 1]
            if len(kept) >= layer.top_k:
                yield mask, self._without(kept)

    def _without(self, kept: list[int]) -> nn.Module:
        """A block that shares all weights with the real one, but for the rows of its router."""
        layer, E = self.resident.layer, self.resident.layer.num_experts
        block = _bare(self.resident.block, E, len(kept))
        for name in layer.router:
            *path, leaf = name[len(layer.block) + 1 :].split(".")
            owner = block
            for part in path:
                child = owner._modules[part]
                if getattr(child, "_understudy_experts", None) != len(kept):
                    child = _bare(child, E, len(kept))
                    child.__dict__["_understudy_experts"] = len(kept)  # already a copy of ours
                    owner._modules[part] = child
                owner = child
            _cut(owner, leaf, kept, E)
        leaf = layer.name[len(layer.block) + 1 :]
        assert "." not in leaf
        block._modules[leaf] = _Renumbered(self.resident.experts, kept)
        return block


class _Renumbered(nn.Module):
    """Experts called by their number among those that stay."""

    def __init__(self, experts: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.num_experts = len(kept)
        self._run, self._kept = _bare(experts, 0, 0), torch.tensor(kept)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        return self._run(hidden_states, self._kept.to(top_k_index.device)[top_k_index], top_k_weights)


def _bare(module: Any, before: int, after: int) -> Any:
    """Copy a module without its children's and weights' contents, and without the hooks of those who watch it."""
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = dict(module.__dict__[name])
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        made.__dict__[name] = OrderedDict()
    made.__dict__.pop("forward", None)  # set by a collector
    for name, value in list(made.__dict__.items()):
        if before and "expert" in name and type(value) is int and value == before:
            made.__dict__[name] = after
    return made


def _cut(owner: Any, leaf: str, kept: list[int], E: int) -> None:
    for table in (owner._parameters, owner._buffers):
        if table.get(leaf) is not None:
            tensor = table[leaf].detach()
            rows = tensor.index_select(expert_dim(tuple(tensor.shape), E), torch.tensor(kept, device=tensor.device))
            table[leaf] = nn.Parameter(rows, requires_grad=False) if table is owner._parameters else rows


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
