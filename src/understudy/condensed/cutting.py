"""What condensed layers become in the checkpoint of a whole plan: ordinary dense layers, or experts without router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from understudy.cut import LayerCut, LayerSource
from understudy.errors import PlanError
from understudy.facts import ModelFacts, format_bytes
from understudy.folding import cut_unrouted, fold
from understudy.kinds import get_kind
from understudy.kinds.condense import Condense, dense_width, staying
from understudy.layout import guard_of
from understudy.plans import Plan
from understudy.skeleton import Skeleton
from understudy.standins import declare_unrouted


@dataclass(frozen=True)
class Condensed:
    """Cuts with the tensor that each comes after, the new config.json, and what people should know of the form."""

    cuts: list[tuple[str, LayerCut]]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()
    readers: str | None = None  # who loads the folder, where that is not said by the rest of the config


def cut_condensed(
    source: Skeleton,
    plan: Plan,
    facts: ModelFacts,
    given: Mapping[str, LayerSource],
    config: dict[str, Any],
    ordinary: bool = False,
) -> Condensed:
    """Cut the layers that a plan condenses; nothing changes where there are none.

    Args:
        source: the whole model.
        plan: has been checked against the model.
        facts: of the model.
        given: what is known of each changed layer, by key.
        config: config.json so far.
        ordinary: refuse layers that cannot be written as ordinary dense ones.

    Raises:
        PlanError: they cannot, or the model of the new config is not what it should be.
    """
    entries = {key: kinds["condense"] for key, kinds in plan.layers.items() if "condense" in kinds}
    if not entries:
        return Condensed([], config)
    kind = get_kind("condense").having(plan.how.get("condense", {}))
    assert isinstance(kind, Condense)
    layers = {layer: staying(entries[layer.key]) for layer in source.layers if layer.key in entries}
    reason = kind.why_native(facts, entries)
    if reason is None:
        assert facts.dense is not None
        width, padding = dense_width(facts, entries), kind.beside_bytes(facts, entries)
        folded = fold(source, layers, facts.dense, width, config, given)
        note = (
            f"condensed layers are ordinary dense ones of {width} neurons ({facts.dense.setting} in config.json); "
            f"zeros that give all dense layers this width take {format_bytes(padding)}"
        )
        turned = {layer.index for layer in layers} | set(facts.dense.widths)
        first = turned == set(range(len(turned)))  # which is all that other readers take from such a list
        readers = "stock transformers" if facts.dense.setting == "mlp_layer_types" and not first else None
        return Condensed(folded.cuts, folded.config, (note,), readers)
    if ordinary:
        raise PlanError(f"condensed layers cannot be written as ordinary ones: {reason}; leave out --materialise")
    cuts = [(max(given[x.key].tensors.all_experts), cut_unrouted(given[x.key], w)) for x, w in layers.items()]
    declare_unrouted(config, {layer.name: (guard_of(source, layer) or "", w) for layer, w in layers.items()})
    note = f"condensed layers need `import understudy`, since they cannot be ordinary dense ones: {reason}"
    return Condensed(cuts, config, (note,))
