"""FLAP for experts: steady channels go, and a constant stands for what they added."""

from __future__ import annotations

from understudy.channel_scores import score_channels
from understudy.channel_scores.flap import FLAP as SCORE
from understudy.methods import Choice, Method, Problem
from understudy.selection import by_rank, choose_widths


def choose(problem: Problem, ratio: float) -> Choice:
    """Remove the lowest channels of the whole model, as far as the ratio asks after the constants are paid for."""
    scores = score_channels(SCORE, problem.stats, problem.layers, problem.settings)
    widths = by_rank(problem, scores, ratio, constant=True)
    return choose_widths(problem, scores, widths, SCORE.name, constant=True)


FLAP = Method(
    name="flap",
    kind="slim",
    kinds=("slim",),
    choose=choose,
    needs=SCORE.needs,
    paper="FLAP: fluctuation-based adaptive structured pruning, arXiv 2312.11983, for dense models; here for experts",
)
