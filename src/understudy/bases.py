"""Experts that share bases: the weights of a group, and low-rank parts of each member's own.

Letters: M groups, P experts in them, T tokens, k routes of a token, N routes that lead here, H hidden size.

While recovery fades the originals out, expert n is `beta W_n + (1 - beta) W_group + B_n A_n` (LightMoE, arXiv
2603.12645, eq. 6). Both sides of the mixture are linear where it matters, before and after the gating function, so the
products are mixed instead of the weights: the same number, and no third set of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from understudy.adapters import Adapters
from understudy.channels import channel_width, sliced
from understudy.grouped import Picks, Stack, answers, rows_of
from understudy.standins import SHARED, StandIn

_FEW = 16  # routes to a group whose products take as long as reading its weights does


class SharedExperts:
    """Mixin over a family's experts class, whose rows are the bases of M groups; M is 0 where there are none."""

    replaced: tuple[int, ...]  # original ids of the rows of the adapters, group by group
    dominants: tuple[int, ...]  # original ids that name the rows of the bases, ascending
    groups: tuple[int, ...]  # row of the base of each row of the adapters
    adapters: Adapters
    originals: Any  # the replaced experts as they were, frozen, in the order of `replaced`; None without fading
    beta: float  # share of the originals
    _group_rows: dict[torch.device, Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Combine what the members answer: hidden `[T, H]`, rows of the adapters `[T, k]` (P: none), gates `[T, k]`."""
        return self.routed(hidden_states, top_k_index, top_k_weights).sum(1)

    def routed(self, hidden_TH: Tensor, row_Tk: Tensor, gate_Tk: Tensor, onto_TkH: Tensor | None = None) -> Tensor:
        """Return what each route adds, `[T, k, H]`; zeros for routes that lead elsewhere.

        Where `onto_TkH` is given, it may be written to, and holds what the other routes add.
        """
        picks = Picks.of(row_Tk, len(self.replaced))
        stacks, faded = [], 1 - (self.beta if self.originals is not None else 0.0)
        if faded < 1:
            stacks.append(Stack(self.originals, picks, self.beta))
        if self.dominants:
            grouped = self._grouped(picks)
            once = grouped.once() if len(picks.slot_N) > _FEW * len(self.dominants) else None
            stacks.append(Stack(self, grouped, faded, once))
        answer_NH = answers(self, rows_of(hidden_TH, picks.token_N), stacks, self.adapters, picks)
        return picks.spread(answer_NH, gate_Tk, onto_TkH)

    def _grouped(self, picks: Picks) -> Picks:
        device = picks.row_N.device
        if device not in self._group_rows:
            self._group_rows[device] = torch.tensor(self.groups, dtype=torch.long, device=device)
        return picks.joined(self._group_rows[device], len(self.dominants))

    def base_row(self, dominant: int) -> int:
        """Return the row of the base that a group has, named by its first member."""
        return self.dominants.index(dominant)

    def keep_originals(self, experts: Any) -> None:
        """Take the replaced experts from a live module of all experts, to fade them out; beta becomes 1."""
        everything = torch.arange(channel_width(experts)).expand(len(self.replaced), -1)
        self.originals = sliced(experts, self.replaced, everything).requires_grad_(False)
        self.beta = 1.0


_SUBCLASSES: dict[type, type] = {}  # one for each family, so that equal modules have equal classes


def shared_experts(experts: Any, stand_ins: Mapping[int, StandIn]) -> Any:
    """Make the module for the experts of a layer that share bases, or None where there are none.

    On the meta device or a real one; bases start as the first members' weights, low-rank parts as zeros.
    """
    mine = {e: s for e, s in stand_ins.items() if s.format == SHARED}
    if not mine:
        return None
    dominants = sorted({s.into for s in mine.values() if s.into is not None})
    replaced = sorted(mine, key=lambda e: (-1 if mine[e].into is None else mine[e].into, e))
    rank = next(iter(mine.values())).rank
    assert rank is not None
    made = sliced(experts, dominants, torch.arange(channel_width(experts)).expand(len(dominants), -1))
    made.replaced, made.dominants = tuple(replaced), tuple(dominants)
    made.groups = tuple(dominants.index(s.into) for e in replaced if (s := mine[e]).into is not None)
    made.originals, made.beta, made._group_rows = None, 0.0, {}
    made.adapters = Adapters(made, len(replaced), rank)
    if not dominants:  # no gradient will ever come for weights of no rows, and processes would wait for it
        for empty in made.parameters(recurse=False):
            empty.requires_grad_(False)
    cls = type(made)
    if cls not in _SUBCLASSES:
        _SUBCLASSES[cls] = type(f"Shared{cls.__name__}", (SharedExperts, cls), {"__module__": cls.__module__})
    made.__class__ = _SUBCLASSES[cls]
    return made
