"""CAMERA-P: the energy that a channel adds to the layer's output."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import ChannelScore
from understudy.scores import Context
from understudy.stats import ExpertStats

ALPHA = 0.9  # share of the largest token, as in the paper's run script; its code's own default is 1


def camera(stats: ExpertStats, context: Context) -> np.ndarray:
    """Weigh the sum over tokens and the largest token of the gated activation squared, times the column of down."""
    energy = (1 - ALPHA) * stats.gated_activation_sq_sum + ALPHA * stats.gated_activation_sq_max
    return stats.down_sq_norm * energy


CAMERA = ChannelScore(
    name="camera",
    source="CAMERA-P, arXiv 2508.02322: |w|^2 ((1 - a) sum (g h)^2 + a max (g h)^2), a = 0.9",
    needs=("gated_activation_sq_sum", "gated_activation_sq_max", "down_sq_norm"),
    compute=camera,
)
