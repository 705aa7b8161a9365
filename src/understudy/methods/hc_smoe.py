"""HC-SMoE: hierarchical clustering of experts by what they answer on average."""

from __future__ import annotations

import numpy as np

from understudy.grouping import Groups, by_layer, led, linked, most_by_layer
from understudy.methods import Choice, Method, Problem
from understudy.stats import ExpertStats


def group(key: str, stats: ExpertStats, ids: list[int], groups: int) -> Groups:
    """Cluster by average linkage on the Euclidean distance of mean outputs, all experts fed all tokens (METHODS 5)."""
    mean_EH = stats.dense_sum / stats.dense_tokens
    distance = np.stack([np.linalg.norm(mean_EH - own, axis=1) for own in mean_EH])
    return led(linked(distance, ids, groups), stats.count)


def choose(problem: Problem, ratio: float) -> Choice:
    """Cluster each layer down to its share of the experts; the most frequent member dominates.

    Raises:
        PlanError: the ratio would leave a layer without an expert.
    """
    layers, notes = by_layer(problem, ratio, group)
    return Choice(layers, how={"merge": {"weights": "count", "align": "none"}}, notes=notes)


HC_SMOE = Method(
    name="hc_smoe",
    kind="merge",
    kinds=("merge",),
    choose=choose,
    needs=("count", "dense_sum", "dense_tokens"),
    most=most_by_layer,
    paper="HC-SMoE: retraining-free merging by hierarchical clustering of mean outputs, arXiv 2410.08589",
)
