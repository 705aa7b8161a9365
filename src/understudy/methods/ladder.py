"""Ladder: neurons chosen by what remains after a refit, over the whole model; a constant for what goes."""

from __future__ import annotations

from functools import partial

import numpy as np

from understudy.channel_scores import get_channel_score, score_channels
from understudy.channel_scores.obs import OBS, OBS_PLAIN
from understudy.entries import Entry
from understudy.methods import Choice, Method, Problem
from understudy.rungs import beyond_least, rungs_of
from understudy.selection import Channels, Widths, by_layer, by_rank, choose_widths

CLASSES = 8  # widths in a layer: each is a set of matrix products of its own
SHARE = 1 / 8  # of the blocks for gradients: a moment of each layer needs no more
_CLOSE = 1 - 1e-9  # a ratio that is a whole number of experts but for rounding takes no further one


def ranked(problem: Problem, ratio: float, score: str) -> Choice:
    """Remove the lowest neurons of the whole model, as far as the ratio asks after the constants are paid for.

    With `--scope layer` the same share of each layer; with `--kind constant` whole experts or none of their neurons,
    which stock engines read.
    """
    scores = score_channels(get_channel_score(score), problem.stats, problem.layers, problem.settings)
    if problem.kind.name == "constant":
        return _whole_experts(problem, scores, ratio, score)
    spread = by_layer if problem.settings.scope == "layer" else by_rank
    widths: Widths = spread(problem, scores, ratio, constant=True)
    return choose_widths(problem, scores, widths, score, constant=True, refit=True, classes=CLASSES)


def judge(problem: Problem, choice: Choice, score: str, ranks: tuple[int, ...] = ()) -> tuple[str, ...]:
    """Say how far a choice is from the best there could be; where each layer has its share, the farthest of them."""
    if not choice.layers or problem.kind.name == "constant":
        return ()
    scores = score_channels(get_channel_score(score), problem.stats, problem.layers, problem.settings)
    rungs = rungs_of(problem, scores, ranks)
    parts = [{key: rungs[key]} for key in choice.layers] if problem.settings.scope == "layer" else [rungs]
    most = max(beyond_least(part, {key: choice.layers[key] for key in part if key in choice.layers}) for part in parts)
    each = " in each layer" if len(parts) > 1 else ""
    return (f"by its score it loses at most {most:.1%} more than any choice of as many bytes{each} must",)


def _whole_experts(problem: Problem, scores: Channels, ratio: float, score: str) -> Choice:
    """Replace the experts by their constants that lose least for each byte; each layer keeps its best."""
    candidates: list[tuple[float, str, int, int]] = []
    wanted = 0.0
    for key, layer in problem.layers.items():
        lost_E, freed = scores[key].sum(1), layer.expert_bytes - layer.hidden * layer.element_bytes
        wanted += ratio * layer.experts * layer.expert_bytes * _CLOSE
        stay = problem.protected.get(key, frozenset()) or {int(np.argmax(lost_E))}
        candidates += [(float(lost_E[e]) / freed, key, e, freed) for e in range(layer.experts) if e not in stay]
    gone: dict[str, list[int]] = {}
    for _, key, expert, freed in sorted(candidates):
        if wanted <= 0:
            break
        gone.setdefault(key, []).append(expert)
        wanted -= freed
    layers: dict[str, dict[str, Entry]] = {
        key: {"slim": dict.fromkeys(sorted(gone[key]), 0)} for key in problem.layers if key in gone
    }
    return Choice(layers, {"slim": {"order": score, "constant": True, "refit": True}} if layers else {})


LADDER = Method(
    name="ladder",
    kind="slim",
    kinds=("slim", "constant"),
    scopes=("model", "layer"),
    choose=partial(ranked, score="obs"),
    judge=partial(judge, score="obs"),
    needs=OBS.needs,
    gradients=SHARE,
    paper="ours: neurons chosen by what remains after a refit (optimal brain surgeon), one budget",
)
LADDER_PLAIN = Method(
    name="ladder_plain",
    kind="slim",
    kinds=("slim", "constant"),
    scopes=("model", "layer"),
    choose=partial(ranked, score="obs_plain"),
    judge=partial(judge, score="obs_plain"),
    needs=OBS_PLAIN.needs,
    paper="ours: ladder without gradients of the loss; squared errors of layers count alike",
)
