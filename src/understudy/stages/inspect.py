"""Inspect: what a model is made of, and what can be done with it; no weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from understudy.checkpoint import resolve
from understudy.errors import PlanError
from understudy.facts import LayerFacts, ModelFacts
from understudy.kinds import Kind, all_kinds
from understudy.layout import expert_tensors, model_facts, vllm_refuses
from understudy.moe import MoELayer
from understudy.sizes import count_params
from understudy.skeleton import Skeleton

RATIOS = (0.25, 0.5, 0.75)  # for which the size of the result is foretold


@dataclass(frozen=True)
class LayerInspection:
    """One MoE layer: `experts` routed ones of which `stand_ins` are replaced already, `width` inside an expert."""

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int | None
    groups: int
    shared: tuple[str, ...]
    stand_ins: int


@dataclass(frozen=True)
class Possibility:
    """Whether a kind of stand-in can be used: why not, or at most for which share of the experts of each layer."""

    possible: bool
    reason: str | None
    most: float
    expected: dict[str, dict[str, int] | None]  # by ratio, bytes on `disk` and to `load`; None where it cannot be met


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds; bytes are those of tensors in the checkpoint.

    Attributes:
        params: `total`, `routed` (in routed experts and their stand-ins), `active` (that a token passes through).
        bytes: `total`, `routed`, `other`, and `load`: without tensors that the model has no place for.
        kinds: what can be done, by kind of stand-in.
        vllm: why stock vLLM >= 0.33 cannot read novices of this model; None where nothing speaks against it, and for a
            folder that holds stand-ins already.
        facts: what planning knows of the model; None for a folder that holds stand-ins already.
    """

    model: str
    family: str
    architecture: str
    fingerprint: str
    dtype: str
    decoder_layers: int
    layers: dict[str, LayerInspection]
    params: dict[str, int]
    bytes: dict[str, int]
    kinds: dict[str, Possibility]
    vllm: str | None
    facts: ModelFacts | None = field(repr=False)

    @property
    def has_stand_ins(self) -> bool:
        """Whether experts were replaced by stand-ins already."""
        return any(layer.stand_ins for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `--json` prints it."""
        data = {name: value for name, value in asdict(self).items() if name != "facts"}
        experts = sum(layer.experts for layer in self.layers.values())
        return data | {"experts": experts, "has_stand_ins": self.has_stand_ins, "quantised": False}


def inspect(model: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Inspection:
    """Describe a model and what can be done with it, from its config and the headers of its shards.

    Raises:
        UnsupportedModelError: not a Mixture-of-Experts model, or one whose experts cannot be reached.
        CheckpointError: the folder is missing, damaged or quantised.
    """
    skeleton = Skeleton(resolve(model), device="cpu", trust_remote_code=trust_remote_code)
    facts = None if skeleton.has_stand_ins else model_facts(skeleton, os.fspath(model))
    total = skeleton.checkpoint.nbytes
    routed = facts.routed_bytes if facts else _bytes_in_experts(skeleton)
    return Inspection(
        model=os.fspath(model),
        family=str(skeleton.config.model_type),
        architecture=type(skeleton.model).__name__,
        fingerprint=skeleton.checkpoint.fingerprint,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        decoder_layers=len(skeleton.decoder_layers),
        layers={layer.key: _layer(skeleton, layer) for layer in skeleton.layers},
        params=count_params(skeleton, {}),
        bytes={"total": total, "routed": routed, "other": total - routed, "load": total - skeleton.unloaded_bytes},
        kinds={name: _possibility(kind, facts) for name, kind in all_kinds().items()},
        vllm=_vllm(skeleton, facts),
        facts=facts,
    )


def _layer(skeleton: Skeleton, layer: MoELayer) -> LayerInspection:
    experts = skeleton.model.get_submodule(layer.name)
    return LayerInspection(
        name=layer.name,
        experts=layer.num_experts,
        top_k=layer.top_k,
        hidden=layer.hidden_size,
        width=layer.width,
        groups=layer.groups,
        shared=layer.shared,
        stand_ins=len(getattr(experts, "replaced", ())),
    )


def _bytes_in_experts(skeleton: Skeleton) -> int:
    """Bytes of experts and stand-ins, of a folder that was compressed already."""
    inside = tuple(layer.name + "." for layer in skeleton.layers)
    entries = skeleton.checkpoint.entries
    return sum(entries[key].nbytes for key, target in skeleton.targets.items() if target.startswith(inside))


def _possibility(kind: Kind, facts: ModelFacts | None) -> Possibility:
    if facts is None:
        return Possibility(False, "the folder holds stand-ins already; start from the original model", 0.0, {})
    for key, layer in facts.layers.items():
        if reason := kind.refuses(layer):
            return Possibility(False, f"layer {key}: {reason}", 0.0, {})
    most = min(kind.most(layer) / layer.experts for layer in facts.layers.values())
    if most <= 0:
        return Possibility(False, f"every token uses all experts that {kind.name} would have to leave", 0.0, {})
    ratios = RATIOS if kind.losers else ()  # what another kind saves depends on more than how many experts it takes
    return Possibility(True, None, most, {str(ratio): _expected(kind, facts, ratio) for ratio in ratios})


def _expected(kind: Kind, facts: ModelFacts, ratio: float) -> dict[str, int] | None:
    counts = {key: round(ratio * layer.experts) for key, layer in facts.layers.items()}
    entries = {key: tuple(_evenly(facts.layers, key, count)) for key, count in counts.items()}
    try:
        kind.check(facts.layers, entries)
    except PlanError:
        return None
    nbytes = facts.nbytes + sum(kind.added_bytes(facts.layers[key], entry) for key, entry in entries.items())
    return {"disk": nbytes, "load": nbytes - facts.unloaded_bytes}


def _evenly(layers: Mapping[str, LayerFacts], key: str, count: int) -> list[int]:
    """Any ids of a layer, spread over the groups of its router."""
    groups, experts = layers[key].groups, layers[key].experts
    return [group * (experts // groups) + i for i in range(experts // groups) for group in range(groups)][:count]


def _vllm(skeleton: Skeleton, facts: ModelFacts | None) -> str | None:
    if facts is None:
        return None
    reasons = (vllm_refuses(layer, expert_tensors(skeleton, layer)) for layer in skeleton.layers)
    return next((reason for reason in reasons if reason), None)
