"""`block_drop`: a whole decoder layer goes, attention and MoE; what is left is an ordinary, shallower checkpoint.

Source: Block Drop in "Towards Efficient Mixture of Experts" (arXiv 2406.02500).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from understudy.entries import Entry
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.kinds.layer_drop import check_whole

if TYPE_CHECKING:
    from understudy.cut import LayerCut, LayerSource


class BlockDrop(Kind):
    """Nothing, for a decoder layer with all that is in it; the layers behind it move up."""

    name = "block_drop"
    description = "the decoder layer is removed whole, loads without understudy"
    unseen = "are removed with their layer"
    losers = False

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return 0."""
        return 0

    def freed_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of everything in the decoder layer."""
        return layer.decoder_bytes

    def most(self, layer: LayerFacts) -> int:
        """Return all experts: it is all or none."""
        return layer.experts

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Change nothing inside of layers; `understudy.removal` takes them out when all else is decided."""
        from understudy.cut import LayerCut

        return LayerCut()

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse a part of a layer, and all layers."""
        check_whole(self, layers, entries)


BLOCK_DROP = BlockDrop()
