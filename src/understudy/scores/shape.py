"""SHAPE: an expert is spared when sets of experts that tokens choose lean on it in particular.

Letters: S distinct top-k sets of a layer, K experts in each, E experts of the layer.
"""

from __future__ import annotations

import numpy as np

from understudy.scores import Context, Score, per
from understudy.stats import ExpertStats

_ROOM = 2**62  # an id is to stay below, with room to the end of int64


def shape(stats: ExpertStats, context: Context) -> np.ndarray:
    """Average what each observed set owes to the expert alone, beyond what any partner could bring.

    v(A) is the number of tokens whose set is A, and N(i, A) the number of observed sets that hold A without i. With
    a(i) the least v(A) / N(i, A) of the sets with i, the score is the mean over those of (v(A) - a(i) N(i, A)) / K, or
    0 where that is negative.
    """
    sets_SK = np.asarray(stats.topk_sets).astype(np.int64)
    v_S, K, E = np.asarray(stats.topk_counts, np.float64), sets_SK.shape[1], context.layer.experts
    others_SK = np.empty(sets_SK.shape)  # N(i, A)
    rests = [np.delete(sets_SK, k, axis=1) for k in range(K)]
    where, numbers = _same_rows(np.concatenate(rests), E)
    for k, part in enumerate(np.split(where, K)):
        others_SK[:, k] = numbers[part]
    experts, others, v = sets_SK.ravel(), others_SK.ravel(), np.repeat(v_S, K)
    least_E = np.full(E, np.inf)
    np.minimum.at(least_E, experts, v / others)
    owed = np.bincount(experts, weights=(v - least_E[experts] * others) / K, minlength=E)
    return np.maximum(per(owed, np.bincount(experts, minlength=E)), 0.0)


def _same_rows(rows: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct rows of ids below `base`; return the number of each row, and how many rows have it.

    Rows are read as numbers to that base, a few digits at a time: sorting numbers is much faster than sorting rows.
    """
    ids, bound = np.zeros(len(rows), np.int64), 1
    for column in rows.T:
        if bound * base > _ROOM:
            _, ids = np.unique(ids, return_inverse=True)
            bound = len(rows)
        ids, bound = ids * base + column, bound * base
    _, where, numbers = np.unique(ids, return_inverse=True, return_counts=True)
    return where.ravel(), numbers


SHAPE = Score(
    name="shape",
    source="SHAPE, arXiv 2606.09886: mean over the observed top-k sets A with i of (v(A) - a(i) N(i, A)) / |A|",
    needs=("topk_sets", "topk_counts"),
    compute=shape,
)
