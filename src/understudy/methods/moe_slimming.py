"""MoE-Slimming: channels by their size in the expert, experts by their effect, layers by their sensitivity."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import score_channels
from understudy.channel_scores.moe_slimming import MOE_SLIMMING as SCORE
from understudy.methods import Choice, Method, Problem
from understudy.scores import per
from understudy.selection import by_coverage, choose_widths

_ROUNDS = 4  # of root and clipping, as in the paper's code (a comment there says 2)


def choose(problem: Problem, ratio: float) -> Choice:
    """Spread the channels over layers and experts by coverage (METHODS 10.3), without rounding to multiples.

    An expert's importance is its attribution over all tokens, negative ones counting as 0.
    """
    scores = score_channels(SCORE, problem.stats, problem.layers, problem.settings)
    sums = {key: problem.stats.layers[key] for key in problem.layers}
    importance = {key: np.maximum(per(s.attribution_sum, s.tokens), 0) for key, s in sums.items()}
    sensitivity = tempered(np.array([float(s.local_loss_sum) / float(s.tokens) for s in sums.values()]))
    by_key = dict(zip(sums, sensitivity.tolist(), strict=True))
    widths = by_coverage(problem, scores, by_key, importance, ratio)
    return choose_widths(problem, scores, widths, SCORE.name)


def tempered(losses: np.ndarray) -> np.ndarray:
    """Turn the mean local loss of each layer into a sensitivity near 1: roots, clipped to one deviation of the mean."""
    values = np.maximum(losses, 0)
    for _ in range(_ROUNDS):
        values = np.sqrt(values)
        middle, deviation = values.mean(), values.std()
        values = np.clip(values, middle - deviation, middle + deviation)
    return values / values.mean() if values.min() > 0 else np.ones_like(values)


MOE_SLIMMING = Method(
    name="moe_slimming",
    kind="slim",
    kinds=("slim",),
    choose=choose,
    needs=("tokens", "attribution_sum", "local_loss_sum", *SCORE.needs),
    paper="MoE-Slimming: attribution-guided coverage-based channel slimming, arXiv 2606.18304",
)
