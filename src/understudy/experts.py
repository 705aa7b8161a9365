"""Experts with stand-ins: the family's own experts module, live-subclassed, shrunk to the experts it keeps.

Letters: E experts of the router, K rows of the stacked weights, P constants, T tokens, k routes of a token, H hidden
size.

The class of the live object is swapped for a subclass instead of wrapping the module: parameter names stay what they
were, so weight converters, every experts implementation of transformers, adapters and sharding go on working. Routes to
experts without a row reach the family's code as the id K, which transformers reserves for experts that live elsewhere
and which costs no matrix product. Experts that keep only some of their neurons live in children of the family's own
class, one for each width, affine maps in children of their own, one for each rank, and experts that share bases in one
more. Everything is addressed by original ids.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from understudy.adapters import Adapters
from understudy.affine import affine_maps
from understudy.bases import shared_experts
from understudy.channels import sliced
from understudy.grouped import Picks, Stack, answers, beside, rows_of
from understudy.modulated import Modulation, scaled_answers
from understudy.seam import first, implementation_of, joined, run
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
    thin: Any  # nn.ModuleList of `AffineMaps`, a child for each rank, ascending; their `kept` are ids
    bases: Any  # `SharedExperts` of those that share bases, or None
    adapters: Adapters | None  # low-rank parts of the experts with rows, while they are trained
    modulation: Modulation | None  # which routes of a token run, and vectors for the others
    num_logical_experts: int
    logical_width: int  # neurons of an expert before any lost some
    constants: nn.Parameter | None  # [P, H]
    _maps: dict[torch.device, list[torch.Tensor]]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Combine what the experts answer: hidden `[T, H]`, original ids `[T, k]`, gates `[T, k]` to `[T, H]`."""
        rows, columns, children, places, shared, keys, through = self._route_maps(hidden_states.device)
        id_Tk, gate_Tk, scales = top_k_index, top_k_weights, None
        if self.modulation is not None:
            hidden_states, id_Tk, gate_Tk, scales = self.modulation(hidden_states, id_Tk, gate_Tk, keys, self._merged)
        own_Tk, row_Tk = gate_Tk, rows[id_Tk]
        if self._merged:
            row_Tk, gate_Tk = joined(row_Tk, gate_Tk, len(self.kept))
        side_by_side = self._side_by_side()
        if side_by_side:
            out_TkH = beside([self, *self.slim], hidden_states, through[id_Tk], own_Tk)
            out_TH = out_TkH.sum(1).to(hidden_states.dtype)
        elif self._in_parts():
            out_TkH = self._apart(hidden_states, row_Tk, gate_Tk, scales)
            if self.bases is not None:  # all routes of a token are summed at once, as by those who have all experts
                out_TkH = self.bases.routed(hidden_states, shared[id_Tk], own_Tk, out_TkH)
            out_TH = out_TkH.sum(1).to(hidden_states.dtype)
        else:
            out_TH = run(self, super().forward, hidden_states, row_Tk, gate_Tk)  # type: ignore[misc]  # a mixin
            if self.bases is not None:
                out_TH = out_TH + self.bases(hidden_states, shared[id_Tk], own_Tk).to(out_TH.dtype)
        child_Tk, place_Tk = children[id_Tk], places[id_Tk]
        more_TH = None  # summed in float32, as vLLM does
        if self.constants is not None:
            # One column more than constants, to swallow the routes that have none.
            gate_TP = top_k_weights.new_zeros((hidden_states.shape[0], len(self.replaced) + 1), dtype=torch.float32)
            if self.modulation is not None:  # main ones stay in front
                id_Tk, own_Tk = self.modulation.with_free(id_Tk, own_Tk, top_k_index, top_k_weights, keys)
            gate_TP = gate_TP.scatter_add(1, columns[id_Tk], own_Tk.float())
            more_TH = (gate_TP[:, :-1] @ self.constants.float()).float()  # autocast multiplies in less
        for number in self._asked(child_Tk, len(self.slim) if side_by_side else 0):
            child = self._children[number]
            token_N, slot_N = (child_Tk == number).nonzero(as_tuple=True)
            place_N1, gate_N1 = place_Tk[token_N, slot_N, None], own_Tk[token_N, slot_N, None]
            if not len(token_N):  # any token, by a route that leads elsewhere: its weights get gradients of zero
                token_N, gate_N1 = token_N.new_zeros(1), own_Tk[:1, :1]
                place_N1 = torch.full_like(token_N, len(child.kept))[:, None]
            own_NH = run(child, child, hidden_states[token_N], place_N1, gate_N1).float()
            if more_TH is None:
                more_TH = torch.zeros_like(hidden_states, dtype=torch.float32)
            more_TH = more_TH.index_add(0, token_N, own_NH)
        return out_TH if more_TH is None else out_TH + more_TH.to(out_TH.dtype)

    def _in_parts(self) -> bool:
        """Whether the stacked weights run here and not in the family's forward.

        They must where something is added before their gating function, or their projections are not given the same;
        beside bases this saves a pass over all routes.
        """
        if self.modulation is not None and self.modulation.vectors > 1:
            return True
        if self.adapters is not None or self.bases is None:
            return self.adapters is not None
        return self.bases.originals is not None or implementation_of(self) == "grouped_mm"

    def _side_by_side(self) -> bool:
        """Whether experts of all widths share one pass over the routes that lead to them.

        With gradients each width needs its own; where all routes lead to the stacked weights, the family's is as good.
        """
        apart = len(self.slim) > 0 or len(self.thin) > 0 or self.constants is not None
        alone = self.bases is None and self.adapters is None and not self._merged and not torch.is_grad_enabled()
        alone &= self.modulation is None or self.modulation.vectors == 1
        return apart and alone and implementation_of(self) == "grouped_mm"

    @property
    def _children(self) -> list[Any]:
        """Experts of fewer neurons, then affine maps."""
        return [*self.slim, *self.thin]

    @property
    def _merged(self) -> bool:
        """Whether experts share a row."""
        return len(self.kept) < len(self.rows)

    def _apart(
        self, hidden_TH: torch.Tensor, row_Tk: torch.Tensor, gate_Tk: torch.Tensor, scales: Any = None
    ) -> torch.Tensor:
        """Run the stacked weights and what is trained on top of them; what each route adds, `[T, k, H]`."""
        picks = Picks.of(row_Tk, len(self.kept))
        if scales:
            return picks.spread(scaled_answers(self, hidden_TH, scales, self.adapters, picks), gate_Tk)
        answer_NH = answers(self, rows_of(hidden_TH, picks.token_N), [Stack(self, picks)], self.adapters, picks)
        return picks.spread(answer_NH, gate_Tk)

    def _route_maps(self, device: torch.device) -> list[torch.Tensor]:
        """Original id to row of the stacked weights, to column of constants, to child, to row there, to row of the
        adapters of shared bases, to what tells its weights from others, -1 for none, and to row when those of slim
        children are numbered through after the stacked ones: `[E + 1]` each.

        One past the last row, column or child stands for none, as does the id E.
        """
        if device not in self._maps:
            child = {e: number for number, child in enumerate(self._children) for e in child.kept}
            place = {e: row for child in self._children for e, row in _numbered(child.kept).items()}
            known = [(self.rows, len(self.kept)), (_numbered(self.replaced), len(self.replaced))]
            shared = _numbered(self.bases.replaced) if self.bases is not None else {}
            known += [(child, len(self._children)), (place, 0), (shared, len(shared))]
            apart = {e: len(self.kept) + e for e in (*child, *shared)}
            through = _numbered((*self.kept, *(e for child in self.slim for e in child.kept)))
            maps = []
            for by_id, none in [*known, ({**self.rows, **apart}, -1), (through, len(through))]:
                found = torch.full((self.num_logical_experts + 1,), none)
                found[list(by_id)] = torch.tensor(list(by_id.values()), dtype=torch.long)
                maps.append(found.to(device))
            self._maps[device] = maps
        return self._maps[device]

    def _asked(self, child_Tk: torch.Tensor, first: int = 0) -> list[int]:
        """Which children to run, from the first on: those that a route leads to; all in training, where each must get
        its gradients."""
        count = len(self._children)
        if torch.is_grad_enabled() or count <= first:
            return list(range(first, count))
        return [number for number in child_Tk.unique().tolist() if first <= number < count]

    def slim_place(self, expert: int) -> tuple[Any, int]:
        """Return the module that holds an expert of fewer neurons, and its row there.

        That is one of the children, or the module itself where no expert of full width is left.
        """
        assert self.stand_ins[expert].format == SLIM
        for child in self.slim:
            if expert in child.kept:
                return child, child.kept.index(expert)
        return self, self.rows[expert]

    def thin_place(self, expert: int) -> tuple[Any, int]:
        """Return the `AffineMaps` that hold an expert's map, and its row there."""
        return next((child, child.kept.index(expert)) for child in self.thin if expert in child.kept)

    def constant_row(self, expert: int) -> int:
        """Return the row of `constants` that belongs to an expert."""
        return self.replaced.index(expert)

    def chosen(self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Count routes to each expert that run, int64 `[E]`; several of a token to a merged group count once."""
        rows, *_, keys, _ = self._route_maps(top_k_index.device)
        if self.modulation is not None:
            main = self.modulation.split(top_k_index, top_k_weights, keys, self._merged)[:2]
            top_k_index, _ = self.modulation.with_free(*main, top_k_index, top_k_weights, keys)
        row_Tk = rows[top_k_index]
        again_Tk = (row_Tk != len(self.kept)) & ~first(row_Tk)
        none = self.num_logical_experts
        return torch.bincount(top_k_index[~again_Tk].reshape(-1), minlength=none)[:none]


def _numbered(ids: tuple[int, ...]) -> dict[int, int]:
    return {expert: row for row, expert in enumerate(ids)}


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
    start as zeros, in the dtype of the weights, as do affine maps; experts that share bases start with the weights of
    the first of their group. Without any stand-in all stays as it is, but for what may be trained on top of it. Where
    no expert of full width is left, the stacked weights hold the widest of the others, so that a loader that does not
    know of stand-ins always finds weights of another shape.
    """
    assert not stand_ins or impossible(stand_ins, num_experts) is None
    assert not isinstance(experts, StandInExperts)
    by_width: dict[int, list[int]] = {}
    for expert, stand_in in sorted(stand_ins.items()):
        if stand_in.width is not None:
            by_width.setdefault(stand_in.width, []).append(expert)
    kept = [e for e in range(num_experts) if e not in stand_ins or _owns_row(e, stand_ins[e])]
    widest = None if kept else max(by_width)
    children = [_slim(experts, ids, width) for width, ids in sorted(by_width.items()) if width != widest]
    bases = shared_experts(experts, stand_ins)
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
    elif len(kept) < num_experts:
        _keep_rows(experts, kept, num_experts)
    zeros = torch.zeros(len(constants), hidden, dtype=down.dtype, device=down.device)
    experts.register_parameter("constants", nn.Parameter(zeros, down.requires_grad) if constants else None)
    experts.slim, experts.thin = nn.ModuleList(children), affine_maps(stand_ins, hidden, down)
    experts.bases, experts.adapters, experts.modulation = bases, None, None
    experts.stand_ins = dict(sorted(stand_ins.items()))
    experts.kept, experts.replaced, experts.num_logical_experts = tuple(kept), constants, num_experts
    experts.logical_width = width
    experts.rows = _numbered(experts.kept)
    experts.rows |= {e: experts.rows[s.into] for e, s in stand_ins.items() if s.format == MERGED and s.into is not None}
    experts.num_experts = len(kept)
    # makes the id K legal, "an expert of another rank", for two more passes over what all routes answer
    experts._is_expert_parallel = bool(stand_ins)
    experts._maps = {}
    experts.__class__ = _subclass(type(experts))


def modulate(experts: Any, num_experts: int, main_k: int, vectors: int, renormalise: bool) -> None:
    """Let a live experts module run `main_k` routes of a token and make vectors of the others, in place.

    Stand-ins must be installed before; without any, the module becomes one that could have them. Vectors change nothing
    yet.
    """
    if not isinstance(experts, StandInExperts):
        install(experts, {}, num_experts)
    assert vectors == 1 or not (len(experts._children) or experts.bases is not None)
    experts.modulation = Modulation(experts, num_experts, main_k, vectors, renormalise)


def _owns_row(expert: int, stand_in: StandIn) -> bool:
    return stand_in.format == MERGED and stand_in.into == expert


def parts_of(experts: Any) -> dict[str, nn.Module]:
    """Return the modules inside one with stand-ins that hold weights of their own, by name: `slim.0`, `bases`."""
    lists = {name: getattr(experts, name, ()) for name in ("slim", "thin")}
    found = {f"{name}.{number}": child for name, of in lists.items() for number, child in enumerate(of)}
    if getattr(experts, "bases", None) is not None:
        found |= {"bases": experts.bases, "bases.adapters": experts.bases.adapters}
    return found


def _slim(experts: Any, ids: list[int], width: int) -> Any:
    made = sliced(experts, ids, torch.arange(width).expand(len(ids), width))
    made.kept = tuple(ids)
    return made


def _keep_rows(experts: Any, kept: list[int], num_experts: int) -> None:
    for name, weight in list(experts._parameters.items()):
        if weight is not None and weight.dim() and weight.shape[0] == num_experts:
            shrunk = weight.detach()[torch.tensor(kept, device=weight.device)]
            experts._parameters[name] = nn.Parameter(shrunk, requires_grad=weight.requires_grad)
