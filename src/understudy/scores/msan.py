"""MSAN: as MAN, with the norm squared, so that rare large outputs count more."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats


def msan(stats: ExpertStats, context: Context) -> np.ndarray:
    """Average the squared output norm over the routed tokens."""
    return per(stats.norm_sq_sum, stats.count)


MSAN = Score(
    name="msan",
    source="mean squared activation norm (MSAN), arXiv 2606.15716: mean of |y|^2 over the tokens routed to the expert",
    needs=("count", "norm_sq_sum"),
    compute=msan,
)
