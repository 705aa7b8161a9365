"""HEAPr times the tokens that the expert saw: an estimate of the whole loss, not of the loss of a routed token."""

from __future__ import annotations

import numpy as np

from understudy.channel_scores import ChannelScore, column
from understudy.channel_scores.heapr import HEAPR
from understudy.scores import Context
from understudy.stats import ExpertStats


def heapr_freq(stats: ExpertStats, context: Context) -> np.ndarray:
    """Multiply HEAPr's mean by n, 0 where an expert saw no token."""
    return HEAPR.compute(stats, context) * column(stats.count)


HEAPR_FREQ = ChannelScore(
    name="heapr_freq",
    source="a variant of HEAPr, arXiv 2509.22299, that counts how often the expert is used: n mean(h^2) mean(d^2)",
    needs=HEAPR.needs,
    compute=heapr_freq,
)
