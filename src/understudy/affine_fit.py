"""Fit an affine map of low rank to what one expert answers: y = c + (x - m) A B, in closed form.

Letters: n routes of one expert, H hidden size, R rank; x what enters the expert, y its output before its gate, g the
gate.

Reduced-rank ridge regression (Izenman 1975; Mukherjee and Zhu 2011), weighted by g^2 as in the error of the layer's
output. With m and c the means weighted by g^2, X = g (x - m), Y = g (y - c) and S = X^T X + l, l a hundredth of the
mean diagonal of X^T X, and any root L of S = L L^T, W = A B has to make

    |Y - X W|^2 + l |W|^2 = |Y|^2 - |M|^2 + |L^T W - M|^2        M = L^-1 X^T Y

least. That is the best approximation of M by a lower rank: with M = U s V^T, A = L^-T U and B = s V^T, of which rank r
takes the first r columns and rows, and each further rank lowers the objective by its s^2.

What a rank is worth on other text is measured on every eighth route, by a map that was fitted without them: there V has
orthonormal rows, so that ranks change the error one by one. An expert of few routes gets little or nothing this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.refit import LOST, RIDGE

HELD_OUT = 8  # one route in so many
_SWEEPS = 8  # of the subspace iteration
_EXACT = 64  # matrices up to this size are decomposed whole


@dataclass(frozen=True)
class Fitted:
    """A map of the largest rank, whose first columns of A and rows of B are the maps of lower rank; float64.

    Attributes:
        into_HR: A.
        out_RH: B; each of its rows is as long as the column of A that it belongs to.
        mean_H: m.
        constant_H: c.
        gain_R: by how much each rank lowers the error of all routes, measured on routes that were held out; never
            rising, and 0 from the first that does not help.
        error: sum g^2 |y - c|^2, float.
    """

    into_HR: Tensor
    out_RH: Tensor
    mean_H: Tensor
    constant_H: Tensor
    gain_R: Tensor
    error: float


def fit(x_nH: Tensor, y_nH: Tensor, g_n: Tensor, rank: int) -> Fitted:
    """Fit a map to routes `[n, H]` with gates `[n]`, of any float dtype.

    Zeros where x does not vary (one route, say): then the constant says all. NaN where a number is not finite.
    """
    size = g_n.double().square().mean().sqrt()
    g_n = g_n.double() / size  # squares of tiny gates would be lost in float32
    q_n = g_n.square()
    weight = q_n.sum()
    mean_H, constant_H = ((q_n @ z.double()) / weight for z in (x_nH, y_nH))
    g_n1 = g_n[:, None]
    x_nH, y_nH = ((g_n1 * (z.double() - of)).float() for z, of in ((x_nH, mean_H), (y_nH, constant_H)))
    error = size.square() * _square(y_nH)
    flat = _square(x_nH) <= LOST * weight * mean_H.square().sum()
    into_HR, out_RH, gain_R = mean_H.new_zeros(len(mean_H), rank), mean_H.new_zeros(rank, len(mean_H)), None
    if not torch.isfinite(x_nH).all() or not torch.isfinite(y_nH).all():
        into_HR, out_RH, gain_R = into_HR + torch.nan, out_RH + torch.nan, mean_H.new_full((rank,), torch.nan)
    elif not flat:
        held_n = torch.arange(len(x_nH), device=x_nH.device) % HELD_OUT == HELD_OUT - 1
        parts = [_products(x_nH[part], y_nH[part]) for part in (~held_n, held_n)]
        u_HR, s_R, v_RH = reduced(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1], rank)
        even_R = (s_R / u_HR.norm(dim=0)).sqrt()  # both as long, so that neither is lost in 16 bits
        into_HR, out_RH = u_HR * even_R, v_RH * (s_R / torch.where(even_R > 0, even_R, 1))[:, None]
        if held_n.any():
            measured_R = error * _held_out(x_nH, y_nH, g_n1, held_n, *parts[0], rank)
            inside_R = size.square() * _lowered(x_nH, y_nH, u_HR, s_R, v_RH)  # more it cannot be worth
            gain_R = torch.minimum(measured_R, inside_R).clamp(min=0).cummin(0).values
    gain_R = mean_H.new_zeros(rank) if gain_R is None else gain_R
    return Fitted(into_HR, out_RH, mean_H, constant_H, gain_R, float(error))


def _products(x_nH: Tensor, y_nH: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X and X^T Y in float64, multiplied in float32, whose rounding the ridge covers."""
    return (x_nH.T @ x_nH).double(), (x_nH.T @ y_nH).double()


def _square(z_nH: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z_nH, dtype=torch.float64).square()


def reduced(xx_HH: Tensor, xy_HH: Tensor, rank: int, least: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return A `[H, R]`, s `[R]` and V^T `[R, H]` of the map, from X^T X and X^T Y in float64.

    `least` is what the ridge is at least, for an X of which little may be left.
    """
    ridge = (RIDGE * xx_HH.diagonal().mean()).clamp(min=least)
    root_HH = torch.linalg.cholesky(xx_HH + ridge * torch.eye(len(xx_HH), dtype=xx_HH.dtype, device=xx_HH.device))
    u_HR, s_R, v_RH = _largest(torch.linalg.solve_triangular(root_HH, xy_HH, upper=False), rank)
    return torch.linalg.solve_triangular(root_HH.T, u_HR, upper=True), s_R, v_RH


def _largest(matrix_HH: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values and their vectors, by subspace iteration (Halko et al., arXiv 0909.4061)."""
    size = len(matrix_HH)
    if size <= max(_EXACT, 2 * rank):
        u, s, v = torch.linalg.svd(matrix_HH)
    else:
        start = torch.randn(size, 2 * rank, generator=torch.Generator().manual_seed(0), dtype=matrix_HH.dtype)
        basis = torch.linalg.qr(matrix_HH @ start.to(matrix_HH.device)).Q
        for _ in range(_SWEEPS):
            basis = torch.linalg.qr(matrix_HH @ torch.linalg.qr(matrix_HH.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ matrix_HH, full_matrices=False)
        u = basis @ u
    return u[:, :rank], s[:rank], v[:rank]


def _held_out(
    x_nH: Tensor, y_nH: Tensor, g_n1: Tensor, held_n: Tensor, xx_HH: Tensor, xy_HH: Tensor, rank: int
) -> Tensor:
    """By what share of the error of the routes held out each rank of a map of the others lowers it, `[R]`.

    `xx_HH` and `xy_HH` are the products of those others, about the means of all.
    """
    weight = g_n1[~held_n].square().sum()
    # means of the others, about those of all
    dx_H, dy_H = ((g_n1[~held_n, 0] @ z[~held_n].double()) / weight for z in (x_nH, y_nH))
    least = 0.1 * RIDGE * xx_HH.diagonal().mean()  # the others may all be alike, and only their rounding be left
    xx_HH, xy_HH = (of - weight * torch.outer(dx_H, d_H) for of, d_H in ((xx_HH, dx_H), (xy_HH, dy_H)))
    a_HR, s_R, v_RH = reduced(xx_HH, xy_HH, rank, least)
    x_hH, y_hH = (z[held_n] - g_n1[held_n] * of for z, of in ((x_nH, dx_H), (y_nH, dy_H)))
    error = _square(y_hH)
    return _lowered(x_hH, y_hH, a_HR, s_R, v_RH) / torch.where(error > 0, error, 1)


def _lowered(x_nH: Tensor, y_nH: Tensor, a_HR: Tensor, s_R: Tensor, v_RH: Tensor) -> Tensor:
    """By how much each rank of a map lowers the error of rows X and Y, `[R]`."""
    answer_nR, wanted_nR = x_nH.double() @ a_HR * s_R, y_nH.double() @ v_RH.T
    return (2 * answer_nR * wanted_nR - answer_nR.square()).sum(0)
