"""`regroup`: the expert is removed with its router row, and kept experts take in those of its neurons that they know.

Source: DERN (arXiv 2509.10377), see `regrouping`. What is written is an ordinary checkpoint, as by `drop`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds.drop import Drop
from understudy.stats import ExpertStats

if TYPE_CHECKING:
    from understudy.cut import LayerCut, LayerSource


class Regroup(Drop):
    """Nothing in the place of the expert; those that stay are renumbered and may be made of other neurons.

    Settings in a plan:
        threshold: cosine that a neuron must exceed with the nearest of the kept experts, else it is lost.
        rounds: at most so many rounds of k-means in each kept expert.
    """

    name = "regroup"
    description = "removed with its router row; kept experts take in neurons like their own, loads without understudy"
    needs = ("gate_sum",)
    unseen = "are removed, their neurons weigh nothing"
    losers = False

    def __init__(self, threshold: float = 0.6, rounds: int = 10) -> None:
        self.threshold, self.rounds = threshold, rounds

    def having(self, how: Mapping[str, Any]) -> Regroup:
        """Return the kind with the settings of a plan.

        Raises:
            PlanError: a setting that there is not, or a value that it cannot have.
        """
        for name, value in how.items():
            if name not in ("threshold", "rounds"):
                raise PlanError(f"how: regroup has no setting {name!r}; it has threshold and rounds")
            fits = type(value) in (int, float) and -1 <= value <= 1 if name == "threshold" else type(value) is int
            if not fits or (name == "rounds" and value < 1):
                like = "a cosine, -1 to 1" if name == "threshold" else "a whole number, 1 or more"
                raise PlanError(f"how: {name} of regroup is {like}, not {value!r}")
        return Regroup(**{"threshold": self.threshold, "rounds": self.rounds, **how})

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return why router rows cannot be removed, or that neurons cannot be told apart; unknown without sizes."""
        if layer.width is not None and not layer.channel_bytes:
            return layer.removable or "nothing tells which weights of its experts make up a neuron"
        return layer.removable

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Drop the experts' own tensors and router rows; those of kept experts are promised, as they may change."""
        from understudy.cut import rewritten

        dropped = super().cut(source, replaced)
        make = partial(self.reworked, replaced=replaced, stats=source.stats)
        return replace(dropped, changed=dropped.changed | rewritten(source, make, source.kept(replaced)))

    def reworked(self, experts: Any, replaced: Sequence[int], stats: ExpertStats | None) -> Any:
        """Return a copy of the live experts, all of them, in which the kept ones took in neurons of the others."""
        from understudy.regrouping import regrouped

        assert stats is not None, "the kind needs statistics"
        importance = np.asarray(stats.gate_sum, np.float64).tolist()
        return regrouped(experts, replaced, importance, self.threshold, self.rounds)


REGROUP = Regroup()
