"""MoNE: an expert is spared when its output varies and the router leans on it."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats

_WEIGHT = 0.5  # of the variance against the gate in the paper's fusion; a product, so it changes no order


def mone(stats: ExpertStats, context: Context) -> np.ndarray:
    """Multiply the fluctuation of the output by the mean gate.

    The fluctuation is the root of the output's summed variance over the routed tokens (divisor n). The mean gate is
    over all tokens as in the paper's code, or over the routed ones as in its text (`gate="routed"`).
    """
    fluctuation = np.sqrt(per(stats.scatter, stats.count))
    mean_gate = per(stats.gate_sum, stats.count if context.settings.gate == "routed" else stats.tokens)
    return (_WEIGHT * fluctuation) * ((1 - _WEIGHT) * mean_gate)


MONE = Score(
    name="mone",
    source="MoNE, arXiv 2507.00390: 0.5 sqrt(sum_d var_d(y)) * 0.5 mean(g)",
    needs=("tokens", "count", "gate_sum", "scatter"),
    compute=mone,
    options=("gate",),
)
