"""CAMERA-P: micro-experts of a layer pruned together by the energy that they add to its output."""

from __future__ import annotations

from understudy.channel_scores import score_channels
from understudy.channel_scores.camera import CAMERA as SCORE
from understudy.methods import Choice, Method, Problem
from understudy.selection import by_layer, choose_widths


def choose(problem: Problem, ratio: float) -> Choice:
    """Remove the lowest channels of each layer, the same share of every layer.

    Shared experts are not in the pool, unlike in the paper's code for families that have them.
    """
    scores = score_channels(SCORE, problem.stats, problem.layers, problem.settings)
    return choose_widths(problem, scores, by_layer(problem, scores, ratio), SCORE.name)


CAMERA = Method(
    name="camera",
    kind="slim",
    kinds=("slim",),
    choose=choose,
    needs=SCORE.needs,
    sequential=True,
    paper="CAMERA: multi-matrix joint compression for MoE models via micro-expert redundancy, arXiv 2508.02322",
)
