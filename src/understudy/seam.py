"""Routes through a family's own forward where only some experts have rows: some lead nowhere, some to the same row.

Letters: T tokens, k routes of a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def run(
    experts: Any, forward: Callable[..., torch.Tensor], hidden_TH: torch.Tensor, row_Tk: torch.Tensor, gate_Tk: Any
) -> torch.Tensor:
    """Run the family's forward on the routes that lead to a row of `experts`; the others lead to one past the last."""
    count = len(experts.kept)
    gate_Tk = gate_Tk.masked_fill(row_Tk == count, 0)
    implementation = implementation_of(experts)
    if implementation == "grouped_mm" and not _aligned(experts):
        own_loops = (getattr(cls.__dict__.get("forward"), "__wrapped__", None) for cls in type(experts).__mro__)
        forward, implementation = partial(next(filter(None, own_loops)), experts), "eager"
    if implementation == "eager":
        # Some families' own loops reject the reserved id; there such a route runs any expert at weight zero.
        row_Tk = row_Tk.clamp(max=count - 1)
    return forward(hidden_TH, row_Tk, gate_Tk)


def implementation_of(experts: Any) -> str:
    """Name what runs the experts; a module without a config runs a loop of its own."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"


def _aligned(experts: Any) -> bool:
    """Whether torch's grouped product takes the weights, whose rows must be multiples of 16 bytes long."""
    down = experts.down_proj
    width = down.shape[1] if getattr(experts, "is_transposed", False) else down.shape[2]
    return width * down.element_size() % 16 == 0


def first(row_Tk: torch.Tensor) -> torch.Tensor:
    """Whether a route is the first of its token that leads to its row, `[T, k]`."""
    same_Tkk = row_Tk[:, :, None] == row_Tk[:, None, :]
    return ~same_Tkk.tril(-1).any(-1)


def joined(row_Tk: torch.Tensor, gate_Tk: torch.Tensor, none: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one route of those of a token that lead to the same row, their gates added; the others lead to `none`."""
    same_Tkk = row_Tk[:, :, None] == row_Tk[:, None, :]
    sum_Tk = (same_Tkk * gate_Tk[:, None, :].float()).sum(-1).to(gate_Tk.dtype)
    first_Tk = first(row_Tk)
    return row_Tk.masked_fill(~first_Tk, none), torch.where(first_Tk, sum_Tk, torch.zeros_like(sum_Tk))
