"""Synthetic routing, and the sums that it must give by explicit loops over routes: slow, obvious, in two passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from understudy.facts import LayerFacts, ModelFacts
from understudy.stats import ExpertStats, Stats

HIDDEN = 6


@dataclass(frozen=True)
class Routes:
    """What one layer saw: `index` [T, K] experts, `gates` [T, K], and `outputs` [T, K, H] before the gate."""

    experts: int
    index: np.ndarray
    gates: np.ndarray
    outputs: np.ndarray

    def of(self, expert: int) -> list[tuple[float, np.ndarray]]:
        """Return (gate, output) of every route to one expert."""
        tokens, picks = self.index.shape
        found = []
        for t in range(tokens):
            for k in range(picks):
                if self.index[t, k] == expert:
                    found.append((float(self.gates[t, k]), self.outputs[t, k].astype(np.float64)))
        return found

    def part(self, start: int, stop: int) -> Routes:
        """Return some of the tokens."""
        return Routes(self.experts, self.index[start:stop], self.gates[start:stop], self.outputs[start:stop])


def draw_routes(
    tokens: int = 40, experts: int = 8, top_k: int = 2, seed: int = 0, silent: Sequence[int] = (), hidden: int = HIDDEN
) -> Routes:
    """Draw routes at random; experts in `silent` are never chosen."""
    rng = np.random.default_rng(seed)
    open_to = [e for e in range(experts) if e not in silent]
    index = np.array([rng.choice(open_to, top_k, replace=False) for _ in range(tokens)]).reshape(tokens, top_k)
    # experts differ in size and drift, so that the scores disagree with each other
    outputs = rng.normal(size=(tokens, top_k, hidden)) * (1 + index[..., None] % 3) + 0.3 * index[..., None]
    return Routes(experts, index, rng.random((tokens, top_k)), outputs)


def norm(vector: np.ndarray) -> float:
    """Return the Euclidean norm."""
    return math.sqrt(sum(float(v) ** 2 for v in vector))


def sums_of(routes: Routes) -> ExpertStats:
    """Return the sums of a layer, expert by expert and route by route."""
    E, H = routes.experts, routes.outputs.shape[-1]
    names = ("count", "gate_sum", "gate_sq_sum", "norm_sum", "gated_norm_sum", "scatter", "weighted_scatter")
    sums = {name: np.zeros(E) for name in names}
    mean, weighted_mean = np.zeros((E, H)), np.zeros((E, H))
    for e in range(E):
        found = routes.of(e)
        if not found:
            continue
        sums["count"][e] = len(found)
        sums["gate_sum"][e] = sum(g for g, _ in found)
        sums["gate_sq_sum"][e] = sum(g * g for g, _ in found)
        sums["norm_sum"][e] = sum(norm(y) for _, y in found)
        sums["gated_norm_sum"][e] = sum(g * norm(y) for g, y in found)
        mean[e] = sum(y for _, y in found) / len(found)
        weighted_mean[e] = sum(g * g * y for g, y in found) / sum(g * g for g, _ in found)
        sums["scatter"][e] = sum(norm(y - mean[e]) ** 2 for _, y in found)
        sums["weighted_scatter"][e] = sum(g * g * norm(y - weighted_mean[e]) ** 2 for g, y in found)
    tokens = np.float64(len(routes.index))
    return ExpertStats(tokens=tokens, mean=mean, weighted_mean=weighted_mean, **sums)


def facts_of(layers: Mapping[str, Routes], groups: int = 1, source: str = "toy", **more: object) -> ModelFacts:
    """Return facts of a model with these layers: an expert has 1000 bytes, its router row 10, a vector 2 H."""
    common = {"groups": groups, "expert_params": 500, "expert_bytes": 1000, "router_row_bytes": 10, "element_bytes": 2}
    facts = {
        key: LayerFacts.model_validate(
            {
                "name": f"model.layers.{key}.experts",
                "experts": routes.experts,
                "top_k": routes.index.shape[1],
                "hidden": routes.outputs.shape[-1],
                **common,
                **more,
            }
        )
        for key, routes in layers.items()
    }
    routed = sum(layer.experts * layer.expert_bytes for layer in facts.values())
    return ModelFacts(
        source=source, family="toy_moe", fingerprint=f"print-of-{source}", nbytes=routed + 5000, params=0, layers=facts
    )


def stats_of(layers: Mapping[str, Routes], **facts: object) -> Stats:
    """Return the statistics of a model with these layers."""
    made = facts_of(layers, **facts)  # type: ignore[arg-type]
    return Stats(made, {"sources": ["synthetic"]}, {key: sums_of(routes) for key, routes in layers.items()})
