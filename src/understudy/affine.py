"""Affine maps of low rank in the place of experts, as they run: `affine_fit` says what is in them.

Letters: P experts of one rank, r their rank, T tokens, k routes of a token, N routes that lead here, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from understudy.grouped import Picks, rows_of, thin
from understudy.standins import AFFINE, StandIn


class AffineMaps(nn.Module):
    """The linear parts of the maps of one rank: A `[P, r, H]` and B `[P, H, r]`, transposed as `grouped.thin` has them.

    What a map adds to that, c - m A B, is with the constants of the layer.

    Attributes:
        kept: original ids of the rows, ascending.
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, ids: tuple[int, ...], rank: int, hidden: int, like: Tensor) -> None:
        """Make maps to zero, of the dtype and on the device of `like`."""
        super().__init__()
        self.kept = ids
        for name, shape in (("a", (len(ids), rank, hidden)), ("b", (len(ids), hidden, rank))):
            zeros = like.new_zeros(shape, requires_grad=False)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=like.requires_grad))

    def forward(self, hidden_TH: Tensor, row_Tk: Tensor, gate_Tk: Tensor) -> Tensor:
        """Combine what the maps answer, as experts do: hidden `[T, H]`, rows `[T, k]`, gates `[T, k]` to `[T, H]`."""
        picks = Picks.of(row_Tk, len(self.kept))
        answer_NH = thin(rows_of(hidden_TH, picks.token_N), self.a, self.b, picks)
        return picks.spread(answer_NH, gate_Tk).sum(1)


def affine_maps(stand_ins: Mapping[int, StandIn], hidden: int, like: Tensor) -> nn.ModuleList:
    """Make the maps of a layer, a module for each rank, ascending; on the meta device or a real one."""
    by_rank: dict[int, list[int]] = {}
    for expert, stand_in in sorted(stand_ins.items()):
        if stand_in.format == AFFINE:
            assert stand_in.rank is not None
            by_rank.setdefault(stand_in.rank, []).append(expert)
    return nn.ModuleList(AffineMaps(tuple(ids), rank, hidden, like) for rank, ids in sorted(by_rank.items()))
