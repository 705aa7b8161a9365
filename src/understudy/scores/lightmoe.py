"""LightMoE: the share of its layer's gates that an expert gets."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats


def lightmoe(stats: ExpertStats, context: Context) -> np.ndarray:
    """Divide the summed gate by that of the whole layer; the shares of a layer sum to 1."""
    return per(stats.gate_sum, np.sum(stats.gate_sum))


LIGHTMOE = Score(
    name="lightmoe",
    source="LightMoE, arXiv 2603.12645, eq. 2: sum of g over the tokens / the same over all experts of the layer",
    needs=("gate_sum",),
    compute=lightmoe,
)
