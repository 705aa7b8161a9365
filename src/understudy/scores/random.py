"""Random: the control that every score has to beat."""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score
from understudy.stats import ExpertStats


def random(stats: ExpertStats, context: Context) -> np.ndarray:
    """Draw uniform numbers by the seed and the position of the layer, whatever the statistics say."""
    return np.random.default_rng([context.settings.seed, context.position]).random(context.layer.experts)


RANDOM = Score(name="random", source="uniform draw by --seed and layer", needs=(), compute=random, options=("seed",))
