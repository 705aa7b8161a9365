"""Experts with stand-ins: the family's own experts module, live-subclassed, shrunk to the experts it keeps.

Letters: E experts of the router, K kept ones, P = E - K constants, T tokens, k routes of a token, H hidden size.

The class of the live object is swapped for a subclass instead of wrapping the module: parameter names stay what they
were, so weight converters, every experts implementation of transformers, adapters and sharding go on working. Routes to
replaced experts reach the family's code as the id K, which transformers reserves for experts that live elsewhere and
which costs no matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class StandInExperts:
    """Mixin over a family's experts class: kept experts run as before, constants are added under the router's weights.

    MoNE (arXiv 2507.00390, section 3.4): a replaced expert returns one vector for every token; the gate, the order of
    the top-k and their normalisation are untouched.
    """

    kept: tuple[int, ...]  # original ids of the rows of the stacked weights
    replaced: tuple[int, ...]  # original ids of the rows of `constants`
    num_logical_experts: int
    constants: nn.Parameter  # [P, H]
    _maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Combine kept experts and constants: hidden `[T, H]`, original ids `[T, k]`, gates `[T, k]` to `[T, H]`."""
        rows, columns = self._route_maps(hidden_states.device)
        row_TK, column_TK = rows[top_k_index], columns[top_k_index]
        to_constant_TK = row_TK == len(self.kept)
        # One column more than constants, to swallow the routes of kept experts. Summed in float32, as vLLM does.
        gate_TP = top_k_weights.new_zeros((hidden_states.shape[0], len(self.replaced) + 1), dtype=torch.float32)
        gate_TP = gate_TP.scatter_add(1, column_TK, top_k_weights.float())
        constant_TH = gate_TP[:, :-1] @ self.constants.float()
        config = getattr(self, "config", None)  # a module without one runs a loop of its own
        if getattr(config, "_experts_implementation", None) in (None, "eager"):
            # Some families' own loops reject the reserved id; there a replaced route runs any expert at weight zero.
            row_TK = row_TK.clamp(max=len(self.kept) - 1)
        kept_TH = super().forward(  # type: ignore[misc]
            hidden_states, row_TK, top_k_weights.masked_fill(to_constant_TK, 0)
        )
        return kept_TH + constant_TH.to(kept_TH.dtype)

    def _route_maps(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Original id to row of the stacked weights (K: none) and to column of the constants (P: none), `[E]` each."""
        if device not in self._maps:
            rows = torch.full((self.num_logical_experts,), len(self.kept))
            columns = torch.full((self.num_logical_experts,), len(self.replaced))
            rows[list(self.kept)] = torch.arange(len(self.kept))
            columns[list(self.replaced)] = torch.arange(len(self.replaced))
            self._maps[device] = (rows.to(device), columns.to(device))
        return self._maps[device]


_SUBCLASSES: dict[type, type] = {}  # one for each family, so that equal modules have equal classes


def _subclass(cls: type) -> type:
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(f"StandIn{cls.__name__}", (StandInExperts, cls), {"__module__": cls.__module__})
    return _SUBCLASSES[cls]


def install_constants(experts: Any, replaced: Sequence[int], num_experts: int) -> None:
    """Turn a live experts module into one whose `replaced` experts are constants, in place.

    Stacked weights lose the replaced rows (on the meta device or a real one); `constants` `[P, H]` start as zeros, in
    the dtype of the weights. At least one expert must stay.
    """
    gone = sorted(set(replaced))
    kept = tuple(e for e in range(num_experts) if e not in set(gone))
    assert kept and gone and not isinstance(experts, StandInExperts)
    for name, weight in list(experts.named_parameters(recurse=False)):
        if weight.shape[0] == num_experts:
            shrunk = weight.detach()[torch.tensor(kept, device=weight.device)]
            setattr(experts, name, nn.Parameter(shrunk, requires_grad=weight.requires_grad))
    down = experts.down_proj
    hidden = down.shape[2] if getattr(experts, "is_transposed", False) else down.shape[1]
    experts.constants = nn.Parameter(torch.zeros(len(gone), hidden, dtype=down.dtype, device=down.device))
    experts.kept, experts.replaced, experts.num_logical_experts = kept, tuple(gone), num_experts
    experts.num_experts = len(kept)
    experts._is_expert_parallel = True  # makes the id K legal: "an expert of another rank"
    experts._maps = {}
    experts.__class__ = _subclass(type(experts))
