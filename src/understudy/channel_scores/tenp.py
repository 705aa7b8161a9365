"""TENP: how far a channel's contribution goes along with the output of its expert."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import ChannelScore, column
from understudy.scores import Context, per
from understudy.stats import ExpertStats


def tenp(stats: ExpertStats, context: Context) -> np.ndarray:
    """Take the mean projection of the contribution on the output; channels that work against it are negative."""
    return per(stats.projection_sum, column(stats.count))


TENP = ChannelScore(
    name="tenp",
    source="TENP, arXiv 2606.09885: mean over routed tokens of <h w, y> / |y|",
    needs=("count", "projection_sum"),
    compute=tenp,
)
