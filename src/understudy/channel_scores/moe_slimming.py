"""MoE-Slimming: how large a channel's activation, its up part and its gate part are, against the layer's mean."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import ChannelScore
from understudy.scores import Context
from understudy.stats import ExpertStats


def moe_slimming(stats: ExpertStats, context: Context) -> np.ndarray:
    """Average three roots of sums of squares over the routed tokens, and divide by the mean of the layer.

    Sums, not means: the number of tokens enters by its root, as in the paper's code. The code smooths over batches
    (0.9), which would make the score depend on their order; here every token counts the same.
    """
    parts = (stats.activation_sq_sum, stats.up_sq_sum, stats.preactivation_sq_sum)
    score = np.mean([np.sqrt(part) for part in parts], axis=0)
    return score / (score.mean() or 1.0)


MOE_SLIMMING = ChannelScore(
    name="moe_slimming",
    source="MoE-Slimming, arXiv 2606.18304: mean of sqrt(sum h^2), sqrt(sum up^2), sqrt(sum gate^2), over layer mean",
    needs=("activation_sq_sum", "up_sq_sum", "preactivation_sq_sum"),
    compute=moe_slimming,
)
