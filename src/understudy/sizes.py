"""How many parameters a model has, and how many of them a token passes through; the latter is measured where it varies.

Letters: E routed experts of a layer, k routes of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from understudy.experts import StandInExperts
from understudy.skeleton import Skeleton


class RouteCounter:
    """Counts, during a walk, which experts the tokens choose in the layers that have stand-ins."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._counts: dict[str, torch.Tensor] = {}  # int64 [E], by layer key
        self._tokens: dict[str, int] = {}

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Count while one decoder layer runs; what `Walk.through_layers` takes as `observe`."""
        with ExitStack() as stack:
            for found in self.skeleton.layers:
                experts = self.skeleton.model.get_submodule(found.name)
                if found.index == index and isinstance(experts, StandInExperts):
                    stack.enter_context(self._counting(found.key, experts))
            yield

    @contextmanager
    def _counting(self, key: str, experts: Any) -> Iterator[None]:
        own_forward = experts.forward

        def counted(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            seen = experts.chosen(top_k_index, top_k_weights).cpu()
            self._counts[key] = self._counts[key] + seen if key in self._counts else seen
            self._tokens[key] = self._tokens.get(key, 0) + len(hidden_states)
            return own_forward(hidden_states, top_k_index, top_k_weights)

        experts.forward = counted  # an attribute of the object shadows the class's method
        try:
            yield
        finally:
            del experts.forward

    def means(self) -> dict[str, np.ndarray]:
        """Mean routes of a token to each expert by original id, float64 `[E]`, by layer key.

        Several routes of a token to experts that share their weights count once.
        """
        return {key: counts.double().numpy() / self._tokens[key] for key, counts in self._counts.items()}


def count_params(skeleton: Skeleton, routes: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Count parameters: `total` in the checkpoint, `routed` in routed experts and stand-ins, `active` for a token.

    Active are all parameters outside the routed experts, and in each MoE layer those that the k routes of a token
    lead to; where fewer of them run, those and the vectors of the others. Where a layer has stand-ins, that depends on
    the text: `routes` gives the mean routes to each expert, as `RouteCounter` measures them. For a layer that is not in
    `routes`, every expert counts as equally likely.
    """
    total = sum(entry.numel for entry in skeleton.checkpoint.entries.values())
    routed, active = 0, 0.0
    for layer in skeleton.layers:
        experts = skeleton.model.get_submodule(layer.name)
        if isinstance(experts, StandInExperts):
            stored, params_E = _with_stand_ins(experts)
            routed += stored
            routes_E = routes.get(layer.key, _evenly(experts, layer.top_k))
            active += float(params_E @ routes_E)
            if (vectors := experts.modulation) is not None:  # routes that do not run have one each
                each = _row_params(vectors, vectors.num_experts)
                routed += each * vectors.num_experts
                active += each * max(0.0, layer.top_k - float(routes_E.sum()))
        else:
            each = _row_params(experts, layer.num_experts)
            routed += each * layer.num_experts
            active += layer.top_k * each
    return {"total": total, "routed": routed, "active": round(total - routed + active)}


def _evenly(experts: Any, top_k: int) -> np.ndarray:
    """Mean routes of a token to each expert that run, where each expert is equally likely to be chosen, `[E]`."""
    E = experts.num_logical_experts
    routes_E = np.full(E, top_k / E)
    if experts.modulation is not None:
        full = [e for e in range(E) if e not in experts.stand_ins or not experts.stand_ins[e].free]
        routes_E[full] = min(experts.modulation.main_k, top_k * len(full) / E) / len(full)
    return routes_E


def _with_stand_ins(experts: Any) -> tuple[int, np.ndarray]:
    """Parameters that a layer's experts and stand-ins hold together, and those behind each original id, `[E]`."""
    params_E = np.zeros(experts.num_logical_experts)
    each = _row_params(experts, len(experts.kept))
    stored = each * len(experts.kept)
    params_E[list(experts.rows)] = each
    for child in (*experts.slim, *experts.thin):
        each = _row_params(child, len(child.kept))
        stored += each * len(child.kept)
        params_E[list(child.kept)] = each
    if (bases := experts.bases) is not None:
        each, thin = _row_params(bases, len(bases.dominants)), _row_params(bases.adapters, len(bases.replaced))
        stored += each * len(bases.dominants) + thin * len(bases.replaced)
        params_E[list(bases.replaced)] = each + thin
    if experts.constants is not None:
        stored += experts.constants.numel()
        params_E[list(experts.replaced)] += experts.constants.shape[1]
    return stored, params_E


def _row_params(experts: nn.Module, rows: int) -> int:
    """Parameters of one expert; the constants of a layer are stacked like experts and must not be taken for a part."""
    stacked = [p for name, p in experts.named_parameters(recurse=False) if name != "constants" and p.dim() > 0]
    return sum(p[0].numel() for p in stacked if p.shape[0] == rows and rows)
