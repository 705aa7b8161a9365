"""HEAPr: what the loss would change by without the channel, to second order, as a mean over the routed tokens."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import ChannelScore, column
from understudy.scores import Context, per
from understudy.stats import ExpertStats

UNSEEN = -1.0  # of an expert that saw no token: its channels go first


def heapr(stats: ExpertStats, context: Context) -> np.ndarray:
    """Multiply the mean square of the activation by the mean square of the gradient that arrives at it.

    The paper's `w^T G w`, with G the mean outer product of the gradients at the expert's output, is the second factor:
    w^T times the gradient at the output is the gradient at the activation. Both means are over the routed tokens, that
    of the gradient over those in the blocks that were walked back through.
    """
    n = column(stats.count)
    energy, sensitivity = per(stats.activation_sq_sum, n), per(stats.gradient_sq_sum, column(stats.gradient_count))
    return np.where(n > 0, energy * sensitivity, UNSEEN)


HEAPR = ChannelScore(
    name="heapr",
    source="HEAPr, arXiv 2509.22299: mean(h^2) w^T G w = mean(h^2) mean(d^2) over routed tokens",
    needs=("count", "activation_sq_sum", "gradient_sq_sum", "gradient_count"),
    compute=heapr,
)
