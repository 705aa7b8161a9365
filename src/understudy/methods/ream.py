"""REAM: router-weighted expert merging, where a few salient experts absorb those that REAP would prune."""

from __future__ import annotations

import numpy as np

from understudy.grouping import Groups, by_layer, cosines, joined, most_by_layer, ranked
from understudy.methods import Choice, Method, Problem
from understudy.stats import ExpertStats

ABSORBS = 16  # C of the paper


def group(stats: ExpertStats, saliency: np.ndarray, ids: list[int], groups: int) -> Groups:
    """Let the r most salient experts, one after the other, absorb the nearest experts that are still free (METHODS 5).

    Likeness is the cosine of router logits over tokens plus the mean over tokens of the cosine of outputs, halved. Each
    absorbs 16 at most (in the published code the centroid counts among the 16), and where some stay free after the last
    of them, they join the nearest.
    """
    alike = (cosines(stats.logit_gram) + stats.dense_cos_sum / stats.dense_tokens) / 2
    order = ranked(saliency, ids)
    centroids, free = order[:groups], order[groups:]
    found: dict[int, list[int]] = {}
    for centroid in centroids:
        near = ranked(alike[centroid], free)[:ABSORBS]
        found[centroid] = [centroid, *near]
        free = [i for i in free if i not in near]
    for centroid, *left in joined(alike, centroids, free):
        found[centroid] += left
    return list(found.values())


def choose(problem: Problem, ratio: float) -> Choice:
    """Group each layer around its most salient experts, by the score of REAP.

    Raises:
        PlanError: the ratio would leave a layer without an expert.
    """
    scores = problem.scores
    assert scores is not None

    def of_layer(key: str, stats: ExpertStats, ids: list[int], groups: int) -> Groups:
        return group(stats, scores.layers[key], ids, groups)

    layers, notes = by_layer(problem, ratio, of_layer)
    return Choice(layers, how={"merge": {"weights": "saliency", "align": "activations"}}, scores=scores, notes=notes)


REAM = Method(
    name="ream",
    score="reap",
    kind="merge",
    kinds=("merge",),
    choose=choose,
    needs=("count", "gated_norm_sum", "logit_gram", "dense_cos_sum", "dense_tokens", "dense_activations"),
    most=most_by_layer,
    sequential=True,
    paper="REAM: merging improves pruning of experts (router rows stay, gates add), arXiv 2604.04356",
)
