"""Rungs: what each expert could become, what it would lose and take there, and what no choice can fall below.

With a price on each byte every expert is best off by itself, and the sum of what is lost then bounds what any choice of
as many bytes loses (Everett 1963, generalised Lagrange multipliers). Letter: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from understudy.entries import Entry
from understudy.facts import LayerFacts
from understudy.kinds.low_rank import LOW_RANK
from understudy.methods import Problem
from understudy.selection import Channels, free_in, lost_by_width
from understudy.stats import ExpertStats

_HALVINGS = 64  # of the interval that the price of a byte lies in
_DEAREST = 1e300  # at which every expert takes the least that it can


@dataclass(frozen=True)
class Rungs:
    """What each expert of a layer could be: what it would lose and what it would take, float64 `[E, n]`.

    The first `I + 1` are its numbers of neurons from 0 up to all, the others its ranks. `free` says which experts may
    be touched, `[E]`.
    """

    lost: np.ndarray
    taken: np.ndarray
    ranks: tuple[int, ...]
    free: np.ndarray

    @property
    def width(self) -> int:
        """Neurons of a whole expert."""
        return self.lost.shape[1] - len(self.ranks) - 1

    def at(self, price: float) -> np.ndarray:
        """Return the rung of each expert that is best at a price of a byte, `[E]`; of what stays, the whole."""
        return np.where(self.free, (self.lost + price * self.taken).argmin(1), self.width)

    def of(self, widths: Mapping[int, int], ranks: Mapping[int, int]) -> np.ndarray:
        """Return the rungs that entries of a plan put experts on, `[E]`."""
        found = np.full(len(self.lost), self.width)
        for expert, width in widths.items():
            found[expert] = width
        for expert, rank in ranks.items():
            found[expert] = self.width + 1 + self.ranks.index(rank)
        return found

    def sums(self, rungs: np.ndarray) -> tuple[float, float]:
        """Return what is lost and what is taken on these rungs `[E]`."""
        rows = np.arange(len(rungs))
        return float(self.lost[rows, rungs].sum()), float(self.taken[rows, rungs].sum())


def rungs_of(problem: Problem, scores: Channels, ranks: tuple[int, ...] = ()) -> dict[str, Rungs]:
    """Say what the experts of each layer could be: some neurons and a constant, or an affine map of one of the ranks.

    The share of its error that a map leaves is told by tokens that it was not fitted on (`affine_gain`), in the plain
    metric of the layer's output; the error itself, with a constant alone, is that of all neurons in the score's metric.
    """
    found = {}
    for key, layer in problem.layers.items():
        found[key] = _rungs(layer, problem.stats.layers[key], scores[key], ranks, free_in(problem, key))
    return found


def _rungs(layer: LayerFacts, stats: ExpertStats, score: np.ndarray, ranks: tuple[int, ...], free: np.ndarray) -> Rungs:
    E, width = score.shape
    lost = lost_by_width(np.maximum(score, 0))
    vector = layer.hidden * layer.element_bytes
    rest = layer.expert_bytes - width * layer.channel_bytes
    taken = np.tile(np.arange(width + 1.0) * layer.channel_bytes + rest + vector, (E, 1))
    taken[:, 0], taken[:, width] = vector, layer.expert_bytes
    if ranks:
        ranks = tuple(r for r in ranks if r <= np.shape(stats.affine_gain)[1])
        error = np.asarray(stats.affine_error, np.float64)
        gained = np.cumsum(stats.affine_gain, axis=1)[:, [r - 1 for r in ranks]]
        share = 1 - gained / np.where(error > 0, error, np.inf)[:, None]

        bytes_of = [[LOW_RANK.stored_bytes(layer, {0: r}) for r in ranks]] * E
        lost = np.concatenate((lost, lost[:, :1] * np.clip(share, 0, 1)), 1)
        taken = np.concatenate((taken, np.array(bytes_of, np.float64)), 1)
    return Rungs(lost, taken, ranks, free)


def prices(rungs: Mapping[str, Rungs], most: float) -> tuple[float, float]:
    """Return the price of a byte at which all take more than `most`, and one, next to it, at which they do not.

    They are 0 both where it takes no price, and both the dearest there is where no price suffices.
    """

    def takes(price: float) -> float:
        return sum(x.sums(x.at(price))[1] for x in rungs.values())

    low, high = 0.0, 1.0
    if takes(low) <= most:
        return low, low
    while takes(high) > most and high < _DEAREST:
        low, high = high, high * 1e3
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if takes(middle) > most else (low, middle)
    return low, high


def beyond_least(rungs: Mapping[str, Rungs], chosen: Mapping[str, Mapping[str, Entry]]) -> float:
    """Return how much more a choice loses than the bound on all choices of as many bytes, as a share of the bound.

    Args:
        rungs: by layer.
        chosen: entries of kinds `slim` and `low_rank`, by layer; a layer without any stays whole.
    """
    lost = taken = bound = 0.0
    for key, x in rungs.items():
        entries = chosen.get(key, {})
        here = x.sums(x.of(dict(entries.get("slim", {})), dict(entries.get("low_rank", {}))))  # type: ignore[arg-type]
        lost, taken = lost + here[0], taken + here[1]
    price = prices(rungs, taken)[1]
    for x in rungs.values():
        least, bytes_ = x.sums(x.at(price))
        bound += least + price * bytes_
    bound -= price * taken
    return lost / bound - 1 if bound > 0 else 0.0
