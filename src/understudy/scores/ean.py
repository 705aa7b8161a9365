"""EAN: an expert is spared when its activations are large, whatever its gate."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score
from understudy.stats import ExpertStats


def ean(stats: ExpertStats, context: Context) -> np.ndarray:
    """Sum the output norm over the routed tokens."""
    return np.asarray(stats.norm_sum)


EAN = Score(
    name="ean",
    source="expert activation norm, MC-Suite, arXiv 2504.05586: sum of |y| over the tokens routed to the expert",
    needs=("norm_sum",),
    compute=ean,
)
