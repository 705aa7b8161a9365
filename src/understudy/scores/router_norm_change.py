"""Router norm change: an expert is spared when training made the router's row for it longer."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score
from understudy.stats import ExpertStats


def router_norm_change(stats: ExpertStats, context: Context) -> np.ndarray:
    """Subtract the norm of the router's row in the base checkpoint from the norm now; the sign counts."""
    return np.asarray(stats.router_norm) - np.asarray(stats.base_router_norm)


ROUTER_NORM_CHANGE = Score(
    name="router_norm_change",
    source="provable expert pruning, arXiv 2405.16646: |router row| - |router row in the base checkpoint|",
    needs=("router_norm", "base_router_norm"),
    compute=router_norm_change,
)
