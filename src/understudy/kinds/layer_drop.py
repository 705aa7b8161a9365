"""`layer_drop`: the whole MoE sublayer goes, router, experts and shared experts; the stream passes it by.

Source: Layer Drop in "Towards Efficient Mixture of Experts" (arXiv 2406.02500).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from understudy.entries import Entry, ids_of
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind

if TYPE_CHECKING:
    from understudy.cut import LayerCut, LayerSource


class LayerDrop(Kind):
    """Nothing, for all experts of a layer at once."""

    name = "layer_drop"
    description = "the MoE sublayer is removed whole, the stream passes it by"
    unseen = "are removed with their layer"
    losers = False

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return 0."""
        return 0

    def freed_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of everything in the MoE sublayer."""
        return layer.block_bytes

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return why the sublayer cannot be left out."""
        return layer.block_stays

    def most(self, layer: LayerFacts) -> int:
        """Return all experts: it is all or none."""
        return layer.experts

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Leave out all tensors of the sublayer; its router stays as an empty tensor, at which stock loaders stop."""
        from understudy.removal import without_block

        return without_block(source)

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse a part of a layer, and all layers."""
        check_whole(self, layers, entries)


def check_whole(kind: Kind, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
    """Refuse a part of a layer, and all layers.

    Raises:
        PlanError: says which layer, and what to write.
    """
    for key, entry in entries.items():
        if 0 < len(ids_of(entry)) < layers[key].experts:
            raise PlanError(f"layer {key}: {kind.name} takes whole layers; write `{kind.name}: all`")
    if all(entries.values()):
        raise PlanError(f"{kind.name} would take all {len(layers)} MoE layers; at least one must stay")


LAYER_DROP = LayerDrop()
