"""Neurons of experts: find, read, write and slice them in any family's experts module, live or on the meta device.

Letters: E experts, I width of an expert, H width of what enters and leaves it. A neuron (channel, atomic expert) is row
k of the gate and up projections with their biases and column k of the down projection; an expert is the sum of its
neurons plus what belongs to none (the bias of the down projection).

Families stack their projections fused or apart, concatenated or interleaved, transposed or not, with biases or without,
gated or not. Names tell the parts, flags or shapes tell the orientation, and which rows of a fused projection feed a
neuron is found by running the family's own gating function on a few numbers.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import UnsupportedModelError

_ALIGNED = 8  # neurons: 16 bytes in the smallest dtype that is run
_PROBE = 0.2  # small enough to stay clear of every family's clamp


@dataclass(frozen=True)
class _Part:
    """Where one part of every neuron is: which parameter `[E, ...]`, which dimension, which places along it."""

    role: str  # gate, up, down, gate_bias, up_bias
    parameter: str
    dim: int
    place: int = 0  # of a fused parameter: which half, or which of a pair
    fused: bool = False
    interleaved: bool = False

    def view(self, weight: Tensor) -> Tensor:
        """Return the part of all neurons as a view `[E, I, n]`."""
        if self.fused:
            apart, along = self._apart(weight)
            weight = apart.select(2 * self.dim + 1 - along, self.place)
        return weight.movedim(self.dim, 1) if weight.dim() == 3 else weight.unsqueeze(2)

    def widened(self, weight: Tensor, more: int) -> Tensor:
        """Return the parameter with more neurons at the end, all zeros."""
        apart, along = self._apart(weight)
        shape = list(apart.shape)
        shape[along] = more
        wide = torch.cat((apart, apart.new_zeros(shape)), along)
        return wide.flatten(self.dim, self.dim + 1) if self.fused else wide

    def _apart(self, weight: Tensor) -> tuple[Tensor, int]:
        """Return the parameter with gate and up along a dimension of their own, and the dimension of the neurons."""
        if not self.fused:
            return weight, self.dim
        if self.interleaved:
            return weight.unflatten(self.dim, (-1, 2)), self.dim
        return weight.unflatten(self.dim, (2, -1)), self.dim + 1


class AlignedExperts:
    """Mixin over a family's experts class for a width that grouped matrix kernels refuse: they want rows of 16 bytes.

    Neurons of zeros are added for the time of a call, which changes no answer and costs a copy of the weights.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the family's own forward."""
        more = -channel_width(self) % _ALIGNED
        parts = {part.parameter: part for part in _parts(self)}
        wide = {name: part.widened(getattr(self, name), more) for name, part in parts.items()}
        self.__dict__.update(wide)  # hides the parameters, which stay where they are
        try:
            out: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]  # mixin
        finally:
            for name in wide:
                del self.__dict__[name]
        return out


def channel_width(experts: Any) -> int:
    """Return I, the neurons of each expert.

    Raises:
        UnsupportedModelError: the weights do not tell.
    """
    down = next(part for part in _parts(experts) if part.role == "down")
    return int(experts.down_proj.shape[down.dim])


def channel_views(experts: Any) -> dict[str, Tensor]:
    """Return the parts of all neurons as views into the parameters, `[E, I, n]` by role.

    Roles come in the order of `neurons`: gate, up, down, gate_bias, up_bias; those that the family has.
    """
    return {part.role: part.view(getattr(experts, part.parameter).detach()) for part in _parts(experts)}


def neurons(experts: Any, row: int) -> Tensor:
    """Return every neuron of one expert as a vector: `[I, D]`, gate row | up row | down column | biases."""
    return torch.cat([view[row] for view in channel_views(experts).values()], 1)


def set_neurons(experts: Any, row: int, values: Tensor) -> None:
    """Write what `neurons` gives, `[I, D]`, into one expert."""
    views = channel_views(experts)
    for view, value in zip(views.values(), values.split([view.shape[2] for view in views.values()], 1), strict=True):
        view[row].copy_(value)


def rest(experts: Any, row: int) -> Tensor:
    """Return what belongs to an expert but to none of its neurons, `[D]`: the bias of the down projection, or nothing.

    A norm that all experts share is not in it.
    """
    found = [weight[row].flatten() for weight in _rest(experts)]
    return torch.cat(found) if found else experts.down_proj.new_zeros(0).detach()


def set_rest(experts: Any, row: int, values: Tensor) -> None:
    """Write what `rest` gives, `[D]`, into one expert."""
    weights = _rest(experts)
    assert values.numel() == sum(weight[row].numel() for weight in weights)
    for weight, value in zip(weights, values.split([w[row].numel() for w in weights]), strict=False):
        weight[row].copy_(value.view_as(weight[row]))


def projections(experts: Any, projected: Tensor) -> dict[str, Tensor]:
    """Return gate and up of what the experts' first matrices put out: `[n, I]` by role, views into `[n, 2I]`.

    Ungated experts have up alone.
    """
    if experts._parameters.get("gate_up_proj") is None:
        there = (role for role in ("gate", "up") if experts._parameters.get(f"{role}_proj") is not None)
        return dict.fromkeys(there, projected)
    gate, up, interleaved = _feeding(experts)
    apart, dim = (projected.unflatten(1, (-1, 2)), 2) if interleaved else (projected.unflatten(1, (2, -1)), 1)
    return {"gate": apart.select(dim, gate), "up": apart.select(dim, up)}


def channel_bytes(experts: Any, element_bytes: Mapping[str, int]) -> int:
    """Return the bytes of one neuron, given the bytes of an element of each parameter by name."""
    views = channel_views(experts)
    return sum(views[part.role].shape[2] * element_bytes[part.parameter] for part in _parts(experts))


def sliced(experts: Any, ids: Sequence[int], channels: Tensor) -> Any:
    """Return a new experts module of the family's class with rows `ids`, each with its neurons `channels`, in order.

    Args:
        experts: a live module, or one on the meta device; it is left as it is.
        ids: rows of the new module, n of them.
        channels: neurons of each row, integer `[n, w]`.

    A child that holds weights of its own (a norm after the experts) is shared with the original and not registered in
    the new module, so that it is saved once. The id n is legal in the new module and costs nothing. A width that is no
    multiple of 8 works, but slower, see `AlignedExperts`.
    """
    assert channels.shape[0] == len(ids)
    count, width = channels.shape
    before = num_experts(experts), channel_width(experts)
    made = _shell(experts)
    rows = torch.tensor(list(ids), dtype=torch.long, device="cpu")
    parts = _parts(experts)
    for name, weight in _stacked(experts).items():
        shape = [count, *weight.shape[1:]]
        for part in parts:
            if part.parameter == name:
                shape[part.dim] = width * (2 if part.fused else 1)
        new = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        mine = [part for part in parts if part.parameter == name]
        for part in mine:
            where = (rows[:, None].to(weight.device), channels.to(weight.device))
            part.view(new).copy_(part.view(weight.detach())[where])
        if not mine:
            new.copy_(weight.detach()[rows.to(weight.device)])
        made._parameters[name] = nn.Parameter(new, requires_grad=weight.requires_grad)
    _resize(made, before, (count, width))
    if width % _ALIGNED:
        cls: type = type(made)
        made.__class__ = _aligned(cls)
    return made


@torch.no_grad()
def run_first(experts: Any, hidden: Tensor) -> Tensor:
    """Return what the first expert of a module answers tokens `[n, H]`, before any gate: `[n, H]` float32."""
    tokens = hidden.to(experts.down_proj.dtype)
    first = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
    answer: Tensor = experts(tokens, first, torch.ones_like(first, dtype=tokens.dtype))
    return answer.float()


@functools.cache
def _aligned(cls: type) -> type:
    if issubclass(cls, AlignedExperts):
        return cls
    return type(f"Aligned{cls.__name__}", (AlignedExperts, cls), {"__module__": cls.__module__})


def num_experts(experts: Any) -> int:
    """Return E, the rows of the stacked weights."""
    return int(experts.down_proj.shape[0])


def _shell(experts: Any) -> Any:
    """Copy a module without its weights; what is changed in the copy does not show in the original."""
    made = copy.copy(experts)
    made.__dict__.pop("forward", None)  # an observer's
    for store in ("_parameters", "_buffers", "_modules"):
        made.__dict__[store] = dict(made.__dict__[store])
    for name, child in list(made._modules.items()):
        if child is not None and next(child.parameters(), None) is not None:
            del made._modules[name]
            made.__dict__[name] = child
    return made


def _resize(made: Any, before: tuple[int, int], after: tuple[int, int]) -> None:
    """Set the sizes that a family's own loop may read: the number of experts and their width, whatever their names."""
    for name, value in list(vars(made).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if re.search(r"(intermediate|inner|ffn|expert).*(size|dim|width)", name):
            if value == before[1]:
                setattr(made, name, after[1])
        elif "expert" in name and value == before[0]:
            setattr(made, name, after[0])
    made._is_expert_parallel = True  # makes the id past the last legal: "an expert of another rank"


def _stacked(experts: Any) -> dict[str, Tensor]:
    """Return the family's parameters with a row for each expert."""
    own = {name: weight for name, weight in experts._parameters.items() if weight is not None and name != "constants"}
    return {name: weight for name, weight in own.items() if weight.dim() and weight.shape[0] == num_experts(experts)}


def _rest(experts: Any) -> list[Tensor]:
    named = {part.parameter for part in _parts(experts)}
    return [weight.detach() for name, weight in _stacked(experts).items() if name not in named]


def _parts(experts: Any) -> list[_Part]:
    weights = _stacked(experts)
    fused = "gate_up_proj" in weights
    transposed = _is_transposed(experts, fused)
    inner, outer = (2, 1) if transposed else (1, 2)  # the dimension of neurons before and after the activation
    found = [_Part("down", "down_proj", outer)]
    if fused:
        gate, up, interleaved = _feeding(experts)
        for role, place in (("gate", gate), ("up", up)):
            found.append(_Part(role, "gate_up_proj", inner, place, True, interleaved))
            found.append(_Part(f"{role}_bias", "gate_up_proj_bias", 1, place, True, interleaved))
    else:
        for role in ("gate", "up"):
            found.append(_Part(role, f"{role}_proj", inner))
            found.append(_Part(f"{role}_bias", f"{role}_proj_bias", 1))
    order = ("gate", "up", "down", "gate_bias", "up_bias")
    there = sorted((p for p in found if p.parameter in weights), key=lambda part: order.index(part.role))
    widths = {part.view(weights[part.parameter]).shape[1] for part in there}
    if len(widths) != 1:
        shapes = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in weights.items())
        raise _unclear(experts, f"its weights disagree about the number of neurons ({shapes})")
    return there


def _is_transposed(experts: Any, fused: bool) -> bool:
    flag = getattr(experts, "is_transposed", None)
    if flag is None and fused:  # then the shapes tell: [E, 2I, H] beside [E, H, I], or [E, H, 2I] beside [E, I, H]
        up, down = experts.gate_up_proj, experts.down_proj
        return bool(up.shape[2] == 2 * down.shape[1])
    return bool(flag)


_FEEDING: dict[type, tuple[int, int, bool]] = {}  # asked again at every call of experts of an awkward width


def _feeding(experts: Any) -> tuple[int, int, bool]:
    if type(experts) not in _FEEDING:
        _FEEDING[type(experts)] = _find_feeding(experts)
    return _FEEDING[type(experts)]


def _find_feeding(experts: Any) -> tuple[int, int, bool]:
    """Find which rows of a fused projection are gates: places of gate and up, and whether they are interleaved.

    Two neurons are run with each of their four inputs moved up and down in turn. A neuron is affine in its up input,
    which the activation only multiplies, and bent in its gate.
    """
    apply = getattr(experts, "_apply_gate", None)
    if apply is None:
        raise _unclear(experts, "it has no _apply_gate to tell the gate from the up projection")
    with torch.no_grad():
        steps = torch.tensor([-_PROBE, 0.0, _PROBE], dtype=torch.float32, device="cpu")  # whatever the module's own
        inputs = steps.new_full((4, 3, 4), _PROBE)
        inputs[range(4), :, range(4)] = steps
        low, middle, high = apply(inputs.flatten(0, 1)).double().view(4, 3, 2).unbind(1)
    moved = (high - low).abs() > 1e-6  # [input, neuron]
    bent = (high + low - 2 * middle).abs() > 1e-5
    feeding = moved[:, 0].nonzero().flatten().tolist()
    if feeding not in ([0, 1], [0, 2]) or (moved.sum(1) != 1).any():
        raise _unclear(experts, "its gating function does not take two inputs for each neuron")
    interleaved = feeding == [0, 1]
    gate_last = bool(bent[feeding[1], 0]) and not bool(bent[feeding[0], 0])
    return int(gate_last), int(not gate_last), interleaved


def _unclear(experts: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the neurons of {type(experts).__name__} cannot be told apart: {why}")
