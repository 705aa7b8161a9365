"""Low-rank parts of experts: to each matrix W of each expert, B A is added, with A `[r, in]` and B `[out, r]`.

Letters: P rows (experts that have such parts), r rank, H hidden size, I width of an expert, N routes.

They are stored apart for the gate, up and down projections, whatever the family's layout: what they add is put where
the family's own products put it (LightMoE, arXiv 2603.12645, eq. 6; LoRA, arXiv 2106.09685, with scale 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from understudy.channels import channel_views, channel_width, projections, rest, run_first, set_rest, sliced
from understudy.grouped import Picks, thin

_Thin = dict[str, tuple[Tensor, Tensor]]  # A and B by role


class Adapters(nn.Module):
    """A `[P, r, in]` and B `[P, out, r]` of the gate, up and down projections, those that the family has."""

    def __init__(self, experts: Any, rows: int, rank: int) -> None:
        """Make parts of zeros, in the sizes, dtype and device of a family's experts module."""
        super().__init__()
        down, width, hidden = experts.down_proj, channel_width(experts), hidden_size(experts)
        for role in roles(experts):
            inner, outer = (width, hidden) if role == "down" else (hidden, width)
            for name, shape in ((f"{role}_a", (rows, rank, inner)), (f"{role}_b", (rows, outer, rank))):
                zeros = torch.zeros(shape, dtype=down.dtype, device=down.device)
                self.register_parameter(name, nn.Parameter(zeros, requires_grad=down.requires_grad))

    @property
    def rank(self) -> int:
        """Return r."""
        return int(self.of("down")[0].shape[1])

    def of(self, role: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a projection."""
        return getattr(self, f"{role}_a"), getattr(self, f"{role}_b")

    @property
    def roles(self) -> list[str]:
        """Projections that have parts, in order."""
        return [role for role in ("gate", "up", "down") if f"{role}_a" in self._parameters]

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start training: A Gaussian of variance 1 / in, B zero, so that nothing is added."""
        for role in self.roles:
            a, b = self.of(role)
            drawn = torch.randn(a.shape, generator=generator, device=generator.device) * a.shape[2] ** -0.5
            a.copy_(drawn)
            b.zero_()

    @torch.no_grad()
    def set_row(self, row: int, parts: _Thin) -> None:
        """Write the parts of one expert."""
        for role, (a, b) in parts.items():
            own_a, own_b = self.of(role)
            own_a[row].copy_(a)
            own_b[row].copy_(b)

    def into(self, lead: Any, inner_NP: Tensor | None, x_NH: Tensor, picks: Picks) -> Tensor:
        """Add to what the first matrices put out, `[N, 2I]` (ungated `[N, I]`), in the layout of the family `lead`.

        In place, where the dtypes agree.
        """
        found = {role: thin(x_NH, *self.of(role), picks) for role in self.roles if role != "down"}
        if len(found) == 1:
            return _onto(inner_NP, *found.values())
        up = found["up"]
        if inner_NP is None:
            inner_NP = up.new_zeros(len(up), 2 * up.shape[1])
        inner_NP = inner_NP.to(torch.promote_types(inner_NP.dtype, up.dtype))
        for role, part in found.items():  # views made before the first write would not carry gradients
            projections(lead, inner_NP)[role].add_(part)
        return inner_NP

    def out_of(self, out_NH: Tensor | None, h_NI: Tensor, picks: Picks) -> Tensor:
        """Add to what the last matrices put out, `[N, H]`; in place, where the dtypes agree."""
        return _onto(out_NH, thin(h_NI, *self.of("down"), picks))

    @torch.no_grad()
    def merge_into(self, experts: Any, row: int, expert: int) -> None:
        """Add the parts of a row to the weights of one expert of a family's module, summed in float32."""
        exact = torch.promote_types(experts.down_proj.dtype, torch.float32)
        for role, view in channel_views(experts).items():
            if role in self.roles:
                a, b = (part[row].to(exact) for part in self.of(role))
                added_IH = (b @ a).T if role == "down" else b @ a
                view[expert].copy_(view[expert].to(exact) + added_IH)


def _onto(sum_NO: Tensor | None, more_NO: Tensor) -> Tensor:
    if sum_NO is None:
        return more_NO
    return sum_NO.add_(more_NO) if sum_NO.dtype == more_NO.dtype else sum_NO + more_NO


def roles(experts: Any) -> list[str]:
    """Projections of a family's experts, in order: gate, up and down, or up and down."""
    return [role for role in channel_views(experts) if role in ("gate", "up", "down")]


def hidden_size(experts: Any) -> int:
    """Return H, the width of what an expert puts out."""
    return int(channel_views(experts)["down"].shape[2])


@torch.no_grad()
def best_of_rank(experts: Any, expert: int, rank: int, base: tuple[Any, int] | None = None) -> _Thin:
    """Approximate each matrix of an expert by one of a rank, with the least squared error; or what a base lacks of it.

    B A from the largest singular values, their roots on both sides. The vectors come from an eigendecomposition of
    W W^T or W^T W, whichever is smaller, which is faster; to project W onto them loses no precision.

    Args:
        experts: the live module that holds the expert.
        expert: its row.
        rank: r.
        base: a module of the same family and the row in it whose weights the parts are added to.
    """
    found, bases = {}, {} if base is None else channel_views(base[0])
    for role, view in channel_views(experts).items():
        if role in ("gate", "up", "down"):
            weight = view[expert].float()
            if base is not None:
                weight = weight - bases[role][base[1]].float()
            weight = weight.T if role == "down" else weight
            wide = weight.shape[0] <= weight.shape[1]
            lying = weight if wide else weight.T
            vectors = torch.linalg.eigh(lying @ lying.T)[1][:, -rank:].flip(1)
            along = vectors.T @ lying
            root = along.norm(dim=1).clamp(min=1e-30).sqrt()
            inner, outer = along / root[:, None], vectors * root
            found[role] = (inner, outer) if wide else (outer.T, inner.T)
    return found


@torch.no_grad()
def run_low_rank(experts: Any, expert: int, rank: int, hidden: Tensor, base: tuple[Any, int] | None = None) -> Tensor:
    """Return what an expert answers tokens `[n, H]` whose matrices are the best of a rank, or a base's with what is
    best of that rank added to them: `[n, H]` float32. Without a base there are no biases.

    The family's own module runs, its weights overwritten.
    """
    lead, row = base or (experts, expert)
    alone = sliced(lead, [row], torch.arange(channel_width(lead))[None])
    parts = best_of_rank(experts, expert, rank, base)
    if base is None:
        for view in channel_views(alone).values():
            view[0].zero_()
        set_rest(alone, 0, torch.zeros_like(rest(alone, 0)))
    for role, view in channel_views(alone).items():
        if role in parts:
            a, b = (part.to(alone.down_proj.dtype).float() for part in parts[role])
            view[0].copy_(view[0].float() + ((b @ a).T if role == "down" else b @ a))
    return run_first(alone, hidden)
