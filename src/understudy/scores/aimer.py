"""AIMER: an expert is spared when few of its weights are large; from the weights alone, without any text."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score
from understudy.stats import ExpertStats


def aimer(stats: ExpertStats, context: Context) -> np.ndarray:
    """Return minus the mean absolute weight over the root mean square: the paper prunes the largest ratio.

    By Cauchy and Schwarz the ratio is at most 1; an expert of zeros, which adds nothing, is given that.
    """
    mean = np.asarray(stats.weight_abs_sum) / stats.weight_numel
    rms = np.sqrt(np.asarray(stats.weight_sq_sum) / stats.weight_numel)
    return -np.divide(mean, rms, out=np.ones(mean.shape), where=rms > 0)


AIMER = Score(
    name="aimer",
    source="AIMER, arXiv 2603.18492: -mean|w| / rms(w) over all matrices of the expert",
    needs=("weight_abs_sum", "weight_sq_sum", "weight_numel"),
    compute=aimer,
)
