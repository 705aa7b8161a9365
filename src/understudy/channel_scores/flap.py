"""FLAP: how much a channel's contribution fluctuates about its mean, which a constant can stand for."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import ChannelScore, column
from understudy.scores import Context, per
from understudy.stats import ExpertStats


def flap(stats: ExpertStats, context: Context) -> np.ndarray:
    """Multiply the variance of the activation over the routed tokens by its column of down, standardised in the layer.

    Standardised scores of different layers are comparable; in a layer where all channels are equal they are 0.
    """
    n = column(stats.count)
    variance = np.maximum(per(stats.activation_sq_sum, n) - per(stats.activation_sum, n) ** 2, 0)
    score = variance * stats.down_sq_norm
    return (score - score.mean()) / (score.std() or 1.0)


FLAP = ChannelScore(
    name="flap",
    source="FLAP, arXiv 2312.11983, on the channels of experts: var(h) |w|^2, standardised in the layer",
    needs=("count", "activation_sum", "activation_sq_sum", "down_sq_norm"),
    compute=flap,
)
