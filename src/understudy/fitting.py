"""Vectors of experts fitted before any training: what the layer answers comes as near as possible to all its routes.

Compressed Experts (arXiv 2503.00634) starts its vectors at ones and trains them. Here they start where the output of
the layer, f(d) with d = theta - 1 of all experts, meets best what all top-k routes answer, y, to first order in d:

    min over d of |y - f(0) - J d|^2 + 0.01 |d|^2_M,    M_e = q (1 + sum over tokens of alpha'_e^2)

J is the derivative of the family's own forward at zero, never written out: J^T u is what a backward pass gives, J v the
derivative of that by u. q is the scale of J^T J, of one random vector. So experts that are seldom auxiliary are drawn
to ones. The normal equations are solved by conjugate gradients, preconditioned by M; of the steps, ones included, the
one counts whose true error is the least on tokens that were held out.

Letters: N tokens of the sample, n of a chunk, k routes of a token, E experts, H hidden size, S numbers of an expert's
vectors together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.experts import copied, modulate

_CHUNK = 1024  # tokens whose derivatives are held at once
_EACH = 8  # of so many tokens the first is held out
_DAMPING = 0.01
_STEPS = 12  # at most
_PATIENCE = 3  # steps without gain


@dataclass(frozen=True)
class Sample:
    """Tokens of a layer, their routes, and what all these together answer, in the dtype of the model."""

    hidden_NH: Tensor
    index_Nk: Tensor
    gates_Nk: Tensor
    answer_NH: Tensor

    def __len__(self) -> int:
        return len(self.hidden_NH)

    def part(self, rows: Any) -> Sample:
        """Return some of the tokens."""
        return Sample(self.hidden_NH[rows], self.index_Nk[rows], self.gates_Nk[rows], self.answer_NH[rows])

    def chunks(self) -> Iterator[Sample]:
        """Return the tokens a few at a time."""
        for start in range(0, len(self), _CHUNK):
            yield self.part(slice(start, start + _CHUNK))


@dataclass(frozen=True)
class Fit:
    """Vectors minus one, and how good they are.

    Attributes:
        more_ES: float32; the vectors of an expert one after the other, in the order of the module's parameters.
        weight_E: sum of alpha', how much each expert was auxiliary on the tokens of the fit; float64.
        steps: of conjugate gradients that were taken; 0 leaves ones.
        square: squared sum of what is to be answered, over the tokens that were held out.
        plain: squared error of ones, on these.
        fitted: squared error of the vectors, on these.
    """

    more_ES: Tensor
    weight_E: Tensor
    steps: int
    square: float
    plain: float
    fitted: float


def modulated_copy(experts: Any, num_experts: int, main_k: int, vectors: int, renormalise: bool) -> Any:
    """Return experts that run `main_k` routes and have vectors, in float32, that change nothing yet.

    The weights are those of `experts`, shared and without gradients; `experts` stays as it is.
    """
    made = copied(experts)
    for name, weight in made._parameters.items():
        if weight is not None:
            made._parameters[name] = nn.Parameter(weight.detach(), requires_grad=False)
    modulate(made, num_experts, main_k, vectors, renormalise)
    made.modulation.float().requires_grad_()
    return made


@torch.no_grad()
def sample_of(experts: Any, hidden_NH: Tensor, index_Nk: Tensor, gates_Nk: Tensor) -> Sample:
    """Ask all routes of some tokens."""
    routes = Sample(hidden_NH, index_Nk.long(), gates_Nk, hidden_NH)
    answers = [experts(part.hidden_NH, part.index_Nk, part.gates_Nk) for part in routes.chunks()]
    return Sample(hidden_NH, routes.index_Nk, gates_Nk, torch.cat([hidden_NH[:0], *answers]))


@torch.no_grad()
def fit(experts: Any, sample: Sample, seed: int = 0) -> Fit:
    """Fit the vectors of experts as `modulated_copy` makes them; these are left at some step of the search.

    `seed` is that of the vector which finds the scale. Where nothing is gained, ones stay.
    """
    layer = _Layer(experts)
    held_N = torch.arange(len(sample), device=sample.hidden_NH.device) % _EACH == 0
    taught, held = sample.part(~held_N), sample.part(held_N)
    mass_E, weight_E = layer.mass(taught)
    x_ES = torch.zeros_like(layer.vectors)
    plain = best = layer.error(held, x_ES)
    best_ES, steps = x_ES, 0
    for step, x_ES in enumerate(_descent(layer, taught, mass_E[:, None].float() + 1, seed), 1):
        error = layer.error(held, x_ES)
        if error < best:
            best, best_ES, steps = error, x_ES, step
        if step - steps >= _PATIENCE:
            break
    return Fit(best_ES, weight_E, steps, _square(held.answer_NH), plain, best)


def _descent(layer: _Layer, sample: Sample, scale_E1: Tensor, seed: int) -> Iterator[Tensor]:
    """Give what each step of conjugate gradients comes to, `[E, S]`; ends where there is no way down, or no number."""
    r_ES = layer.slope(sample)
    draw_ES = torch.randn(r_ES.shape, generator=torch.Generator().manual_seed(seed)).to(r_ES.device)
    curve = _dot(draw_ES, layer.curved(sample, draw_ES)) / _dot(draw_ES * (scale_E1 - 1), draw_ES)
    if not (math.isfinite(curve) and curve > 0):  # also where no expert is auxiliary
        return
    scale_E1 = scale_E1 * curve
    x_ES, z_ES = torch.zeros_like(r_ES), r_ES / scale_E1
    p_ES, rz = z_ES, _dot(r_ES, z_ES)
    for _ in range(_STEPS):
        a_ES = layer.curved(sample, p_ES) + _DAMPING * scale_E1 * p_ES
        step = rz / along if (along := _dot(p_ES, a_ES)) > 0 else math.nan
        x_ES, r_ES = x_ES + step * p_ES, r_ES - step * a_ES
        if not x_ES.isfinite().all():
            return
        yield x_ES
        z_ES = r_ES / scale_E1
        rz, before = _dot(r_ES, z_ES), rz
        p_ES = z_ES + (rz / before if before else 0.0) * p_ES


class _Layer:
    """A layer as a function of its vectors, `[E, S]`, at zeros."""

    def __init__(self, experts: Any) -> None:
        self.experts, self.parameters = experts, list(experts.modulation.parameters())

    @property
    def vectors(self) -> Tensor:
        """The vectors as they are."""
        return torch.cat([p.detach() for p in self.parameters], dim=1)

    def set(self, more_ES: Tensor) -> None:
        """Change the vectors."""
        for parameter, part in zip(self.parameters, self._split(more_ES), strict=True):
            parameter.copy_(part)

    def _split(self, more_ES: Tensor) -> Sequence[Tensor]:
        return more_ES.split([p.shape[1] for p in self.parameters], dim=1)

    def mass(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return the sums of alpha'^2 and of alpha' by expert, float64."""
        rule, device = self.experts.modulation, sample.hidden_NH.device
        key_E = torch.arange(rule.num_experts, device=device)
        sums_2E = torch.zeros(2, rule.num_experts, dtype=torch.float64, device=device)
        for part in sample.chunks():
            share_nE = rule.split(part.index_Nk, part.gates_Nk, key_E)[2].double()
            sums_2E += torch.stack([share_nE.square().sum(0), share_nE.sum(0)])
        return sums_2E[0], sums_2E[1]

    def error(self, sample: Sample, more_ES: Tensor) -> float:
        """Return the squared error with these vectors, which are then zeros again."""
        self.set(more_ES)
        total = math.fsum(_square(part.answer_NH.float() - self._run(part).float()) for part in sample.chunks())
        self.set(torch.zeros_like(more_ES))
        return total

    def slope(self, sample: Sample) -> Tensor:
        """Return J^T (y - f(0)), `[E, S]`."""
        total_ES = torch.zeros_like(self.vectors)
        for part in sample.chunks():
            with torch.enable_grad():
                out_nH = self._run(part)
            total_ES += pulled(out_nH, self.parameters, part.answer_NH - out_nH.detach())
        return total_ES

    def curved(self, sample: Sample, v_ES: Tensor) -> Tensor:
        """Return J^T J v, `[E, S]`."""
        total_ES = torch.zeros_like(v_ES)
        for part in sample.chunks():
            with torch.enable_grad():
                out_nH = self._run(part)
            total_ES += pulled(out_nH, self.parameters, pushed(out_nH, self.parameters, self._split(v_ES)))
        return total_ES

    def _run(self, part: Sample) -> Tensor:
        answer: Tensor = self.experts(part.hidden_NH, part.index_Nk, part.gates_Nk)
        return answer


def pushed(out_nH: Tensor, parameters: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """Return J v, `[n, H]`: by how much an answer moves with its parameters, which must still have their graph.

    The backward pass is linear in what it starts from, J^T u, and its derivative by u along v is J v.
    """
    with torch.enable_grad():
        u_nH = torch.zeros_like(out_nH, requires_grad=True)
        back = torch.autograd.grad(out_nH, parameters, u_nH, create_graph=True)
        (moved_nH,) = torch.autograd.grad(back, u_nH, v, retain_graph=True)
    return moved_nH


def pulled(out_nH: Tensor, parameters: Sequence[Tensor], u_nH: Tensor) -> Tensor:
    """Return J^T u, `[E, S]`; frees the graph of the answer."""
    return torch.cat(torch.autograd.grad(out_nH, parameters, u_nH), dim=1)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _square(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
