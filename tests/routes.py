"""Synthetic routing, and the sums that it must give by explicit loops over routes: slow, obvious, in two passes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from understudy.facts import LayerFacts, ModelFacts
from understudy.rehearsal import letters_of
from understudy.stats import ExpertStats, Stats

HIDDEN = 6


@dataclass(frozen=True)
class Routes:
    """What one layer saw: `index` [T, K] experts, `gates` [T, K], and `outputs` [T, K, H] before the gate.

    And what there was before them: `hidden` [T, H] that the routed experts add to, `logits` [T, E] of the router, and
    `weights` [E, n] of the experts, rows `router` and `base_router` [E, n] of the router now and once.
    """

    experts: int
    index: np.ndarray
    gates: np.ndarray
    outputs: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray
    weights: np.ndarray
    router: np.ndarray
    base_router: np.ndarray

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
        names = ("index", "gates", "outputs", "hidden", "logits")
        return replace(self, **{name: getattr(self, name)[start:stop] for name in names})

    def renamed(self, new: np.ndarray) -> Routes:
        """Give expert i the name new[i]."""
        old = np.argsort(new)
        moved = {name: getattr(self, name)[old] for name in ("weights", "router", "base_router")}
        return replace(self, index=new[self.index], logits=self.logits[:, old], **moved)


def draw_routes(
    tokens: int = 40, experts: int = 8, top_k: int = 2, seed: int = 0, silent: Sequence[int] = (), hidden: int = HIDDEN
) -> Routes:
    """Draw routes at random; experts in `silent` are never chosen."""
    rng = np.random.default_rng(seed)
    open_to = [e for e in range(experts) if e not in silent]
    index = np.array([rng.choice(open_to, top_k, replace=False) for _ in range(tokens)]).reshape(tokens, top_k)
    # experts differ in size and drift, so that the scores disagree with each other
    outputs = rng.normal(size=(tokens, top_k, hidden)) * (1 + index[..., None] % 3) + 0.3 * index[..., None]
    gates = rng.random((tokens, top_k))
    of_experts = [rng.normal(size=(experts, 7)) * (1 + rng.random((experts, 1))) for _ in range(3)]
    hidden, logits = rng.normal(size=(tokens, hidden)), rng.normal(size=(tokens, experts)) * (1 + seed % 4)
    return Routes(experts, index, gates, outputs, hidden, logits, *of_experts)


def norm(vector: np.ndarray) -> float:
    """Return the Euclidean norm."""
    return math.sqrt(sum(float(v) ** 2 for v in vector))


def sums_of(routes: Routes) -> ExpertStats:
    """Return the sums of a layer, expert by expert and route by route."""
    E, H = routes.experts, routes.outputs.shape[-1]
    names = ("count", "gate_sum", "gate_sq_sum", "norm_sum", "gated_norm_sum", "scatter", "weighted_scatter")
    sums = {name: np.zeros(E) for name in (*names, "norm_sq_sum", "output_max")}
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
        sums["norm_sq_sum"][e] = sum(norm(y) ** 2 for _, y in found)
        sums["output_max"][e] = max(abs(float(v)) for _, y in found for v in y)
        mean[e] = sum(y for _, y in found) / len(found)
        weighted_mean[e] = sum(g * g * y for g, y in found) / sum(g * g for g, _ in found)
        sums["scatter"][e] = sum(norm(y - mean[e]) ** 2 for _, y in found)
        sums["weighted_scatter"][e] = sum(g * g * norm(y - weighted_mean[e]) ** 2 for g, y in found)
    tokens = np.float64(len(routes.index))
    return ExpertStats(tokens=tokens, mean=mean, weighted_mean=weighted_mean, **sums, **_more_sums(routes))


def _more_sums(routes: Routes) -> dict[str, np.ndarray]:
    """Return sums over weights, over tokens, and over the sets that tokens chose."""
    sets = Counter(tuple(sorted(row)) for row in routes.index.tolist())
    shift = np.zeros(routes.experts)
    for token, row in enumerate(routes.index.tolist()):
        for slot, e in enumerate(row):
            shift[e] += turn(routes, token) * routes.gates[token, slot] * norm(routes.outputs[token, slot])
    return {
        "weight_abs_sum": np.array([sum(abs(float(w)) for w in row) for row in routes.weights]),
        "weight_sq_sum": np.array([norm(row) ** 2 for row in routes.weights]),
        "weight_numel": np.float64(routes.weights.shape[1]),
        "router_norm": np.array([norm(row) for row in routes.router]),
        "base_router_norm": np.array([norm(row) for row in routes.base_router]),
        "logit_norm_sum": np.float64(sum(norm(row) for row in routes.logits)),
        "shift_norm_sum": shift,
        "topk_sets": np.array(sorted(sets), np.int32).reshape(len(sets), routes.index.shape[1]),
        "topk_counts": np.array([sets[row] for row in sorted(sets)], np.float64),
    }


def turn(routes: Routes, token: int) -> float:
    """Return by how much the routed experts turn a token, max(0, 1 - cosine of before and after)."""
    before = routes.hidden[token]
    after = before + sum(g * y for g, y in zip(routes.gates[token], routes.outputs[token], strict=True))
    return max(0.0, 1 - sum(float(a * b) for a, b in zip(before, after, strict=True)) / (norm(before) * norm(after)))


def filled(stats: Stats, seed: int = 0) -> Stats:
    """Give random values to all sums that are not there, for methods that read them; products are symmetric."""
    rng, layers = np.random.default_rng(seed), {}
    for key, layer in stats.layers.items():
        facts = stats.model.layers[key]
        lengths = {"E": facts.experts, "H": facts.hidden, "I": facts.width or 1, "N": 3, "P": 2**facts.experts, "R": 4}
        drawn = {}
        for name in (f.name for f in fields(ExpertStats) if getattr(layer, f.name) is None):
            values = 1 + rng.random([lengths[x] for x in letters_of(name)])
            drawn[name] = values @ values.swapaxes(-1, -2) if letters_of(name) in ("EE", "EII") else values
        if {"activation_gram", "gated_activation_sum"} <= set(drawn):  # no second moment is below the mean's square
            total, weight = drawn["gated_activation_sum"], np.maximum(layer.gate_sq_sum, 1e-3)
            drawn["activation_gram"] += total[:, :, None] * total[:, None, :] / weight[:, None, None]
        layers[key] = replace(layer, **drawn)
    return replace(stats, layers=layers)


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
        source=source,
        family="toy_moe",
        fingerprint=f"print-of-{source}",
        nbytes=routed + 5000,
        params=routed // 2 + 2500,
        layers=facts,
    )


def stats_of(layers: Mapping[str, Routes], **facts: object) -> Stats:
    """Return the statistics of a model with these layers."""
    made = facts_of(layers, **facts)  # type: ignore[arg-type]
    return Stats(made, {"sources": ["synthetic"]}, {key: sums_of(routes) for key, routes in layers.items()})
