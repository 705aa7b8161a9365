"""Ladder with a rung more: experts that become affine maps of low rank, where these lose less than neurons of as many
bytes; for small budgets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from understudy.channel_scores import get_channel_score, score_channels
from understudy.channel_scores.obs import OBS
from understudy.kinds import get_kind
from understudy.methods import Choice, Method, Problem
from understudy.methods.ladder import CLASSES, SHARE, judge
from understudy.rungs import Rungs, prices, rungs_of
from understudy.selection import Channels, by_rank, choose_widths
from understudy.sums import RANKS

RANKS_TRIED = tuple(r for r in (2, 4, 8, 16, 32) if r <= RANKS)  # each is a module of its own


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
    notes = [f"layer {part[0]}: {note}" if len(keys) > 1 else note for part, c in zip(keys, chosen) for note in c.notes]
    how = next((choice.how for choice in chosen if choice.how), {})
    said = [f"{count} experts become affine maps of low rank"] if count else []
    return Choice(layers, how, notes=tuple(dict.fromkeys(said + notes)))


def _together(problem: Problem, scores: Channels, ratio: float, score: str) -> Choice:
    """Choose for layers that share one price."""
    rungs = rungs_of(problem, scores, RANKS_TRIED)
    maps = {key: chosen for key, chosen in _maps(problem, rungs, ratio).items() if chosen}
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
    notes = [note for note in slim.notes if not layers or not note.startswith("the ratio")]
    return replace(slim, layers=layers, notes=tuple(notes))


def _maps(problem: Problem, rungs: dict[str, Rungs], ratio: float) -> dict[str, dict[int, int]]:
    """Return the rank of each expert that is better off as a map, by layer; each layer keeps its best for neurons."""
    most = sum(x.experts * x.expert_bytes for x in problem.layers.values()) * (1 - ratio)
    low, high = prices(rungs, most)
    wanted = sum(x.sums(x.at(low))[1] for x in rungs.values()) - most
    found: dict[str, dict[int, int]] = {}
    for key, x in rungs.items():
        cheap, dear = x.at(low), x.at(high)  # experts that differ in them are indifferent: the first go, as needed
        best, found[key] = int(x.lost[:, 0].argmax()), {}
        for e in np.flatnonzero(x.free).tolist():
            at = int(dear[e] if wanted > 0 else cheap[e])
            wanted -= float(x.taken[e, cheap[e]] - x.taken[e, at])
            if at > x.width and e != best:
                found[key][e] = x.ranks[at - x.width - 1]
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
    judge=partial(judge, score="obs", ranks=RANKS_TRIED),
    gradients=SHARE,
    needs=(*OBS.needs, "affine_gain", "affine_error", "affine_in", "affine_out", "affine_mean"),
    paper="ours: ladder, or affine maps of low rank by weighted reduced-rank regression, whichever loses less a byte",
)
