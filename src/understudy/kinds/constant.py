"""`constant`: each replaced expert answers every token with one vector, its mean output on the calibration text.

Source: MoNE (arXiv 2507.00390), whose novices these are; the gate still multiplies the vector as it would the expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from understudy.entries import Entry, ids_of
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.stats import ExpertStats

if TYPE_CHECKING:
    from understudy.cut import LayerCut, LayerSource


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

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Drop the experts' own tensors and add one vector for each, in the dtype of the experts."""
        import torch

        from understudy.checkpoint import DTYPES
        from understudy.cut import LayerCut, tensor_bytes, without_rows
        from understudy.layout import expert_dtype
        from understudy.shards import Piece

        assert source.stats is not None
        stored = expert_dtype(source.checkpoint, source.tensors)
        dtype = getattr(torch, DTYPES[stored][0])
        added = []
        for expert in sorted(replaced):
            vector = torch.from_numpy(self.answer(source.stats, expert)).to(dtype)
            added.append(Piece(source.names[expert], stored, tuple(vector.shape), (tensor_bytes(vector),)))
        return LayerCut(
            gone=source.own_tensors(replaced),
            changed=without_rows(source.checkpoint, source.tensors.stacked, source.kept(replaced)),
            added=added,
            declared={expert: source.names[expert] for expert in sorted(replaced)},
        )

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
