"""HEAPr: channels of experts pruned over the whole model by what the loss would lose to second order."""

from __future__ import annotations

from understudy.channel_scores import get_channel_score, score_channels
from understudy.channel_scores.heapr import HEAPR as SCORE
from understudy.methods import Choice, Method, Problem
from understudy.selection import by_rank, choose_widths


def ranked(problem: Problem, ratio: float, score: str) -> Choice:
    """Rank the channels of all layers together by a channel score and remove the lowest; no floor for an expert."""
    scores = score_channels(get_channel_score(score), problem.stats, problem.layers, problem.settings)
    return choose_widths(problem, scores, by_rank(problem, scores, ratio), score)


HEAPR = Method(
    name="heapr",
    kind="slim",
    kinds=("slim",),
    choose=lambda problem, ratio: ranked(problem, ratio, "heapr"),
    needs=SCORE.needs,
    paper="HEAPr: Hessian-based efficient atomic expert pruning in output space, arXiv 2509.22299",
)
