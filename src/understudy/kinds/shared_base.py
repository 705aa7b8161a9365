"""`shared_base`: the experts of a group share one base, their weighted mean, and each adds low-rank parts of its own.

Source: LightMoE (arXiv 2603.12645), METHODS 1.4 and 1.5; which experts form a group is up to a method. Until they are
trained the paper's low-rank parts add nothing: `recover` makes them useful. With a residual start (not of the paper)
they are the best of their rank that the base lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from understudy.entries import Entry, ids_of
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.recipe import Start
from understudy.standins import SHARED, StandIn
from understudy.stats import ExpertStats

if TYPE_CHECKING:
    from torch import Tensor

RANK = 16  # of all experiments of the paper


class SharedBase(Kind):
    """Groups of experts, each with one set of weights W that they share; expert n of a group is W + B_n A_n.

    W is the mean of the group, weighted by summed gates (LightMoE, eq. 4). A `[r, in]` starts Gaussian and B `[out, r]`
    as zeros, for the gate, up and down projections each.

    Settings in a plan:
        rank: r.
        base: false leaves W out: the low-rank parts alone, which then start as the best approximation of the expert of
            that rank (zeros would never learn).
        start: `residual` lets B A start as the best approximation of W_n - W of that rank. Then nothing can fade out.
        seed: of A.
    """

    name = "shared_base"
    description = "weights that a group of experts shares, and parts of low rank that are each expert's own"
    unseen = "weigh nothing in the base of their group"
    losers = False
    form = "groups"

    def __init__(self, rank: int = RANK, base: bool = True, start: Start = "zero", seed: int = 0) -> None:
        self.rank, self.base, self.start, self.seed = rank, base, start, seed
        if not base:
            self.unseen = "become parts of low rank like the others"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What tells the weights in the mean."""
        return ("gate_sum",) if self.base else ()

    def having(self, how: Mapping[str, Any]) -> SharedBase:
        """Return the kind with the settings of a plan.

        Raises:
            PlanError: a setting that there is not, or a value that it cannot have.
        """
        for name, value in how.items():
            if name not in ("rank", "base", "start", "seed"):
                raise PlanError(f"how: shared_base has no setting {name!r}; it has rank, base, start and seed")
            if name == "start":
                if value not in get_args(Start):
                    raise PlanError(f"how: start of shared_base is {' or '.join(get_args(Start))}, not {value!r}")
                continue
            if name == "base" and not isinstance(value, bool):
                raise PlanError(f"how: base of shared_base is true or false, not {value!r}")
            least = 1 if name == "rank" else 0
            if name != "base" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise PlanError(f"how: {name} of shared_base is a whole number of at least {least}, not {value!r}")
        return SharedBase(**{"rank": self.rank, "base": self.base, "start": self.start, "seed": self.seed, **how})

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of one expert for each group, and of the low-rank parts (LightMoE, eq. 5)."""
        matrices = layer.channel_bytes // (layer.hidden * layer.element_bytes)  # 3, or 2 where there is no gate
        thin = matrices * self.rank * (layer.hidden + (layer.width or 0)) * layer.element_bytes
        return self.base * layer.expert_bytes * len(entry) + thin * len(ids_of(entry))

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return that the projections cannot be told apart; unknown where the facts carry no sizes."""
        if layer.expert_bytes and not layer.channel_bytes:
            return "nothing tells which weights of its experts make up a neuron"
        return None

    def most(self, layer: LayerFacts) -> int:
        """Return all experts but one: the layer takes its shape from one that keeps its weights."""
        return layer.experts - 1

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse a rank that its matrices cannot have, and a layer that keeps no expert."""
        for key, entry in entries.items():
            layer, count = layers[key], len(ids_of(entry))
            if not count:
                continue
            if count > self.most(layer):
                raise PlanError(
                    f"layer {key}: all {layer.experts} experts would be replaced; shared_base needs at least one kept "
                    "expert in each layer"
                )
            self.check_rank(key, layer)

    def check_rank(self, key: str, layer: LayerFacts) -> None:
        """Refuse a rank that the matrices of a layer's experts cannot have.

        Raises:
            PlanError: says which layer.
        """
        smaller = min(layer.hidden, layer.width or layer.hidden)
        if smaller and self.rank > smaller:
            raise PlanError(
                f"layer {key}: rank {self.rank} is more than the {smaller} that matrices of {layer.hidden} by "
                f"{layer.width} have; give a lower --rank"
            )

    def stand_ins(self, entry: Entry, how: Mapping[str, Any], layer: LayerFacts | None = None) -> dict[int, StandIn]:
        """Declare the group of each member, named by its first, and the rank."""
        kind = self.having(how)
        return {
            i: StandIn(SHARED, into=group[0] if kind.base else None, rank=kind.rank)
            for group in _groups(entry)
            for i in group
        }

    def fill(self, made: Any, source: Any, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None) -> None:
        """Write the base of each group, and the low-rank parts as they start."""
        import torch

        from understudy.adapters import best_of_rank
        from understudy.channels import set_neurons, set_rest
        from understudy.merging import merged

        kind, bases = self.having(how), made.bases
        if not kind.base:
            for row, expert in enumerate(bases.replaced):
                bases.adapters.set_row(row, best_of_rank(source, expert, kind.rank))
            return
        for group in _groups(entry):
            of_neurons, of_rest = merged(source, group, _shares(group, stats), "none", None)
            set_neurons(bases, bases.base_row(group[0]), of_neurons)
            set_rest(bases, bases.base_row(group[0]), of_rest)
        if kind.start == "zero":
            bases.adapters.reset(torch.Generator().manual_seed(kind.seed))
            return
        for row, (expert, base) in enumerate(zip(bases.replaced, bases.groups, strict=True)):
            bases.adapters.set_row(row, best_of_rank(source, expert, kind.rank, (bases, base)))

    def reference(
        self, source: Any, hidden: Tensor, expert: int, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None
    ) -> Tensor:
        """Return what an expert with the weights of its group's base answers tokens `[n, H]`: `[n, H]` float32.

        Without a base, what one answers whose matrices are the best of that rank; with a residual start, those of the
        base with the best of that rank added.
        """
        from understudy.adapters import run_low_rank
        from understudy.merging import merged_alone, run_merged

        kind = self.having(how)
        if not kind.base:
            return run_low_rank(source, expert, kind.rank, hidden)
        group = next(group for group in _groups(entry) if expert in group)
        shares = _shares(group, stats)
        if kind.start == "residual":
            return run_low_rank(source, expert, kind.rank, hidden, (merged_alone(source, group, shares, "none"), 0))
        return run_merged(source, group, shares, "none", hidden)


def _shares(group: tuple[int, ...], stats: ExpertStats | None) -> list[float]:
    """What each of a group is multiplied by; they add up to 1."""
    assert stats is not None, "the kind needs statistics"
    sums = np.asarray(stats.gate_sum, np.float64)[list(group)]
    total = float(sums.sum())
    return [w / total for w in sums.tolist()] if total > 0 else [1 / len(group)] * len(group)


def _groups(entry: Entry) -> tuple[tuple[int, ...], ...]:
    """Return an entry that is known to hold groups as what it is; an untouched layer has an empty one."""
    assert not isinstance(entry, dict)
    return tuple(group for group in entry if isinstance(group, tuple))


SHARED_BASE = SharedBase()
