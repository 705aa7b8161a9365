"""Solve for all that a decoder layer's output is linear in, so that the layer puts out what the teacher's does.

With the routes and the gating as they are, what a layer puts out is linear in the last matrices of its experts, kept,
changed or shared, and in constants: with J for the features of all of them, gates included, and t for the teacher's,

    sum |t - f(W) |^2 + RIDGE sum d (W - W0)^2,   d the diagonal of J^T J,

is least where (J^T J + RIDGE d)(W - W0) = J^T (t - f(W0)). Experts that meet in a token are solved for together, which
no fit of one expert at a time can do, and shared experts, whose weights cost nothing more, take over what they can.

Conjugate gradients (Hestenes and Stiefel 1952), preconditioned by the diagonal, ask for a product with J and one with
J^T in each round, one run of the layer forth and back; J itself, as wide as all neurons of a layer, is never there. The
diagonal is that of Hutchinson's estimate with signs at every output, averaged over the hidden size. Where a family does
more to the output of its experts than to add it, this is one step of Gauss and Newton.

With less text than neurons the last rounds learn the text by heart: the round counts that is best on held-out text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from understudy.activations import ActivationStore
from understudy.errors import NumericError
from understudy.facts import parse_bytes
from understudy.layerwise.onelayer import OneLayer

RIDGE = 1e-2  # over the diagonal
_LEAST = 1e-6  # of the mean diagonal, added for what is hardly ever used
_PATIENCE = 3  # rounds that are no better on held-out text, and then no more
_MEMORY = "4GB"  # of what lies between two rounds; past it, files are mapped

Vectors = dict[str, Tensor]


def repair(layer: OneLayer, parameters: Vectors, rounds: int, seed: int) -> list[dict[str, float]]:
    """Solve for the parameters of one layer, in place, and return the losses.

    A loss is the share of what the teacher's layer adds that is missed on the text, ridge included, after a round, and
    `missed` that on held-out text.

    Args:
        layer: on its text, in float32.
        parameters: what its output is linear in, by name.
        rounds: of conjugate gradients; each runs the layer forth and back over all batches.
        seed: of the signs.

    Raises:
        NumericError: numbers that are not finite; says in which layer.
    """
    begun = time.perf_counter()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    outputs = ActivationStore(parse_bytes(_MEMORY), device=layer.targets.device)
    left, diagonal, error = _system(layer, parameters, outputs, seed)
    least = _LEAST * float(sum(d.sum() for d in diagonal.values()) / sum(d.numel() for d in diagonal.values()))
    scale = {name: d * (1 + RIDGE) + max(least, 1e-30) for name, d in diagonal.items()}
    found = {name: torch.zeros_like(p) for name, p in start.items()}
    rhs = {name: x.clone() for name, x in left.items()}
    ahead = {name: x / scale[name] for name, x in left.items()}
    weight, adds, losses = _dot(left, ahead), layer.adds(range(layer.training)), list[dict[str, float]]()
    best, least_missed, since = {name: x.clone() for name, x in found.items()}, layer.missed(), 0
    for _ in range(rounds):
        if weight <= 0 or since == _PATIENCE:
            break
        moved = _product(layer, parameters, start, ahead, outputs)
        for name, x in moved.items():
            x += (RIDGE * diagonal[name] + least) * ahead[name]
        step = weight / max(_dot(ahead, moved), 1e-300)
        for name in found:
            found[name] += step * ahead[name]
            left[name] -= step * moved[name]
        # e - 2 x^T b + x^T M x, where M x = b - r with what is left, r
        loss = (error - _dot(found, rhs) - _dot(found, left)) / adds
        if not math.isfinite(loss):
            raise NumericError(f"decoder layer {layer.index}: what is to be solved is not finite; check its weights")
        _place(parameters, start, found)
        since += 1
        if (missed := layer.missed()) < least_missed:
            best, least_missed, since = {name: x.clone() for name, x in found.items()}, missed, 0
        losses.append({"loss": loss, "missed": missed, "lr": 0.0, "seconds": time.perf_counter() - begun})
        begun = time.perf_counter()
        nearer = {name: x / scale[name] for name, x in left.items()}
        now = _dot(left, nearer)
        ahead = {name: x + now / weight * ahead[name] for name, x in nearer.items()}
        weight = now
    _place(parameters, start, best)
    return losses


def _system(
    layer: OneLayer, parameters: Vectors, outputs: ActivationStore, seed: int
) -> tuple[Vectors, Vectors, float]:
    """Return J^T (t - f), the diagonal of J^T J, and |t - f|^2; what the layer puts out goes to `outputs`."""
    generator = torch.Generator().manual_seed(seed + layer.index)
    left, diagonal = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    error = 0.0
    for number in range(layer.training):
        out = layer.output(number)
        outputs.put(number, out.detach())
        mask = layer.mask(number)[..., None]
        missing = (layer.target(number) - out.detach()) * mask
        error += float(missing.double().square().sum())
        for name, gradient in _gradients(out, parameters, missing, more=True):
            left[name] += gradient
        signs = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
        for name, gradient in _gradients(out, parameters, signs * mask):
            diagonal[name] += gradient.square_()
    outputs.commit(layer.index)
    for name, d in diagonal.items():
        if (dim := _outward(name, d, out.shape[-1])) is not None:
            d.copy_(d.mean(dim, keepdim=True).expand_as(d))
    return left, diagonal, error


def _product(layer: OneLayer, parameters: Vectors, start: Vectors, ahead: Vectors, outputs: ActivationStore) -> Vectors:
    """Return J^T J x."""
    _place(parameters, start, ahead)
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for number in range(layer.training):
        out = layer.output(number)
        along = (out.detach() - outputs.get(number)) * layer.mask(number)[..., None]
        for name, gradient in _gradients(out, parameters, along):
            found[name] += gradient
    return found


def _gradients(out: Tensor, parameters: Vectors, weights: Tensor, more: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Give J^T times weights, of the parameters that the batch came to."""
    got = torch.autograd.grad(out, list(parameters.values()), weights, retain_graph=more, allow_unused=True)
    return ((name, gradient.detach()) for name, gradient in zip(parameters, got, strict=True) if gradient is not None)


def _outward(name: str, weight: Tensor, hidden: int) -> int | None:
    """Return the dimension of a parameter that runs over the hidden size; of several that could, as most families do.

    Another would cost rounds and change nothing else.
    """
    usual = {3: 1, 2: 0 if name.endswith(".weight") else 1, 1: 0}[weight.dim()]
    dims = [usual, *range(weight.dim())]
    return next((dim for dim in dims if weight.shape[dim] == hidden and weight.dim() > 1), None)


def _place(parameters: Vectors, start: Vectors, by: Vectors) -> None:
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name] + by[name])


def _dot(a: Vectors, b: Vectors) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))
