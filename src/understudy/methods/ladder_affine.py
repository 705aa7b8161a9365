"""Ladder with a rung more: experts that become affine maps of low rank, where these lose less than neurons of as many
bytes; for small budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from understudy.channel_scores import get_channel_score, score_channels
from understudy.channel_scores.obs import OBS
from understudy.facts import LayerFacts
from understudy.kinds import get_kind
from understudy.methods import Choice, Method, Problem
from understudy.methods.ladder import CLASSES
from understudy.selection import Channels, by_rank, choose_widths
from understudy.stats import ExpertStats
from understudy.sums import RANKS

_RUNGS = tuple(r for r in (2, 4, 8, 16, 32) if r <= RANKS)  # ranks; each is a module of its own
_HALVINGS = 100  # of the interval that the price of a byte lies in
_DEAREST = 1e300  # at which every expert takes the least that it can


@dataclass(frozen=True)
class _Options:
    """What each expert of a layer could be: what it would lose and what it would take, float64 `[E, n]`.

    The first `I + 1` are its numbers of neurons from 0 up to all, the others its ranks.
    """

    lost: np.ndarray
    taken: np.ndarray
    ranks: tuple[int, ...]

    def at(self, price: float) -> np.ndarray:
        """Return the option of each expert that is best at a price of a byte, `[E]`."""
        return np.asarray((self.lost + price * self.taken).argmin(1))


def ranked(problem: Problem, ratio: float, score: str) -> Choice:
    """Find by the price of a byte which experts are better off as maps, and remove the lowest neurons of the others.

    At a price, each expert takes what costs least in all; the price is such that the ratio is met. Then the experts
    that take a map have it, and the neurons of the others go as in `ladder`, to the byte that the ratio asks for. With
    `--scope layer` each layer has a price of its own.
    """
    scores = score_channels(get_channel_score(score), problem.stats, problem.layers, problem.settings)
    keys = [[key] for key in problem.layers] if problem.settings.scope == "layer" else [list(problem.layers)]
    parts = [replace(problem, layers={key: problem.layers[key] for key in some}) for some in keys]
    chosen = [_together(part, {key: scores[key] for key in part.layers}, ratio, score) for part in parts]
    layers = {key: entries for choice in chosen for key, entries in choice.layers.items()}
    count = sum(len(entries.get("low_rank", {})) for entries in layers.values())
    notes = [note for choice in chosen for note in choice.notes]
    how = next((choice.how for choice in chosen if choice.how), {})
    said = [f"{count} experts become affine maps of low rank"] if count else []
    return Choice(layers, how, notes=tuple(dict.fromkeys(said + notes)))


def _together(problem: Problem, scores: Channels, ratio: float, score: str) -> Choice:
    """Choose for layers that share one price."""
    options = {key: _options(layer, problem.stats.layers[key], scores[key]) for key, layer in problem.layers.items()}
    maps = {key: chosen for key, chosen in _maps(problem, options, ratio).items() if chosen}
    kind = get_kind("low_rank")
    freed = -sum(kind.added_bytes(problem.layers[key], chosen) for key, chosen in maps.items())
    inside = sum(x.experts * (x.width or 0) * x.channel_bytes for x in problem.layers.values())
    protected = {key: problem.protected.get(key, frozenset()) | maps.get(key, {}).keys() for key in problem.layers}
    others = replace(problem, protected=protected)
    left = max(ratio - freed / inside, 0.0)
    widths = by_rank(others, _with_one(scores, maps), left, constant=True)
    slim = choose_widths(others, scores, widths, score, constant=True, refit=True, classes=CLASSES)
    layers = {
        key: slim.layers.get(key, {}) | ({"low_rank": dict(sorted(maps[key].items()))} if key in maps else {})
        for key in problem.layers
        if key in maps or key in slim.layers
    }
    return replace(
        slim, layers=layers, notes=tuple(n for n in slim.notes if not layers or not n.startswith("the ratio"))
    )


def _options(layer: LayerFacts, stats: ExpertStats, score: np.ndarray) -> _Options:
    """Say what the experts of a layer could be.

    The share of its error that a map leaves is told by tokens that it was not fitted on (`affine_gain`), in the plain
    metric of the layer's output; the error itself, with a constant alone, is that of all neurons in the score's metric.
    """
    E, width = score.shape
    lowest = np.sort(np.maximum(score, 0), axis=1)
    lost = np.concatenate((np.zeros((E, 1)), np.cumsum(lowest, axis=1)), axis=1)[:, ::-1]  # by neurons that stay
    vector = layer.hidden * layer.element_bytes
    rest = layer.expert_bytes - width * layer.channel_bytes
    taken = np.tile(np.arange(width + 1.0) * layer.channel_bytes + rest + vector, (E, 1))
    taken[:, 0], taken[:, width] = vector, layer.expert_bytes
    ranks = tuple(r for r in _RUNGS if r <= np.shape(stats.affine_gain)[1])
    error = np.asarray(stats.affine_error, np.float64)
    gained = np.cumsum(stats.affine_gain, axis=1)[:, [r - 1 for r in ranks]]
    share = 1 - gained / np.where(error > 0, error, np.inf)[:, None]
    maps = lost[:, :1] * np.clip(share, 0, 1)
    bytes_of = [[(2 * r + 1) * vector for r in ranks]] * E
    return _Options(np.concatenate((lost, maps), 1), np.concatenate((taken, bytes_of), 1), ranks)


def _maps(problem: Problem, options: dict[str, _Options], ratio: float) -> dict[str, dict[int, int]]:
    """Return the rank of each expert that is better off as a map, by layer; each layer keeps its best for neurons."""
    free = {key: sorted(set(range(x.experts)) - problem.protected.get(key, set())) for key, x in problem.layers.items()}
    most = sum(x.experts * x.expert_bytes for x in problem.layers.values()) * (1 - ratio)
    most -= sum((x.experts - len(free[key])) * x.expert_bytes for key, x in problem.layers.items())

    def takes(price: float) -> float:
        return sum(float(x.taken[free[key], x.at(price)[free[key]]].sum()) for key, x in options.items())

    low, high = 0.0, 1.0
    if takes(low) <= most:
        return {}
    while takes(high) > most and high < _DEAREST:
        low, high = high, high * 1e3
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if takes(middle) > most else (low, middle)
    found: dict[str, dict[int, int]] = {}
    wanted = takes(low) - most  # what experts that are indifferent at this price still have to free, the first ones
    for key, x in options.items():
        cheap, dear, neurons = x.at(low), x.at(high), x.lost.shape[1] - len(x.ranks)
        best, found[key] = int(x.lost[:, 0].argmax()), {}
        for e in free[key]:
            at = dear[e] if wanted > 0 else cheap[e]
            wanted -= float(x.taken[e, cheap[e]] - x.taken[e, at])
            if at >= neurons and e != best:
                found[key][e] = x.ranks[at - neurons]
    return found


def _with_one(scores: Channels, maps: dict[str, dict[int, int]]) -> Channels:
    """Make the best neuron of a layer with maps the last to go: some expert has to keep weights of its own."""
    found = {}
    for key, score in scores.items():
        found[key] = score = score.copy()
        others = [e for e in range(len(score)) if e not in maps.get(key, {})]
        if key in maps:
            place = others[int(score[others].max(1).argmax())]
            score[place, score[place].argmax()] = np.inf
    return found


LADDER_AFFINE = Method(
    name="ladder_affine",
    kind="slim",
    kinds=("slim",),
    scopes=("model", "layer"),
    choose=partial(ranked, score="obs"),
    needs=(*OBS.needs, "affine_gain", "affine_error", "affine_in", "affine_out", "affine_mean"),
    paper="ours: ladder, or affine maps of low rank by weighted reduced-rank regression, whichever loses less a byte",
)
