"""`low_rank`: an expert becomes an affine map of low rank, y = c + (x - m) A B; the router stays as it is.

Ours. The map is the best that reduced-rank ridge regression finds on the tokens routed to the expert, see `affine_fit`;
of rank 0 it would be a constant. The gate multiplies it as it would the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.entries import Entry, ids_of
from understudy.errors import NumericError, PlanError, StatsError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.standins import AFFINE, StandIn
from understudy.stats import ExpertStats
from understudy.sums import RANKS

if TYPE_CHECKING:
    from torch import Tensor


class LowRank(Kind):
    """A rank for each expert: two matrices of it and a vector of the hidden size."""

    name = "low_rank"
    description = "an affine map of low rank for each expert, fitted to its outputs on the calibration text"
    needs = ("weighted_mean", "affine_in", "affine_out", "affine_mean")
    unseen = "answer zero"
    losers = False
    form = "numbers"
    counts = "ranks"

    def having(self, how: Mapping[str, Any]) -> LowRank:
        """Return the kind itself.

        Raises:
            PlanError: a setting; there are none.
        """
        for name in how:
            raise PlanError(f"how: low_rank has no setting {name!r}; it has none")
        return self

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of two matrices and a vector for each expert."""
        return sum((2 * rank + 1) * layer.hidden * layer.element_bytes for rank in _ranks(entry).values())

    def most(self, layer: LayerFacts) -> int:
        """Return all experts but one: the layer takes its shape from one that keeps weights of its own."""
        return layer.experts - 1

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse ranks that maps cannot have, and a layer that keeps no expert."""
        for key, entry in entries.items():
            layer, ranks = layers[key], _ranks(entry)
            largest = min(RANKS, layer.hidden or RANKS)
            for expert, rank in ranks.items():
                if not 1 <= rank <= largest:
                    what = "use constant for a map of rank 0" if rank < 1 else "give a lower one, or keep the expert"
                    raise PlanError(
                        f"layer {key}: low_rank gives expert {expert} rank {rank}, possible are 1 to {largest}; {what}"
                    )
            if ranks and len(ranks) > self.most(layer):
                raise PlanError(
                    f"layer {key}: all {layer.experts} experts would be replaced; low_rank needs at least one kept "
                    "expert in each layer"
                )

    def stand_ins(self, entry: Entry, how: Mapping[str, Any], layer: LayerFacts | None = None) -> dict[int, StandIn]:
        """Declare a rank for each expert."""
        return {expert: StandIn(AFFINE, rank=rank) for expert, rank in _ranks(entry).items()}

    def fill(self, made: Any, source: Any, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None) -> None:
        """Write both matrices, and c - m A B.

        Raises:
            NumericError: a number is NaN or infinite.
            StatsError: the statistics are of experts of another size.
        """
        import torch

        for expert in ids_of(entry):
            maps, row = made.thin_place(expert)
            into, out, mean, constant = (torch.from_numpy(part) for part in self._parts(stats, expert, entry))
            if tuple(into.T.shape) != tuple(maps.a[row].shape):
                raise StatsError(
                    f"statistics of maps {tuple(into.shape)}, the plan and the model ask for "
                    f"{tuple(maps.a[row].T.shape)}; calibrate again"
                )
            maps.a.data[row], maps.b.data[row] = into.T.to(maps.a), out.T.to(maps.b)
            # of the matrices as they are stored: their rounding then does not move the mean answer
            shift = mean.to(maps.a.device) @ maps.a.data[row].double().T @ maps.b.data[row].double().T
            vector = constant.to(shift.device) - shift
            if not bool(vector.isfinite().all()):
                raise NumericError(f"low_rank: the map of expert {expert} is NaN or infinite; calibrate again")
            made.constants.data[made.constant_row(expert)] = vector.to(made.constants)

    def reference(
        self, source: Any, hidden: Tensor, expert: int, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None
    ) -> Tensor:
        """Return c + (x - m) A B for tokens `[n, H]`, `[n, H]` float32, as it is written down, in float64.

        Only A and B are rounded to the dtype of the experts first, as they are stored.
        """
        import torch

        into, out, mean, constant = (torch.from_numpy(part) for part in self._parts(stats, expert, entry))
        into, out = (part.to(source.down_proj.dtype).double() for part in (into, out))
        centred = hidden.double().cpu() - mean
        answer = constant + sum(torch.outer(centred @ into[:, i], out[i]) for i in range(into.shape[1]))
        return answer.float().to(hidden.device)

    def _parts(self, stats: ExpertStats | None, expert: int, entry: Entry) -> tuple[np.ndarray, ...]:
        """A `[H, r]`, B `[r, H]`, m and c `[H]` of an expert, float64."""
        assert stats is not None, "the kind needs statistics"
        rank = _ranks(entry)[expert]
        into, out = stats.affine_in[expert][:, :rank], stats.affine_out[expert][:rank]
        parts = (into, out, stats.affine_mean[expert], stats.weighted_mean[expert])
        return tuple(np.array(part, np.float64) for part in parts)


def _ranks(entry: Entry) -> dict[int, int]:
    """Return an entry that is known to hold numbers as what it is; an untouched layer has an empty one."""
    assert isinstance(entry, dict) or not entry
    return {expert: int(rank) for expert, rank in entry.items()} if isinstance(entry, dict) else {}


LOW_RANK = LowRank()
