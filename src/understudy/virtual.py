"""The model that a plan leads to: all its tensors and its config, to be written, or to be read without writing."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from understudy.condensed.cutting import cut_condensed
from understudy.cut import LayerCut, LayerSource, Make, Outline, Workshop, cut_stand_ins, materialised
from understudy.entries import Entry, ids_of
from understudy.errors import NumericError
from understudy.experts import copied, install
from understudy.full_size import at_full_size, check_ordinary
from understudy.kinds import get_kind, stand_ins_of
from understudy.kinds.modulate import modulated_layers, plain_config
from understudy.layout import expert_tensors, model_facts
from understudy.moe import MoELayer, expert_count_keys, text_config
from understudy.plans import Plan
from understudy.removal import absent_blocks, removed_layers, without_layers
from understudy.shards import Lazy, Piece, Range, size_of, whole
from understudy.skeleton import Skeleton
from understudy.standins import (
    ARCHITECTURE_PREFIX,
    StandIn,
    declare,
    declare_absent,
    declare_modulated,
    declared_unrouted,
    known_to_engines,
)
from understudy.stats import ExpertStats, Stats
from understudy.weights import TensorEntry, Weights


@dataclass(frozen=True)
class Outcome:
    """Every tensor that a plan leads to, in the order of the source, the new config.json, and who computes the new.

    `at_full_size`: experts were written out that the plan made smaller. `notes`: what people should know of the form.
    `readers`: who loads the folder, where that is not what the config would say.
    """

    pieces: list[Piece]
    config: dict[str, Any]
    workshop: Workshop
    at_full_size: bool
    notes: tuple[str, ...] = ()
    readers: str | None = None


def outcome(source: Skeleton, plan: Plan, stats: Stats | None, materialise: bool = False) -> Outcome:
    """Say what tensors and what config a plan leads to; no weight is read yet.

    The plan and the statistics have been checked against the source. With `materialise`, experts that share weights or
    lost neurons are written at full size, so that the checkpoint is an ordinary one.

    Raises:
        PlanError: `materialise`, and a stand-in that no expert of the family can be.
    """
    facts = model_facts(source, source.checkpoint.folder.name)
    stand_ins = {key: found for key in plan.layers if (found := stand_ins_of(plan, key, facts.layers[key]))}
    if materialise:
        for key, found in stand_ins.items():
            check_ordinary(key, found)
    modulated = modulated_layers(source, plan, materialise)
    workshop = Workshop(source, Outline(source, {} if materialise else stand_ins, modulated))
    changes: list[tuple[str, LayerCut]] = []  # after which tensor the new ones come
    declared: dict[str, tuple[Mapping[int, StandIn], Mapping[int, str]]] = {}
    remaining: int | None = None
    sources: dict[str, LayerSource] = {}
    for layer in source.layers:
        kinds = plan.layers.get(layer.key, {})
        if not kinds:
            continue
        tensors = expert_tensors(source, layer)
        known = stats.layers[layer.key] if stats else None
        given = sources[layer.key] = LayerSource(source, layer, tensors, source.checkpoint, known, workshop)
        if layer.key in stand_ins:
            mine = stand_ins[layer.key]
            make = partial(made, layer, mine, kinds, plan.how, known)
            if materialise:
                cut = materialised(source, given, workshop, partial(_at_full_size, make), list(mine))
            else:
                cut = cut_stand_ins(source, given, workshop, make, _vectors(kinds, known))
                declared[layer.name] = (cut.stand_ins, cut.vectors)
            changes.append((max(tensors.all_experts), cut))
        for name, entry in kinds.items():
            if not get_kind(name).substitutes:
                kind = get_kind(name).having(plan.how.get(name, {}))
                changes.append((max(tensors.all_experts), kind.cut(given, ids_of(entry))))
            if get_kind(name).renumbers:
                remaining = layer.num_experts - len(ids_of(entry))
    config = copy.deepcopy(source.checkpoint.config)
    if remaining is not None:
        _set_expert_count(config, source, remaining)
    if declared:
        config["compression_config"] = declare(declared)
    if modulated is not None:
        declare_modulated(config, modulated)
    asked = plain_config(source, plan, config)
    if absent := absent_blocks(source, plan):
        declare_absent(config, absent)
    condensed = cut_condensed(source, plan, facts, sources, config, materialise)
    changes, config = changes + condensed.cuts, condensed.config
    ours = absent or modulated is not None or declared_unrouted(config)
    if ours or not all(known_to_engines(found) for found, _ in declared.values()):
        names = config.get("architectures") or [type(source.model).__name__]
        config["architectures"] = [ARCHITECTURE_PREFIX + name for name in names]
    pieces = _in_order(source, changes)
    if removed := removed_layers(source, plan):
        pieces, config = without_layers(source, pieces, config, removed)
    notes = (*condensed.notes, *asked)
    return Outcome(pieces, config, workshop, materialise and bool(stand_ins), notes, condensed.readers)


def planned(source: Skeleton, plan: Plan, stats: Stats | None) -> Skeleton:
    """Open the model that a plan leads to without writing it: weights are read, or computed, layer by layer.

    Raises:
        PlanError: the plan is not of this model, or not possible for it.
    """
    return source.like(PlannedWeights(source, plan, stats), dtype=str(source.dtype).removeprefix("torch."))


class PlannedWeights(Weights):
    """Tensors that a plan leads to, put together from the source's when they are asked for."""

    def __init__(self, source: Skeleton, plan: Plan, stats: Stats | None) -> None:
        found = outcome(source, plan, stats)
        self.source, self.plan, self._workshop = source, plan, found.workshop
        self.folder, self.config = source.checkpoint.folder, found.config
        self._parts = {piece.name: piece.parts for piece in found.pieces}
        self.entries = {p.name: TensorEntry(p.name, "", p.dtype, p.shape, 0, p.nbytes) for p in found.pieces}

    @cached_property
    def fingerprint(self) -> str:
        """That of the source and the plan."""
        text = f"{self.source.checkpoint.fingerprint}\0{self.plan.text()}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def fill(self, entry: TensorEntry, start: int, view: memoryview) -> None:
        """Read from the source's shards, or compute."""
        end, begin = start + len(view), 0
        for part in self._parts[entry.name]:
            first, last = max(start, begin), min(end, begin + size_of(part))
            if first < last:
                target = view[first - start : last - start]
                if isinstance(part, Range):
                    self.source.checkpoint.fill(part.entry, part.start + first - begin, target)
                else:
                    data = part.read() if isinstance(part, Lazy) else part
                    target[:] = memoryview(data)[first - begin : last - begin]
            begin += size_of(part)

    def release(self) -> None:
        """Let go of the layer whose new tensors were computed last."""
        self._workshop.release()


def _vectors(kinds: Mapping[str, Entry], stats: ExpertStats | None) -> dict[int, Any]:
    """Constants that are told by the statistics alone, by original id."""
    if stats is None:
        return {}
    known = [(get_kind(name), entry) for name, entry in kinds.items() if not get_kind(name).overlays]
    found = {e: kind.answer(stats, e) for kind, entry in known for e in ids_of(entry)}
    return {e: vector for e, vector in found.items() if vector is not None}


def made(
    layer: MoELayer,
    stand_ins: Mapping[int, StandIn],
    kinds: Mapping[str, Entry],
    how: Mapping[str, Mapping[str, Any]],
    stats: ExpertStats | None,
    experts: Any,
) -> Any:
    """Make the experts of a layer as a plan wants them from live ones, which stay as they are."""
    made = copied(experts)
    install(made, stand_ins, layer.num_experts)
    for name, entry in kinds.items():
        try:
            get_kind(name).fill(made, experts, entry, how.get(name, {}), stats)
        except NumericError as error:
            raise NumericError(f"layer {layer.key}: {error}") from None
    return made


def _at_full_size(make: Make, experts: Any) -> Any:
    return at_full_size(make(experts), experts)


def _in_order(source: Skeleton, changes: list[tuple[str, LayerCut]]) -> list[Piece]:
    gone = {key for _, cut in changes for key in cut.gone}
    changed = {key: piece for _, cut in changes for key, piece in cut.changed.items()}
    added: dict[str, list[Piece]] = {}
    for key, cut in changes:
        added.setdefault(key, []).extend(cut.added)
    pieces: list[Piece] = []
    for key, entry in source.checkpoint.entries.items():
        if key not in gone:
            pieces.append(changed.get(key, whole(entry)))
        pieces.extend(added.get(key, ()))
    return pieces


def _set_expert_count(config: dict[str, Any], source: Skeleton, remaining: int) -> None:
    """Write the new number of experts where the config keeps it, under every name that it goes by there."""
    inner = text_config(source.config)
    raw = config
    if inner is not source.config:
        raw = next(
            (config[n] for n in source.config.sub_configs if getattr(source.config, n, None) is inner and n in config),
            config,
        )
    before = source.layers[0].num_experts
    names = set(expert_count_keys(inner, before))
    names |= {getattr(inner, "attribute_map", {}).get(n, n) for n in names}
    present = [n for n in names if raw.get(n) == before]
    for name in present or sorted(names)[:1]:
        raw[name] = remaining
