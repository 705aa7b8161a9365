"""Experts without a router: a few of a layer answer every token, each times a constant.

Source: CD-MoE (arXiv 2412.00069), METHODS 4.3. The block's own forward goes on as before, with its shared experts,
their gates and whatever else the family puts around the seam; only the experts and the router become others.

Letters: T tokens, n experts that stay, I their width, P what the first matrix of one puts out (2I where gated), H
hidden size.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from understudy.grouped import is_transposed
from understudy.moe import MoELayer


class UnroutedExperts:
    """Mixin over a family's experts class: all experts on all tokens as one dense MLP, y = sum of w_e E_e(x)."""

    unrouted: dict[int, float]  # w by original id, ascending
    kept: tuple[int, ...]  # original ids of the rows of the stacked weights
    _weights: dict[Any, Tensor]

    def forward(self, hidden_states: Tensor, *routes: Any, **more: Any) -> Tensor:
        """Add up what the experts answer: hidden `[T, H]` to `[T, H]`; routes are not looked at."""
        if not self.kept:
            return torch.zeros_like(hidden_states)
        experts: Any = self
        weight_n = self._weight(hidden_states)
        n, T = len(self.kept), len(hidden_states)
        if getattr(self, "has_post_expert_norm", False):  # each answer is normalised before it is added: no dense MLP
            index_Tn = torch.arange(n, device=hidden_states.device).expand(T, n)
            out: Tensor = super().forward(hidden_states, index_Tn, weight_n.expand(T, n))  # type: ignore[misc]  # mixin
            return out
        gated = "gate_up_proj" in experts._parameters
        inner = self._first(hidden_states, "gate_up_proj" if gated else "up_proj").view(T * n, -1)
        h = experts._apply_gate(inner) if gated else experts.act_fn(inner)
        h_TnI = h.view(T, n, -1)
        # in place where nobody needs what was there: on a CPU new memory costs more than the product
        h_TnI = h_TnI * weight_n[:, None] if torch.is_grad_enabled() else h_TnI.mul_(weight_n[:, None])
        return self._last(h_TnI, weight_n)

    def _first(self, x_TH: Tensor, name: str) -> Tensor:
        """Multiply by the first matrices of all experts, `[T, n P]`."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        bias = None if bias is None else bias.flatten()
        if not is_transposed(self):
            return nn.functional.linear(x_TH, weight.flatten(0, 1), bias)
        _lay_out(weight)
        return nn.functional.linear(x_TH, weight.permute(1, 0, 2).flatten(1).t(), bias)

    def _last(self, h_TnI: Tensor, weight_n: Tensor) -> Tensor:
        """Multiply by the last matrices of all experts and add up, `[T, H]`."""
        weight: Any = getattr(self, "down_proj")  # noqa: B009 (of the family's class)
        bias = getattr(self, "down_proj_bias", None)
        bias = None if bias is None else weight_n.to(bias.dtype) @ bias
        if is_transposed(self):
            return nn.functional.linear(h_TnI.flatten(1), weight.flatten(0, 1).t(), bias)
        _lay_out(weight)
        return nn.functional.linear(h_TnI.flatten(1), weight.permute(1, 0, 2).flatten(1), bias)

    def _weight(self, like: Tensor) -> Tensor:
        where = (like.device, like.dtype)
        if where not in self._weights:
            self._weights[where] = torch.tensor(list(self.unrouted.values()), dtype=like.dtype, device=like.device)
        return self._weights[where]


class NoExperts(UnroutedExperts, nn.Module):
    """Answers zero: of its layer shared experts alone are left, or nothing.

    What was no expert's own, a norm for all of them, say, keeps its name.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.unrouted, self.kept = {}, ()
        total = experts.down_proj.shape[0]
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name, weight in experts._parameters.items():
            if weight is not None and (not weight.dim() or weight.shape[0] != total):
                self.register_parameter(name, weight)


def _lay_out(weight: Any) -> None:
    """Put a stack `[n, A, B]` in memory as `[A, n, B]`, once, so that it is one matrix without a copy at every call."""
    if weight.shape[0] > 1 and isinstance(weight, nn.Parameter) and not weight.permute(1, 0, 2).is_contiguous():
        weight.data = weight.data.permute(1, 0, 2).contiguous().permute(1, 0, 2)


class SilentRouter(nn.Module):
    """Stands where a router was: it answers nothing, in as many parts as the block takes from it.

    It holds the router's matrix `[0, H]` under its name, at whose shape stock loaders stop.
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return empty tensors."""
        return (hidden_states.new_empty(0),) * self.parts


def install_unrouted(model: Any, name: str, guard: str, weights: Mapping[int, float]) -> None:
    """Put experts without a router into a model, on the meta device or a real one.

    Args:
        model: is changed.
        name: dotted name of the experts module.
        guard: dotted name of the router's matrix.
        weights: w of the experts that stay, by original id.

    Raises:
        AttributeError: the model has no such experts or matrix.
        ValueError: an expert that there is not, or a router that cannot be left out.
    """
    experts: Any = model.get_submodule(name)
    matrix, (place, _, leaf) = model.get_parameter(guard), name.rpartition(".")
    outside = [e for e in weights if not 0 <= e < experts.down_proj.shape[0]]
    if outside:
        raise ValueError(f"expert {outside[0]} is not one of the {experts.down_proj.shape[0]}")
    block = model.get_submodule(place)
    child, *path = guard[len(place) + 1 :].split(".")
    parts, reason = _parts_of(block, child, leaf)
    if reason is not None:
        raise ValueError(reason)
    silent: nn.Module = SilentRouter(parts)
    holder = silent
    for part in path[:-1]:
        holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    holder.register_parameter(path[-1], nn.Parameter(matrix.detach()[:0], requires_grad=False))
    setattr(block, child, silent)
    for own in _kept_for(block, child):  # initialisation looks for it
        empty = getattr(block, own).detach()[:0]
        delattr(block, own)
        block.register_buffer(own, empty, persistent=False)
    if weights:
        leave_few(experts, weights)
    else:  # the family's class could not be without weights
        setattr(block, leaf, NoExperts(experts))


def leave_few(experts: Any, weights: Mapping[int, float]) -> None:
    """Turn a live experts module into one of a few experts, at least one, that answer every token, in place."""
    kept, total = sorted(weights), experts.down_proj.shape[0]
    for key, weight in list(experts._parameters.items()):
        if weight is not None and weight.dim() and weight.shape[0] == total:
            rows = weight.detach()[torch.tensor(kept, dtype=torch.long, device=weight.device)]
            experts._parameters[key] = nn.Parameter(rows, requires_grad=weight.requires_grad)
    for key, value in list(vars(experts).items()):
        if type(value) is int and value == total and "expert" in key:
            setattr(experts, key, len(kept))
    experts.kept, experts.unrouted = tuple(kept), {e: float(weights[e]) for e in kept}
    experts._weights = {}
    experts.__class__ = _subclass(type(experts))


_SUBCLASSES: dict[type, type] = {}  # one for each family, so that equal modules have equal classes


def _subclass(cls: type) -> type:
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(f"Unrouted{cls.__name__}", (UnroutedExperts, cls), {"__module__": cls.__module__})
    return _SUBCLASSES[cls]


# ---- what a block needs of its router, read in its code --------------------------------------------------------


def router_tensors(model: Any, layer: MoELayer, guard: str) -> list[str]:
    """Return the names of the tensors that go with a router: its own, and those that the block keeps for it."""
    child = guard[len(layer.block) + 1 :].split(".")[0]
    block = model.get_submodule(layer.block)
    inside = [f"{child}.{name}" for name in block.get_submodule(child).state_dict()]
    return [f"{layer.block}.{name}" for name in [*inside, *_kept_for(block, child)]]


def why_router_stays(model: Any, layer: MoELayer, guard: str | None) -> str | None:
    """Say why a layer cannot do without its router, or None where it can."""
    if guard is None:
        return "its router has no matrix of a row for each expert"
    child, *path = guard[len(layer.block) + 1 :].split(".")
    if not path:
        return "its router is no module of its own"
    place, _, leaf = layer.block.rpartition(".")
    caller = None if place == layer.stack else (model.get_submodule(place), leaf)
    _, reason = _parts_of(model.get_submodule(layer.block), child, layer.name.rpartition(".")[2])
    if reason is None and caller is not None:
        extra = _returned(_forward_of(model.get_submodule(layer.block)))
        mine = {name for _, names in _assigned(_forward_of(model.get_submodule(layer.block)), child) for name in names}
        if extra & mine and not _thrown_away(*caller):
            reason = f"{type(caller[0]).__name__} goes on with what its router puts out"
    return reason


def _parts_of(block: nn.Module, router: str, experts: str) -> tuple[int, str | None]:
    """Read in how many parts a block takes the answer of its router, and why it needs them, or None.

    What it hands to the experts or returns beside its output does not count.
    """
    kind, tree = type(block).__name__, _forward_of(block)
    taken = [names for _, names in _assigned(tree, router)]
    lengths = {len(names) for names in taken}
    if len(lengths) != 1 or 0 in lengths:
        return 0, f"{kind} calls its router in a way that is not known here"
    returned = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple)]
    passed = {id(n) for call in _calls(tree, experts) for n in ast.walk(call)}
    passed |= {id(e) for value in returned for e in value.elts[1:]}
    loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_read(n) and id(n) not in passed}
    given = {n.id for call in _calls(tree, router) for n in ast.walk(call) if isinstance(n, ast.Name)}
    used = (loaded & {name for names in taken for name in names}) - given
    if used:
        return 0, f"{kind} needs more of its router than which experts to ask ({', '.join(sorted(used))})"
    return lengths.pop(), None


def _kept_for(block: nn.Module, router: str) -> list[str]:
    """Names of the block's own tensors that it hands to its router, a bias for each expert, say."""
    read = {
        n.attr
        for call in _calls(_forward_of(block), router)
        for n in [*ast.walk(call), *_defined(_forward_of(block), call)]
        if isinstance(n, ast.Attribute)
    }
    own = [n for store in (block._parameters, block._buffers) for n, tensor in store.items() if tensor is not None]
    return [name for name in own if name in read and name not in block._non_persistent_buffers_set]


def _defined(tree: ast.AST, call: ast.Call) -> list[ast.AST]:
    """What the names that a call is given are set to."""
    names = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}
    values = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names
    ]
    return [n for value in values for n in ast.walk(value)]


def _forward_of(module: nn.Module) -> ast.AST:
    cls: Any = type(module)
    return _parsed(cls)


@functools.cache
def _parsed(cls: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, SyntaxError):
        return ast.Module(body=[], type_ignores=[])


def _is_read(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Load)


def _calls(tree: ast.AST, child: str) -> list[ast.Call]:
    """Calls of `self.child`."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return [n for n in calls if ast.unparse(n.func) == f"self.{child}"]


def _assigned(tree: ast.AST, child: str) -> list[tuple[ast.Call, list[str]]]:
    """Calls of `self.child`, and the names that their parts are given; none where that cannot be told."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            elements = node.targets[0].elts
            if all(isinstance(e, ast.Name) for e in elements):
                found[id(node.value)] = [e.id for e in elements if isinstance(e, ast.Name)]
    return [(call, found.get(id(call), [])) for call in _calls(tree, child)]


def _returned(tree: ast.AST) -> set[str]:
    """Names that are returned beside the output."""
    tuples = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple)]
    return {e.id for t in tuples for e in t.elts[1:] if isinstance(e, ast.Name)}


def _thrown_away(module: nn.Module, child: str) -> bool:
    """Whether a module does nothing with what its child returns beside the output."""
    tree = _forward_of(module)
    loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_read(n)}
    found = _assigned(tree, child)
    return bool(found) and all(names and not set(names[1:]) & loaded for _, names in found)
