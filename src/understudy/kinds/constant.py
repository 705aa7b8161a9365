"""`constant`: each replaced expert answers every token with one vector, its mean output on the calibration text.

Source: MoNE (arXiv 2507.00390), whose novices these are; the gate still multiplies the vector as it would the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from understudy.entries import Entry, ids_of
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.standins import CONSTANT as CONSTANT_FORMAT
from understudy.standins import StandIn
from understudy.stats import ExpertStats


class Constant(Kind):
    """One vector of the hidden size for each replaced expert; the router stays as it is."""

    name = "constant"
    description = "one vector for each expert, its mean output on the calibration text"
    needs = ("mean",)
    unseen = "become zero vectors"

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of a vector for each expert."""
        return layer.hidden * layer.element_bytes * len(ids_of(entry))

    def most(self, layer: LayerFacts) -> int:
        """Return all experts but one: inference engines need one real expert to take the layer's shape from."""
        return layer.experts - 1

    def answer(self, stats: ExpertStats, expert: int) -> np.ndarray:
        """Return the mean output of an expert over the tokens routed to it, `[H]` float32 (METHODS: MoNE, novice)."""
        return np.asarray(stats.mean[expert], np.float32)

    def stand_ins(self, entry: Entry, how: Mapping[str, Any], layer: LayerFacts | None = None) -> dict[int, StandIn]:
        """Declare a constant for each expert."""
        return {expert: StandIn(CONSTANT_FORMAT) for expert in ids_of(entry)}

    def fill(self, made: Any, source: Any, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None) -> None:
        """Write the vectors."""
        import torch

        assert stats is not None, "the kind needs statistics"
        for expert in ids_of(entry):
            vector = torch.from_numpy(self.answer(stats, expert))
            made.constants.data[made.constant_row(expert)] = vector.to(made.constants.dtype)

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse a layer that keeps no expert."""
        for key, entry in entries.items():
            chosen = ids_of(entry)
            if chosen and len(chosen) > self.most(layers[key]):
                raise PlanError(
                    f"layer {key}: all {layers[key].experts} experts would be replaced; constant needs at least one "
                    "kept expert in each layer"
                )


CONSTANT = Constant()
