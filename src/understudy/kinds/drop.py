"""`drop`: the expert is removed with its router row, so that the folder is an ordinary checkpoint of its family.

Source: the pruning of REAP (arXiv 2510.13999) and most others. Stock loaders know one number of experts for the whole
model, hence the rules below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from understudy.entries import Entry, ids_of
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind

if TYPE_CHECKING:
    from understudy.cut import LayerCut, LayerSource


class Drop(Kind):
    """Nothing; the router never chooses the expert again, and those that stay are renumbered."""

    name = "drop"
    description = "removed with its router row; the same number in every layer, loads without understudy"
    unseen = "are removed"
    renumbers = True

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return 0."""
        return 0

    def freed_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of the experts with their router rows."""
        return (layer.expert_bytes + layer.router_row_bytes) * len(ids_of(entry))

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return why router rows cannot be removed."""
        return layer.removable

    def most(self, layer: LayerFacts) -> int:
        """Return how many can go while every token still finds its top-k."""
        return layer.experts - layer.groups * _least_in_group(layer)

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Drop the experts' own tensors and router rows; kept experts move up, as stock loaders expect."""
        from understudy.cut import LayerCut, renamed, without_rows

        tensors, kept = source.tensors, source.kept(replaced)
        changed = without_rows(source.checkpoint, [*tensors.stacked, *tensors.router], kept)
        for new, old in enumerate(kept):
            for key in tensors.by_expert.get(old, ()):
                changed[key] = renamed(source.checkpoint, tensors, key, old, new)
        return LayerCut(gone=source.own_tensors(replaced), changed=changed)

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse too few experts left, and uneven counts in groups or layers."""
        for key, entry in entries.items():
            chosen = ids_of(entry)
            if chosen:
                _check_layer(self, key, layers[key], chosen)
        first: dict[int, str] = {}  # layers of the same number of experts must end with the same number
        for key, entry in entries.items():
            chosen = ids_of(entry)
            other = first.setdefault(layers[key].experts, key)
            if len(chosen) != len(entries[other]):
                raise PlanError(
                    f"{self.name} takes {len(entries[other])} experts from layer {other} and {len(chosen)} from layer "
                    f"{key}; stock loaders need the same number in every layer; even them out or use --kind constant"
                )


def _check_layer(kind: Drop, key: str, layer: LayerFacts, chosen: Sequence[int]) -> None:
    left, most = layer.experts - len(chosen), kind.most(layer)
    if left < layer.top_k:
        raise PlanError(
            f"layer {key}: {kind.name} leaves {left} of {layer.experts} experts, fewer than the {layer.top_k} that "
            f"each token uses (top-k); at most {most} can go (ratio {most / layer.experts:.6g})"
        )
    size = layer.experts // layer.groups
    taken = Counter(i // size for i in chosen)
    if len({taken[group] for group in range(layer.groups)}) > 1:
        raise PlanError(
            f"layer {key}: its router chooses among {layer.groups} groups of {size} consecutive experts, and "
            f"{kind.name} must take the same number from each; the plan takes "
            f"{', '.join(str(taken[g]) for g in range(layer.groups))}"
        )
    if len(chosen) > most:
        raise PlanError(
            f"layer {key}: {kind.name} leaves {left // layer.groups} experts in each of the {layer.groups} groups of "
            f"the router, which needs {_least_in_group(layer)}; at most {most} can go "
            f"(ratio {most / layer.experts:.6g})"
        )


def _least_in_group(layer: LayerFacts) -> int:
    """Experts of one group that must stay: a token's top-k comes from `top_groups` groups only."""
    if layer.groups == 1:
        return layer.top_k
    # routers rank a group by its best expert or its best two, so one would not do
    return max(2, -(-layer.top_k // (layer.top_groups or layer.groups)))


DROP = Drop()
