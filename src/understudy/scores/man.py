"""MAN: an expert is spared when its outputs are large on average, however often it is chosen."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats


def man(stats: ExpertStats, context: Context) -> np.ndarray:
    """Average the output norm over the routed tokens."""
    return per(stats.norm_sum, stats.count)


MAN = Score(
    name="man",
    source="mean activation norm (MAN), arXiv 2606.15716: mean of |y| over the tokens routed to the expert",
    needs=("count", "norm_sum"),
    compute=man,
)
