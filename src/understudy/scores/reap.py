"""REAP: an expert is spared when what it adds to the stream, gate included, is large."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats


def reap(stats: ExpertStats, context: Context) -> np.ndarray:
    """Average the gated output norm over the routed tokens."""
    return per(stats.gated_norm_sum, stats.count)


REAP = Score(
    name="reap",
    source="REAP, arXiv 2510.13999: mean of g |y| over the tokens routed to the expert",
    needs=("count", "gated_norm_sum"),
    compute=reap,
)
