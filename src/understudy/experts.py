"""Experts with stand-ins: the family's own experts module, live-subclassed, shrunk to the experts it keeps.

Letters: E experts of the router, K rows of the stacked weights, P constants, T tokens, k routes of a token, H hidden
size.

The class of the live object is swapped for a subclass instead of wrapping the module: parameter names stay what they
were, so weight converters, every experts implementation of transformers, adapters and sharding go on working. Routes to
experts without a row reach the family's code as the id K, which transformers reserves for experts that live elsewhere
and which costs no matrix product. Experts that keep only some of their neurons live in children of the family's own
class, one for each width. Everything is addressed by original ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from understudy.channels import sliced
from understudy.standins import MERGED, SLIM, StandIn, impossible


class StandInExperts:
    """Mixin over a family's experts class: every expert answers as what it has become, under the router's own weights.

    The gate, the order of the top-k and their normalisation are untouched: a constant is multiplied by the gate as the
    expert would be (MoNE, arXiv 2507.00390, section 3.4), the gates of experts that were merged add up.
    """

    stand_ins: dict[int, StandIn]  # by original id, ascending; experts that are not named stay as they were
    kept: tuple[int, ...]  # original ids that own the rows of the stacked weights, ascending
    rows: dict[int, int]  # original id to row; a merged expert shares the row of the one that stands for it
    replaced: tuple[int, ...]  # original ids of the rows of `constants`
    slim: Any  # nn.ModuleList of experts of fewer neurons, a child for each width, ascending; their `kept` are ids
    num_logical_experts: int
    logical_width: int  # neurons of an expert before any lost some
    constants: nn.Parameter | None  # [P, H]
    _maps: dict[torch.device, list[torch.Tensor]]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Combine what the experts answer: hidden `[T, H]`, original ids `[T, k]`, gates `[T, k]` to `[T, H]`."""
        rows, columns, children, places = self._route_maps(hidden_states.device)
        row_Tk, gate_Tk = rows[top_k_index], top_k_weights
        if len(self.kept) < len(self.rows):
            row_Tk, gate_Tk = _joined(row_Tk, gate_Tk, len(self.kept))
        out_TH = _run(self, super().forward, hidden_states, row_Tk, gate_Tk)  # type: ignore[misc]  # a mixin
        more_TH = None  # summed in float32, as vLLM does
        if self.constants is not None:
            # One column more than constants, to swallow the routes that have none.
            gate_TP = top_k_weights.new_zeros((hidden_states.shape[0], len(self.replaced) + 1), dtype=torch.float32)
            gate_TP = gate_TP.scatter_add(1, columns[top_k_index], top_k_weights.float())
            more_TH = gate_TP[:, :-1] @ self.constants.float()
        child_Tk, place_Tk = children[top_k_index], places[top_k_index]
        for number in self._asked(child_Tk):
            child = self.slim[number]
            token_N, slot_N = (child_Tk == number).nonzero(as_tuple=True)
            place_N1, gate_N1 = place_Tk[token_N, slot_N, None], top_k_weights[token_N, slot_N, None]
            if not len(token_N):  # any token, by a route that leads elsewhere: its weights get gradients of zero
                token_N, gate_N1 = token_N.new_zeros(1), top_k_weights[:1, :1]
                place_N1 = torch.full_like(token_N, len(child.kept))[:, None]
            slim_NH = _run(child, child, hidden_states[token_N], place_N1, gate_N1).float()
            if more_TH is None:
                more_TH = torch.zeros_like(hidden_states, dtype=torch.float32)
            more_TH = more_TH.index_add(0, token_N, slim_NH)
        return out_TH if more_TH is None else out_TH + more_TH.to(out_TH.dtype)

    def _route_maps(self, device: torch.device) -> list[torch.Tensor]:
        """Original id to row of the stacked weights, to column of constants, to child, and to row there, `[E]` each.

        One past the last row, column or child stands for none.
        """
        if device not in self._maps:
            child = {e: number for number, child in enumerate(self.slim) for e in child.kept}
            place = {e: row for child in self.slim for e, row in _numbered(child.kept).items()}
            known = [(self.rows, len(self.kept)), (_numbered(self.replaced), len(self.replaced))]
            maps = []
            for by_id, none in [*known, (child, len(self.slim)), (place, 0)]:
                found = torch.full((self.num_logical_experts,), none)
                found[list(by_id)] = torch.tensor(list(by_id.values()), dtype=torch.long)
                maps.append(found.to(device))
            self._maps[device] = maps
        return self._maps[device]

    def _asked(self, child_Tk: torch.Tensor) -> list[int]:
        """Which children to run: those that a route leads to; all in training, where each must get its gradients."""
        if torch.is_grad_enabled() or not len(self.slim):
            return list(range(len(self.slim)))
        return [number for number in child_Tk.unique().tolist() if number < len(self.slim)]

    def slim_place(self, expert: int) -> tuple[Any, int]:
        """Return the module that holds an expert of fewer neurons, and its row there.

        That is one of the children, or the module itself where no expert of full width is left.
        """
        assert self.stand_ins[expert].format == SLIM
        for child in self.slim:
            if expert in child.kept:
                return child, child.kept.index(expert)
        return self, self.rows[expert]

    def constant_row(self, expert: int) -> int:
        """Return the row of `constants` that belongs to an expert."""
        return self.replaced.index(expert)

    def chosen(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """Count routes to each expert, int64 `[E]`; a token that chose several of a merged group passes it once."""
        rows = self._route_maps(top_k_index.device)[0]
        row_Tk = rows[top_k_index]
        again_Tk = (row_Tk != len(self.kept)) & ~_first(row_Tk)
        return torch.bincount(top_k_index[~again_Tk].reshape(-1), minlength=self.num_logical_experts)


def _run(
    experts: Any, forward: Callable[..., torch.Tensor], hidden_TH: torch.Tensor, row_Tk: torch.Tensor, gate_Tk: Any
) -> torch.Tensor:
    """Run the family's forward on the routes that lead to a row of `experts`; the others lead to one past the last."""
    count = len(experts.kept)
    gate_Tk = gate_Tk.masked_fill(row_Tk == count, 0)
    # A module without a config runs a loop of its own.
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"
    if implementation == "grouped_mm" and not _aligned(experts):
        own_loops = (getattr(cls.__dict__.get("forward"), "__wrapped__", None) for cls in type(experts).__mro__)
        forward, implementation = partial(next(filter(None, own_loops)), experts), "eager"
    if implementation == "eager":
        # Some families' own loops reject the reserved id; there such a route runs any expert at weight zero.
        row_Tk = row_Tk.clamp(max=count - 1)
    return forward(hidden_TH, row_Tk, gate_Tk)


def _aligned(experts: Any) -> bool:
    """Whether torch's grouped product takes the weights, whose rows must be multiples of 16 bytes long."""
    down = experts.down_proj
    width = down.shape[1] if getattr(experts, "is_transposed", False) else down.shape[2]
    return width * down.element_size() % 16 == 0


def _numbered(ids: tuple[int, ...]) -> dict[int, int]:
    return {expert: row for row, expert in enumerate(ids)}


def _first(row_Tk: torch.Tensor) -> torch.Tensor:
    """Whether a route is the first of its token that leads to its row, `[T, k]`."""
    same_Tkk = row_Tk[:, :, None] == row_Tk[:, None, :]
    return ~same_Tkk.tril(-1).any(-1)


def _joined(row_Tk: torch.Tensor, gate_Tk: torch.Tensor, none: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one route of those of a token that lead to the same row, their gates added; the others lead to `none`."""
    same_Tkk = row_Tk[:, :, None] == row_Tk[:, None, :]
    sum_Tk = (same_Tkk * gate_Tk[:, None, :].float()).sum(-1).to(gate_Tk.dtype)
    first_Tk = _first(row_Tk)
    return row_Tk.masked_fill(~first_Tk, none), torch.where(first_Tk, sum_Tk, torch.zeros_like(sum_Tk))


_SUBCLASSES: dict[type, type] = {}  # one for each family, so that equal modules have equal classes


def _subclass(cls: type) -> type:
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(f"StandIn{cls.__name__}", (StandInExperts, cls), {"__module__": cls.__module__})
    return _SUBCLASSES[cls]


def copied(experts: Any) -> Any:
    """Return a copy of a module that can be changed without the original: same tensors, own tables of them."""
    made = copy.copy(experts)
    made.__dict__.pop("forward", None)  # an observer's
    for store in ("_parameters", "_buffers", "_modules"):
        made.__dict__[store] = dict(made.__dict__[store])
    return made


def install(experts: Any, stand_ins: Mapping[int, StandIn], num_experts: int) -> None:
    """Turn a live experts module into one whose experts are what `stand_ins` says, in place.

    On the meta device or a real one: stacked weights lose the rows of experts that own none; a merged group keeps the
    row of the expert that stands for it; experts of fewer neurons start with their first ones; `constants` `[P, H]`
    start as zeros, in the dtype of the weights. Where no expert of full width is left, the stacked weights hold the
    widest of the others, so that a loader that does not know of stand-ins always finds weights of another shape.
    """
    assert impossible(stand_ins, num_experts) is None and not isinstance(experts, StandInExperts)
    by_width: dict[int, list[int]] = {}
    for expert, stand_in in sorted(stand_ins.items()):
        if stand_in.width is not None:
            by_width.setdefault(stand_in.width, []).append(expert)
    kept = [e for e in range(num_experts) if e not in stand_ins or stand_ins[e].into == e]
    widest = None if kept else max(by_width)
    children = [_slim(experts, ids, width) for width, ids in sorted(by_width.items()) if width != widest]
    constants = tuple(e for e, s in sorted(stand_ins.items()) if s.constant)
    down = experts.down_proj
    width, hidden = down.shape[1:] if getattr(experts, "is_transposed", False) else reversed(down.shape[1:])
    if widest is not None:
        kept = by_width[widest]
        narrow = _slim(experts, kept, widest)
        sizes = {name: value for name, value in vars(narrow).items() if type(value) is int}
        experts._parameters.update(narrow._parameters)
        experts.__dict__.update(sizes)
        experts.__class__ = type(narrow)  # which may be one for awkward widths
    else:
        _keep_rows(experts, kept, num_experts)
    zeros = torch.zeros(len(constants), hidden, dtype=down.dtype, device=down.device)
    experts.register_parameter("constants", nn.Parameter(zeros, down.requires_grad) if constants else None)
    experts.slim = nn.ModuleList(children)
    experts.stand_ins = dict(sorted(stand_ins.items()))
    experts.kept, experts.replaced, experts.num_logical_experts = tuple(kept), constants, num_experts
    experts.logical_width = width
    experts.rows = _numbered(experts.kept)
    experts.rows |= {e: experts.rows[s.into] for e, s in stand_ins.items() if s.format == MERGED and s.into is not None}
    experts.num_experts = len(kept)
    experts._is_expert_parallel = True  # makes the id K legal: "an expert of another rank"
    experts._maps = {}
    experts.__class__ = _subclass(type(experts))


def _slim(experts: Any, ids: list[int], width: int) -> Any:
    made = sliced(experts, ids, torch.arange(width).expand(len(ids), width))
    made.kept = tuple(ids)
    return made


def _keep_rows(experts: Any, kept: list[int], num_experts: int) -> None:
    for name, weight in list(experts._parameters.items()):
        if weight is not None and weight.dim() and weight.shape[0] == num_experts:
            shrunk = weight.detach()[torch.tensor(kept, device=weight.device)]
            experts._parameters[name] = nn.Parameter(shrunk, requires_grad=weight.requires_grad)
