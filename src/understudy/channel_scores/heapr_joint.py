"""The Fisher information of a mask on each channel: HEAPr without taking activation and gradient as independent."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import ChannelScore, column
from understudy.channel_scores.heapr import UNSEEN
from understudy.scores import Context, per
from understudy.stats import ExpertStats


def heapr_joint(stats: ExpertStats, context: Context) -> np.ndarray:
    """Take the mean square of activation times gradient over the routed tokens."""
    n = column(stats.count)
    return np.where(n > 0, per(stats.effect_sq_sum, column(stats.gradient_count)), UNSEEN)


HEAPR_JOINT = ChannelScore(
    name="heapr_joint",
    source="a variant of HEAPr, arXiv 2509.22299, with one mean in place of two: mean((h d)^2) over routed tokens",
    needs=("count", "effect_sq_sum", "gradient_count"),
    compute=heapr_joint,
)
