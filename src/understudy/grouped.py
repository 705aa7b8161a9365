"""Run routed tokens through stacked experts by matrix products over all of them at once, with gradients.

Letters: T tokens, k routes of a token, N routes that lead to some row, sorted by row; G rows of a stack, D and O width
of what enters and leaves a matrix, H hidden size.

This is what transformers' grouped implementation does, in parts that can be put together in other ways: the products of
several stacks added up, with low-rank parts on top, before the family's own gating function. Done with one stack alone
and summed over the routes, it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from understudy.adapters import Adapters

_ALIGNED = 16  # bytes: rows of this size or a multiple are what the grouped kernels take


@dataclass(frozen=True)
class Picks:
    """Routes that lead to a row, sorted by row; of equals in the order of tokens and places.

    Attributes:
        shape: T, k.
        slot_N: place among the `T k` routes.
        row_N: row that each leads to, ascending.
        ends_G: int32, how many routes lead to this row or one before it.
    """

    shape: tuple[int, int]
    slot_N: Tensor
    row_N: Tensor
    ends_G: Tensor

    @classmethod
    def of(cls, row_Tk: Tensor, rows: int) -> Picks:
        """Sort routes by row; rows past the last stand for none."""
        sorted_row, slot = torch.sort(row_Tk.reshape(-1), stable=True)
        ends_G = torch.bincount(sorted_row, minlength=rows)[:rows].cumsum(0, dtype=torch.int32)
        N = int(ends_G[-1]) if rows else 0
        return cls((row_Tk.shape[0], row_Tk.shape[1]), slot[:N], sorted_row[:N], ends_G)

    @property
    def token_N(self) -> Tensor:  # noqa: N802 (a shape)
        """The token of each."""
        return self.slot_N // self.shape[1]

    def joined(self, group_G: Tensor, groups: int) -> Picks:
        """Lead the routes to the groups that the rows belong to; `group_G` ascends."""
        group_N = group_G[self.row_N]
        ends = torch.bincount(group_N, minlength=groups).cumsum(0, dtype=torch.int32)
        return Picks(self.shape, self.slot_N, group_N, ends)

    def once(self) -> Once:
        """Make one of the routes of a token that lead to the same row."""
        T, rows = self.shape[0], len(self.ends_G)
        pair_N = self.row_N * T + self.token_N
        there = torch.zeros(rows * T, dtype=torch.long, device=pair_N.device).index_fill_(0, pair_N, 1)
        place_N = (there.cumsum(0) - 1)[pair_N]
        ends_G = there.view(rows, T).sum(1).cumsum(0, dtype=torch.int32)
        pair_U = there.nonzero()[:, 0]
        route_U = torch.empty_like(pair_U).index_copy_(0, place_N, torch.arange(len(pair_N), device=pair_N.device))
        return Once(Picks((T, 1), pair_U % T, pair_U // T, ends_G), route_U, place_N)

    def spread(self, answer_NH: Tensor, gate_Tk: Tensor, onto_TkH: Tensor | None = None) -> Tensor:
        """Multiply answers by their gates and put each in its place: `[T, k, H]`, zeros where no row answered.

        Into `onto_TkH`, where that is given and of the same dtype.
        """
        weighted_NH = answer_NH * gate_Tk.reshape(-1)[self.slot_N][:, None]
        T, k = self.shape
        if onto_TkH is not None and onto_TkH.dtype != weighted_NH.dtype:
            return onto_TkH + self.spread(answer_NH, gate_Tk)
        onto_TkH = weighted_NH.new_zeros(T, k, weighted_NH.shape[1]) if onto_TkH is None else onto_TkH
        return onto_TkH.flatten(0, 1).index_copy_(0, self.slot_N, weighted_NH).view_as(onto_TkH)


@dataclass(frozen=True)
class Once:
    """Routes of which no two of a token lead to the same row, U of them.

    Attributes:
        picks: where they lead; their places are their tokens.
        route_U: for each, one of the N that it stands for.
        place_N: which of the U stands for each of the N.
    """

    picks: Picks
    route_U: Tensor
    place_N: Tensor


@dataclass(frozen=True)
class Stack:
    """A stack of experts that routes pass through, and what its products are multiplied by.

    Where `once` is given, the first product of a token is taken once for all of its routes to a row.
    """

    experts: Any
    picks: Picks
    scale: float = 1.0
    once: Once | None = None

    def product(self, x_ND: Tensor, first: bool) -> Tensor:
        """Multiply by the first matrices or by the last, biases included: `[N, O]`."""
        name = ("gate_up_proj" if "gate_up_proj" in self.experts._parameters else "up_proj") if first else "down_proj"
        weight = getattr(self.experts, name)
        weight = weight if is_transposed(self.experts) else weight.transpose(1, 2)
        if first and self.once is not None:
            out = product(rows_of(x_ND, self.once.route_U), weight, self.once.picks)
            out = rows_of(out, self.once.place_N)
        else:
            out = product(x_ND, weight, self.picks)
        bias = getattr(self.experts, f"{name}_bias", None)
        if bias is not None:
            out = out + bias[self.picks.row_N]
        return out if self.scale == 1 else out * self.scale


def rows_of(x_TD: Tensor, row_N: Tensor) -> Tensor:
    """Return the rows with these numbers, `[N, D]`, of any number of dimensions."""
    if x_TD.device.type == "cpu" or not torch.is_grad_enabled():
        return x_TD.index_select(0, row_N)  # whose gradient is in no fixed order on an accelerator
    return x_TD[row_N]


def is_transposed(experts: Any) -> bool:
    """Whether the matrices of a family's experts are stored `[in, out]`."""
    flag = getattr(experts, "is_transposed", None)
    if flag is None and "gate_up_proj" in experts._parameters:  # then the shapes tell: [E, 2I, H] beside [E, H, I]
        return bool(experts.gate_up_proj.shape[2] == 2 * experts.down_proj.shape[1])
    return bool(flag)


def answers(lead: Any, x_NH: Tensor, stacks: Sequence[Stack], adapters: Adapters | None, picks: Picks) -> Tensor:
    """Return what experts answer, before their gates: `[N, H]`.

    Args:
        lead: the module whose gating function and norm are used.
        x_NH: the tokens, in the order of the routes.
        stacks: their products are added up, each times its scale, before the gating function and after it.
        adapters: low-rank parts to add to both, a row for each row of `picks`.
        picks: routes to the rows of the adapters.
    """
    if not len(x_NH) and not torch.is_grad_enabled():  # while training, even nothing sends gradients of zero
        return x_NH.new_zeros(x_NH.shape)
    inner_NP = _added([stack.product(x_NH, True) for stack in stacks])
    if adapters is not None:
        inner_NP = adapters.into(lead, inner_NP, x_NH, picks)
    gated = "gate_up_proj" in lead._parameters
    h_NI = lead._apply_gate(inner_NP) if gated else lead.act_fn(inner_NP)
    out_NH = _added([stack.product(h_NI, False) for stack in stacks])
    if adapters is not None:
        out_NH = adapters.out_of(out_NH, h_NI, picks)
    assert out_NH is not None
    return lead.post_expert_norm(out_NH) if getattr(lead, "has_post_expert_norm", False) else out_NH


def beside(stacks: Sequence[Any], hidden_TH: Tensor, row_Tk: Tensor, gate_Tk: Tensor) -> Tensor:
    """Run stacks of experts of different widths, their rows numbered through, on routes sorted once: `[T, k, H]`.

    Rows past the last stand for none. Without gradients, which need every stack to be run.
    """
    ends = [0]
    for stack in stacks:
        ends.append(ends[-1] + len(stack.down_proj))
    picks = Picks.of(row_Tk, ends[-1])
    x_NH, routes = rows_of(hidden_TH, picks.token_N), [0, *picks.ends_G[[end - 1 for end in ends[1:]]].tolist()]
    parts = []
    for stack, first, last, start, stop in zip(stacks, ends, ends[1:], routes, routes[1:], strict=False):
        if stop > start:
            mine = slice(start, stop)
            here = Picks(picks.shape, picks.slot_N[mine], picks.row_N[mine] - first, picks.ends_G[first:last] - start)
            parts.append(answers(stack, x_NH[mine], [Stack(stack, here)], None, here))
    return picks.spread(torch.cat(parts) if parts else x_NH, gate_Tk)


def _added(terms: Sequence[Tensor]) -> Tensor | None:
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total


def product(x_ND: Tensor, weight_GDO: Tensor, picks: Picks) -> Tensor:
    """Multiply each route by the matrix of its row: `[N, O]`.

    In one grouped product, or in a loop over rows where its kernel does not take the sizes.
    """
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        weight_GDO = weight_GDO.to(dtype)
    x_ND = x_ND.to(weight_GDO.dtype)
    if not len(x_ND):
        return x_ND @ weight_GDO.sum(0)  # nothing, but every weight gets its gradient of zeros
    if _groupable(x_ND, weight_GDO):
        out_NO = torch.nn.functional.grouped_mm(x_ND.contiguous(), weight_GDO, offs=picks.ends_G)
        if out_NO.requires_grad:  # backward is as choosy as forward, and gradients of interleaved parts come with gaps
            out_NO.register_hook(_with_whole_rows)
        return out_NO
    sizes = torch.diff(picks.ends_G, prepend=picks.ends_G.new_zeros(1)).tolist()
    parts = zip(x_ND.split(sizes), weight_GDO.unbind(0), strict=True)
    return torch.cat([x @ weight for x, weight in parts])


def thin(x_ND: Tensor, a_GRD: Tensor, b_GOR: Tensor, picks: Picks) -> Tensor:
    """Multiply each route by the two thin matrices of its row: `[N, O]`."""
    if len(x_ND) <= len(a_GRD):  # copies of so few rows are smaller than all rows
        found_NRD, found_NOR = rows_of(a_GRD, picks.row_N), rows_of(b_GOR, picks.row_N)
        found_N1R = torch.bmm(x_ND.to(a_GRD.dtype)[:, None], found_NRD.transpose(1, 2))
        return torch.bmm(found_N1R, found_NOR.transpose(1, 2))[:, 0]
    more = -a_GRD.shape[1] % (_ALIGNED // a_GRD.element_size())
    if more:
        a_GRD, b_GOR = torch.nn.functional.pad(a_GRD, (0, 0, 0, more)), torch.nn.functional.pad(b_GOR, (0, more))
    return product(product(x_ND, a_GRD.transpose(1, 2), picks), b_GOR.transpose(1, 2), picks)


def _with_whole_rows(gradient: Tensor) -> Tensor:
    whole = gradient.stride(1) == 1 and gradient.stride(0) * gradient.element_size() % _ALIGNED == 0
    return gradient if whole and gradient.stride(0) >= gradient.shape[1] else gradient.contiguous()


def _groupable(x_ND: Tensor, weight_GDO: Tensor) -> bool:
    """Whether torch's grouped product takes these, forward and backward."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    if x_ND.device.type == "cuda" and torch.cuda.get_device_capability(x_ND.device) < (8, 0):
        return False
    if weight_GDO.device.type == "cpu" and weight_GDO.data_ptr() % _ALIGNED:
        return False  # a file that is mapped into memory; the kernel of torch 2.10 refuses it
    inner = weight_GDO.stride()
    whole = min(inner[1:]) == 1 and x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return whole and all(size * x_ND.element_size() % _ALIGNED == 0 for size in weight_GDO.shape[1:])
