"""Frequency: an expert is spared when it is chosen often."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats


def frequency(stats: ExpertStats, context: Context) -> np.ndarray:
    """Return the share of tokens that chose the expert."""
    return per(stats.count, stats.tokens)


FREQUENCY = Score(
    name="frequency",
    source="expert frequency, the baseline of arXiv 2510.13999 and others: routes / tokens",
    needs=("tokens", "count"),
    compute=frequency,
)
