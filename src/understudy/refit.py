"""Fit the down columns of the neurons that stay to what the whole expert answered, and tell which should stay.

Letters: E experts, I expert width, H hidden size, S the neurons that stay and R those that go, of one expert; h the
activations of a route, g its gate, W the matrix of `down_proj` with a row for each neuron, `[I, H]`.

A = sum g^2 (h - m)(h - m)^T with m = sum g^2 h / sum g^2. Columns D_S and a constant c make

    sum g^2 |W^T h - D_S^T h_S - c|^2 + r |W_S - D_S|^2 + r |W_R|^2

least, r a hundredth of the mean of A's diagonal. With M = A + r, that is c = W^T m - D_S^T m_S and

    D_S = M_SS^-1 (A_SI W + r W_S) = W_S + M_SS^-1 M_SR W_R

and what is left is tr(W_R^T (M_RR - M_RS M_SS^-1 M_SR) W_R). Optimal brain surgeon (Hassibi and Stork 1992; of whole
columns in SparseGPT's way, arXiv 2301.00774) takes out one neuron after the other, each time the one that adds least.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RIDGE = 1e-2  # over the mean of A's diagonal
LOST = 1e-5  # over the mean second moment: what sums in float32 cannot tell from 0
_STEPS = 64  # of the elimination, between two updates of its matrices
_ROOM = 256 << 20  # bytes of the matrices of the experts that are taken together


def centred(gram: Any, total: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return M and m of some experts in float64, `[..., I, I]` and `[..., I]`.

    M is 0 where the activations do not vary (one token): then the constant says all and the columns stay.

    Args:
        gram: sum g^2 h h^T, `[..., I, I]`.
        total: sum g^2 h, `[..., I]`.
        weight: sum g^2, `[...]`.
    """
    moment = np.array(gram, np.float64)
    weight = np.asarray(weight, np.float64)[..., None]
    mean = np.asarray(total, np.float64) / np.where(weight > 0, weight, 1)
    diagonal = np.einsum("...ii->...i", moment)  # a view
    raw = diagonal.mean(-1)[..., None, None]
    moment -= weight[..., None] * mean[..., :, None] * mean[..., None, :]
    varies = np.maximum(diagonal, 0).mean(-1)[..., None, None]
    diagonal += np.maximum(RIDGE * varies, LOST * raw)[..., 0]
    moment *= (varies > LOST * raw) | ~np.isfinite(varies)
    return moment, mean


def steady(gram: Any, total: Any, weight: Any) -> np.ndarray:
    """Tell which experts have activations that do not vary, bool `[E]`, from the diagonals alone."""
    weight = np.asarray(weight, np.float64)[:, None]
    diagonal = np.einsum("eii->ei", gram).astype(np.float64)
    variance = diagonal - np.asarray(total, np.float64) ** 2 / np.where(weight > 0, weight, 1)
    return np.maximum(variance, 0).mean(1) <= LOST * diagonal.mean(1)


def refitted(moment: np.ndarray, mean: np.ndarray, down: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns `[n, H]` and the constant `[H]` of one expert, float64.

    Args:
        moment: M, `[I, I]`.
        mean: m, `[I]`.
        down: W, `[I, H]`.
        kept: the neurons that stay, n ids.
    """
    down = np.asarray(down, np.float64)
    gone = np.setdiff1d(np.arange(len(down)), kept)
    columns = down[kept]
    if len(kept) and len(gone) and moment.any():
        columns = columns + np.linalg.solve(moment[np.ix_(kept, kept)], moment[np.ix_(kept, gone)] @ down[gone])
    return columns, mean @ down - mean[kept] @ columns


def order_of_loss(gram: Any, total: Any, weight: Any, metric: Any) -> np.ndarray:
    """Return for every neuron what its going adds to what is left, float64 `[E, I]`, the first to go with the least.

    A neuron that adds less than one that went before counts a hair more than that one, so that the neurons above any
    threshold are those that the elimination had left. Experts whose activations do not vary have 0 everywhere.

    Args:
        gram, total, weight: of all experts, as in `centred`.
        metric: W F W^T with the metric F of the answers, `[E, I, I]`.
    """
    experts, width = np.shape(total)
    found = np.zeros((experts, width))
    moving = np.flatnonzero(~steady(gram, total, weight))
    for part in np.array_split(moving, max(1, -(-len(moving) * width * width * 8 * 5 // _ROOM))):
        if not len(part):
            continue
        moment, _ = centred(gram[part], np.asarray(total)[part], np.asarray(weight)[part])
        sane = np.isfinite(moment).all((1, 2)) & np.isfinite(metric[part]).all((1, 2))
        found[part[~sane]] = np.nan
        if sane.any():
            found[part[sane]] = _eliminate(np.linalg.inv(moment[sane]), np.array(metric[part[sane]], np.float64))
    return found


def _eliminate(inverse: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """Take the neurons of some experts out one by one, `[n, I]`; both matrices `[n, I, I]` are those of all neurons.

    When j goes, with p the column j of P = M^-1 over P_jj and k the column j of K = W F W^T, P loses P_jj p p^T and,
    as the neurons that stay take over what j did, K becomes K - p k^T - k p^T + K_jj p p^T = K - p q^T - q p^T with
    q = k - K_jj p / 2. Some steps are made at a time, then both matrices are brought up to date and lose what is gone.
    """
    n, width, _ = inverse.shape
    every_n1 = np.arange(n)[:, None]
    ids_na = np.tile(np.arange(width), (n, 1))
    score_nI, last_n = np.empty((n, width)), np.full(n, -np.inf)
    while alive := ids_na.shape[1]:
        gone_ns, cost_ns, scale_ns, p_nsa, q_nsa = _steps(inverse, metric, min(_STEPS, alive))
        for j_n, cost_n in zip(gone_ns.T, cost_ns.T, strict=True):
            last_n = np.maximum(cost_n, np.nextafter(last_n, np.inf))
            score_nI[every_n1[:, 0], ids_na[every_n1[:, 0], j_n]] = last_n
        stays_na = np.ones(ids_na.shape, bool)
        stays_na[every_n1, gone_ns] = False
        at_na = np.nonzero(stays_na)[1].reshape(n, -1)
        both = every_n1[:, :, None], at_na[:, :, None], at_na[:, None, :]
        p_nsa, q_nsa = (np.take_along_axis(x, at_na[:, None, :], 2) for x in (p_nsa, q_nsa))
        ids_na = np.take_along_axis(ids_na, at_na, 1)
        p_nas = p_nsa.swapaxes(1, 2)
        inverse = inverse[both] - (p_nas * scale_ns[:, None]) @ p_nsa
        more = p_nas @ q_nsa
        metric = metric[both] - more - more.swapaxes(1, 2)
    return score_nI


def _steps(inverse: np.ndarray, metric: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Make some steps: who goes, at what cost, P_jj, all `[n, s]`, and p and q, `[n, s, a]`."""
    n, alive, _ = inverse.shape
    every = np.arange(n)
    p_nsa, q_nsa = np.zeros((n, count, alive)), np.zeros((n, count, alive))
    gone_ns, cost_ns, scale_ns = np.zeros((n, count), np.int64), np.zeros((n, count)), np.zeros((n, count))
    inverse_na = np.einsum("naa->na", inverse).copy()
    metric_na = np.einsum("naa->na", metric).copy()
    gone_na = np.zeros((n, alive), bool)
    least_n1 = np.finfo(np.float64).tiny + 1e-14 * inverse_na.max(1)[:, None]
    for s in range(count):
        each_na = np.maximum(metric_na, 0) / np.maximum(inverse_na, least_n1)
        each_na[gone_na] = np.inf
        j_n = each_na.argmin(1)
        gone_ns[:, s], cost_ns[:, s] = j_n, each_na[every, j_n]
        gone_na[every, j_n] = True
        p_ns, q_ns = p_nsa[every, :s, j_n], q_nsa[every, :s, j_n]
        by_p_n2a = np.stack((p_ns * scale_ns[:, :s], q_ns), 1) @ p_nsa[:, :s]
        p_na = inverse[every, j_n] - by_p_n2a[:, 0]
        k_na = metric[every, j_n] - by_p_n2a[:, 1] - (p_ns[:, None] @ q_nsa[:, :s])[:, 0]
        p_na[gone_na], k_na[gone_na] = 0, 0  # its own place is not looked at again
        scale_n = np.maximum(inverse_na[every, j_n], least_n1[:, 0])
        p_na /= scale_n[:, None]
        q_na = k_na - metric_na[every, j_n][:, None] * p_na / 2
        p_nsa[:, s], q_nsa[:, s], scale_ns[:, s] = p_na, q_na, scale_n
        inverse_na -= scale_n[:, None] * p_na * p_na
        metric_na -= 2 * p_na * q_na
    return gone_ns, cost_ns, scale_ns, p_nsa, q_nsa
