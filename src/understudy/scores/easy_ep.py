"""EASY-EP: an expert is spared when it adds much to tokens that the routed experts turn to another direction."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score
from understudy.stats import ExpertStats


def easy_ep(stats: ExpertStats, context: Context) -> np.ndarray:
    """Sum the gated output norm, weighted by how far the token's hidden state turned."""
    return np.asarray(stats.shift_norm_sum)


EASY_EP = Score(
    name="easy_ep",
    source="EASY-EP, arXiv 2504.06792: sum of s g |y|, s = max(0, 1 - cos(x, x + the routed experts' output))",
    needs=("shift_norm_sum",),
    compute=easy_ep,
)
