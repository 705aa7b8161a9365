"""`merge`: several experts share one, their weighted average; router rows stay, so that their gates add.

Sources: MC-SMoE (arXiv 2310.01334), HC-SMoE (arXiv 2410.08589), REAM (arXiv 2604.04356); which experts form a group is
up to a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.scores import per
from understudy.standins import MERGED, StandIn
from understudy.stats import ExpertStats

if TYPE_CHECKING:
    from torch import Tensor

# What an expert weighs in an average, from these sums; of two, the first divided by the second.
_WEIGHTS: dict[str, tuple[str, ...]] = {
    "count": ("count",),
    "gate_sum": ("gate_sum",),
    "saliency": ("gated_norm_sum", "count"),  # as REAP scores
    "uniform": (),
}
_CHOICES = {"weights": tuple(_WEIGHTS), "align": ("none", "weights", "directions", "activations")}


class Merge(Kind):
    """Groups of experts, each with the weights of their average in the place of the first, the dominant.

    Settings in a plan:
        weights: what each expert weighs: its routes (`count`), its gates (`gate_sum`), its mean gated output norm
            (`saliency`), or the same (`uniform`). Where all of a group weigh nothing, they weigh the same.
        align: how the neurons of the others are matched with the dominant's before, see `merging.matching`.
    """

    name = "merge"
    description = "the average of a group of experts, which they share; the first of a group lends its place"
    unseen = "weigh nothing in the average of their group"
    losers = False
    form = "groups"

    def __init__(self, weights: str = "count", align: str = "weights") -> None:
        self.weights, self.align = weights, align

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What tells the weights, and which neurons go together."""
        return _WEIGHTS[self.weights] + (("dense_activations",) if self.align == "activations" else ())

    def having(self, how: Mapping[str, Any]) -> Merge:
        """Return the kind with the settings of a plan.

        Raises:
            PlanError: a setting that there is not, or a value that it cannot have.
        """
        for name, value in how.items():
            if name not in _CHOICES:
                raise PlanError(f"how: merge has no setting {name!r}; it has weights and align")
            if value not in _CHOICES[name]:
                raise PlanError(f"how: {name} of merge is one of {', '.join(_CHOICES[name])}, not {value!r}")
        return Merge(**{"weights": self.weights, "align": self.align, **how})

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of one expert for each group."""
        return layer.expert_bytes * len(entry)

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return that neurons cannot be told apart; unknown where the facts carry no sizes."""
        if layer.width is not None and not layer.channel_bytes:
            return "nothing tells which weights of its experts make up a neuron"
        return None

    def most(self, layer: LayerFacts) -> int:
        """Return all experts: they may all be one group."""
        return layer.experts

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse a group of one expert."""
        for key, entry in entries.items():
            for group in _groups(entry):
                if len(group) < 2:
                    raise PlanError(
                        f"layer {key}: the group {list(group)} holds a single expert, and merge needs two or more in a "
                        "group; leave it out, and the expert stays as it is"
                    )

    def stand_ins(self, entry: Entry, how: Mapping[str, Any], layer: LayerFacts | None = None) -> dict[int, StandIn]:
        """Declare that each member, the dominant among them, shares the weights of the dominant."""
        self.having(how)
        return {i: StandIn(MERGED, into=group[0]) for group in _groups(entry) for i in group}

    def fill(self, made: Any, source: Any, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None) -> None:
        """Write the average of each group into the row of its dominant."""
        from understudy.channels import set_neurons, set_rest
        from understudy.merging import merged

        kind = self.having(how)
        for group in _groups(entry):
            known = kind._activations(group, stats)
            of_neurons, of_rest = merged(source, group, kind._shares(group, stats), kind.align, known)
            set_neurons(made, made.rows[group[0]], of_neurons)
            set_rest(made, made.rows[group[0]], of_rest)

    def reference(
        self, source: Any, hidden: Tensor, expert: int, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None
    ) -> Tensor:
        """Return what the average of an expert's group answers tokens `[n, H]`: `[n, H]` float32."""
        from understudy.merging import run_merged

        kind, group = self.having(how), next(group for group in _groups(entry) if expert in group)
        shares, known = kind._shares(group, stats), kind._activations(group, stats)
        return run_merged(source, group, shares, kind.align, hidden, known)

    def _activations(self, group: tuple[int, ...], stats: ExpertStats | None) -> Tensor | None:
        """Activations of each of a group on the same tokens, where they tell which neurons go together."""
        import torch

        if self.align != "activations":
            return None
        assert stats is not None, "the kind needs statistics"
        return torch.from_numpy(np.asarray(stats.dense_activations)[list(group)])

    def _shares(self, group: tuple[int, ...], stats: ExpertStats | None) -> list[float]:
        """What each of a group is multiplied by; they add up to 1."""
        named = _WEIGHTS[self.weights]
        assert stats is not None or not named, "the kind needs statistics"
        sums = [np.asarray(getattr(stats, name), np.float64)[list(group)] for name in named]
        weights = per(sums[0], sums[1]) if len(sums) == 2 else sums[0] if sums else np.ones(len(group))
        total = float(weights.sum())
        return [w / total for w in weights.tolist()] if total > 0 else [1 / len(group)] * len(group)


def _groups(entry: Entry) -> tuple[tuple[int, ...], ...]:
    """Return an entry that is known to hold groups as what it is; an untouched layer has an empty one."""
    assert not isinstance(entry, dict)
    return tuple(group for group in entry if isinstance(group, tuple))


MERGE = Merge()
