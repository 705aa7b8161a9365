"""Gate: an expert is spared when the router leans on it."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats


def gate(stats: ExpertStats, context: Context) -> np.ndarray:
    """Average the gate over all tokens, 0 where the expert was not chosen."""
    return per(stats.gate_sum, stats.tokens)


GATE = Score(
    name="gate",
    source="mean gate over all tokens, 0 where not routed: expert trimming of arXiv 2406.02500, ESFT's of 2407.01906",
    needs=("tokens", "gate_sum"),
    compute=gate,
)
