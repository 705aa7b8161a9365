"""TENP: the most important experts stay whole, the neurons of the others are pruned to one width."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import score_channels
from understudy.channel_scores.tenp import TENP as SCORE
from understudy.methods import Choice, Method, Problem
from understudy.selection import choose_widths, in_two_tiers

_RATIOS, _WHOLE = (0.40, 0.70), (0.25, 0.05)  # share of experts that stay whole at these ratios, a line through them
_SLOPE = 0.5  # the last layer has this much more than the mean of whole experts, the first this much less


def choose(problem: Problem, ratio: float) -> Choice:
    """Give each layer the same budget, and deep layers more of their experts whole than shallow ones.

    How the paper's trapezoid slopes over the depth is not known; here it is a line. The paper adds importance up over
    domains, each normalised; here it is over all tokens.
    """
    scores = score_channels(SCORE, problem.stats, problem.layers, problem.settings)
    importance = {key: np.asarray(problem.stats.layers[key].towards_sum, np.float64) for key in problem.layers}
    whole = whole_experts([layer.experts for layer in problem.layers.values()], ratio)
    protected = dict(zip(problem.layers, whole, strict=True))
    return choose_widths(problem, scores, in_two_tiers(problem, importance, protected, ratio), SCORE.name)


def whole_experts(experts: list[int], ratio: float) -> list[int]:
    """How many of the experts of each layer, first to last, stay whole at a ratio."""
    (a, b), (at_a, at_b) = _RATIOS, _WHOLE
    share = max(0.0, at_a + (ratio - a) * (at_b - at_a) / (b - a))
    slope = np.linspace(1 - _SLOPE, 1 + _SLOPE, len(experts)) if len(experts) > 1 else np.ones(1)
    return [min(n, round(n * share * s)) for n, s in zip(experts, slope.tolist(), strict=True)]


TENP = Method(
    name="tenp",
    kind="slim",
    kinds=("slim",),
    choose=choose,
    needs=("towards_sum", *SCORE.needs),
    paper="TENP: two-tier expert neuron pruning, arXiv 2606.09885",
)
