"""Ladder: neurons chosen by what remains after a refit, over the whole model; a constant for what goes."""

from __future__ import annotations

from understudy.channel_scores import get_channel_score, score_channels
from understudy.channel_scores.obs import OBS, OBS_PLAIN
from understudy.methods import Choice, Method, Problem
from understudy.selection import by_rank, choose_widths

_CLASSES = 8  # widths in a layer: each is a set of matrix products of its own


def ranked(problem: Problem, ratio: float, score: str) -> Choice:
    """Remove the lowest neurons of the whole model, as far as the ratio asks after the constants are paid for."""
    scores = score_channels(get_channel_score(score), problem.stats, problem.layers, problem.settings)
    widths = by_rank(problem, scores, ratio, constant=True)
    return choose_widths(problem, scores, widths, score, constant=True, refit=True, classes=_CLASSES)


LADDER = Method(
    name="ladder",
    kind="slim",
    kinds=("slim",),
    choose=lambda problem, ratio: ranked(problem, ratio, "obs"),
    needs=OBS.needs,
    paper="ours: neurons chosen by what remains after a refit (optimal brain surgeon), one budget",
)
LADDER_PLAIN = Method(
    name="ladder_plain",
    kind="slim",
    kinds=("slim",),
    choose=lambda problem, ratio: ranked(problem, ratio, "obs_plain"),
    needs=OBS_PLAIN.needs,
    paper="ours: ladder without gradients of the loss; squared errors of layers count alike",
)
