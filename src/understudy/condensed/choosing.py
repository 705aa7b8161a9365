"""Which few experts, with which constant weights, stand for a whole layer: choices from sums, without a run.

A condensed layer puts out sum_S w_e y_e for every token. That is linear in the outputs of its experts, so that the
inner products of the group `candidates` give its squared distance to the routed output for every set and all weights.

Letters: E experts, M sets, s experts of a set; y_e what expert e puts out before its gate, r what the routed put out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.sums import ExpertStats

Weigh = Callable[[np.ndarray], np.ndarray]  # sets of ids [M, s] to their weights [M, s]
Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]  # sets and weights to a number each, lower is better, [M]
SUM_NEEDS = ("count", "gate_sum", "candidate_gram", "candidate_dot", "candidate_sq", "candidate_scale")
_LEAST = 1e-10  # of the largest eigenvalue: what is below is a combination of experts that puts out nothing


@dataclass(frozen=True)
class Chosen:
    """Experts of one layer in the order in which they were taken, their weights, and the criterion after each."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    path: tuple[float, ...] = ()

    @property
    def by_id(self) -> dict[int, float]:
        """Weights by expert."""
        return dict(zip(self.ids, self.weights, strict=True))

    def entry(self, experts: int) -> dict[int, float]:
        """Return what a plan lists: the weight of every expert of the layer, 0 for those that go."""
        return dict.fromkeys(range(experts), 0.0) | self.by_id


@dataclass(frozen=True)
class Products:
    """Inner products of what a layer's experts put out, in float64."""

    gram_EE: np.ndarray  # <y_i, y_j>
    dot_E: np.ndarray  # <y_e, r>
    square: float  # |r|^2
    scale: float  # what errors are relative to

    @classmethod
    def of(cls, sums: Mapping[str, np.ndarray] | ExpertStats) -> Products:
        """Take them from statistics, or from what their collector returns."""
        get = sums.__getitem__ if isinstance(sums, Mapping) else lambda name: getattr(sums, name)
        gram_EE, dot_E = (np.asarray(get(f"candidate_{name}"), np.float64) for name in ("gram", "dot"))
        return cls(gram_EE, dot_E, float(get("candidate_sq")), float(get("candidate_scale")))

    def error(self, sets_Ms: np.ndarray, weights_Ms: np.ndarray) -> np.ndarray:
        """Return the squared distance of each set from the routed output, `[M]`."""
        gram_Mss = self.gram_EE[sets_Ms[:, :, None], sets_Ms[:, None, :]]
        both_M = np.einsum("ms,mst,mt->m", weights_Ms, gram_Mss, weights_Ms)
        return np.maximum(self.square - 2 * (weights_Ms * self.dot_E[sets_Ms]).sum(1) + both_M, 0)

    def fitted(self, sets_Ms: np.ndarray) -> np.ndarray:
        """Return the weights of each set that come nearest to the routed output, least squares, `[M, s]`.

        Of experts that say the same, the smallest weights that do it.
        """
        length_E = np.sqrt(np.maximum(np.diag(self.gram_EE), 0))
        length_Ms = np.where(length_E > 0, length_E, 1)[sets_Ms]
        gram_Mss = self.gram_EE[sets_Ms[:, :, None], sets_Ms[:, None, :]]
        gram_Mss = gram_Mss / (length_Ms[:, :, None] * length_Ms[:, None, :])
        inverse_Mss = np.linalg.pinv(gram_Mss, rcond=_LEAST, hermitian=True)
        return np.einsum("mst,mt->ms", inverse_Mss, self.dot_E[sets_Ms] / length_Ms) / length_Ms

    def relative(self, chosen: Chosen) -> float:
        """Return the relative L2 error of what the layer then puts out."""
        error = self.error(np.array([chosen.ids], np.int64), np.array([chosen.weights], np.float64))
        return float(np.sqrt(error[0] / self.scale)) if self.scale > 0 else 0.0


def mean_gates(stats: ExpertStats) -> np.ndarray:
    """Return the mean gate of each expert over the tokens that chose it, `[E]`; 0 where none did (METHODS 4.2).

    The conditional mean: sum of gates over number of routes, not over all tokens.
    """
    count, total = np.asarray(stats.count, np.float64), np.asarray(stats.gate_sum, np.float64)
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def weighing(weights: str, gates_E: np.ndarray, products: Products | None) -> tuple[Weigh, list[int]]:
    """Return how sets are weighted, `mean` gates or `fitted` by products, and which experts can be in one.

    Without a gate, or where it puts out nothing, an expert cannot.
    """
    if weights == "fitted":
        assert products is not None
        return products.fitted, np.flatnonzero(np.diag(products.gram_EE) > 0).tolist()
    return lambda sets_Ms: gates_E[sets_Ms], np.flatnonzero(gates_E).tolist()


def greedy(candidates: Sequence[int], count: int, weigh: Weigh, measure: Measure, beam: int = 1) -> Chosen:
    """Take one expert after the other, each time the one with which the criterion is lowest (METHODS 4.4).

    With `beam` 1 the order is that of importance: fewer experts are a prefix. With more, that many sets are held from
    one round to the next. Of equals, the lower ids.
    """
    held: list[tuple[tuple[int, ...], tuple[float, ...]]] = [((), ())]
    weights: tuple[float, ...] = ()
    for _ in range(min(count, len(candidates))):
        grown: dict[frozenset[int], tuple[tuple[int, ...], tuple[float, ...]]] = {}
        for ids, path in held:
            for expert in candidates:
                if expert not in ids:
                    grown.setdefault(frozenset((*ids, expert)), ((*ids, expert), path))
        sets_Ms = np.array([ids for ids, _ in grown.values()])
        weights_Ms = weigh(sets_Ms)
        values_M = measure(sets_Ms, weights_Ms)
        found = list(grown.values())
        best = sorted(range(len(found)), key=lambda m: (values_M[m], found[m][0]))[:beam]
        held = [(found[m][0], (*found[m][1], float(values_M[m]))) for m in best]
        weights = tuple(weights_Ms[best[0]].tolist())
    return Chosen(held[0][0], weights, held[0][1])


def from_sums(stats: ExpertStats, keep: int, weights: str = "mean", beam: int = 1) -> Chosen:
    """Choose the experts of one layer by their squared distance from the routed output."""
    products = Products.of(stats)
    weigh, candidates = weighing(weights, mean_gates(stats), products)
    return greedy(candidates, keep, weigh, products.error, beam)


def removed(layer: LayerFacts, chosen: Chosen) -> int:
    """Return the bytes of routed experts that go with the others of a layer."""
    return (layer.experts - sum(w != 0 for w in chosen.weights)) * layer.expert_bytes


def fewest(order: Iterable[str], enough: Callable[[list[str]], bool], wanted: str) -> list[str]:
    """Take layers in order until there are enough.

    Raises:
        PlanError: all of them are not.
    """
    taken: list[str] = []
    for key in order:
        if enough(taken):
            return taken
        taken.append(key)
    if not enough(taken):
        raise PlanError(f"{wanted} is out of reach with {len(taken)} layers condensed; keep fewer experts")
    return taken
