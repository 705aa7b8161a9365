"""Budgets: what a model is to come down to, in bytes or in parameters, and what is said where it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.facts import LayerFacts, ModelFacts, format_bytes, parse_bytes
from understudy.kinds import added_bytes
from understudy.overlay import overlay_bytes
from understudy.recipe import Selection


def one_of(settings: Sequence[str]) -> PlanError:
    """Return the error for none, or more than one, of the settings that say how much goes."""
    *others, last = (f"--{name.replace('_', '-')}" for name in settings)
    return PlanError(f"give one of {', '.join(others)} and {last}")


@dataclass(frozen=True)
class Target:
    """What a model is to come down to.

    Attributes:
        facts: the sizes to count with; where parameters are counted, a parameter takes one byte in them.
        most: what the smaller model may have, counted so.
        said: as people asked for it.
        of_parameters: whether parameters are counted, or bytes.
    """

    facts: ModelFacts
    most: int
    said: str
    of_parameters: bool = False

    def size(self, layers: Mapping[str, Mapping[str, Entry]], how: Mapping[str, Mapping[str, Any]]) -> int:
        """Return what the model has left with these entries of a plan."""
        return self.facts.nbytes + added_bytes(layers, self.facts, how)

    @property
    def met(self) -> str | None:
        """What to tell where the model is small enough as it is, else None."""
        if self.facts.nbytes > self.most:
            return None
        if self.of_parameters:
            return f"nothing to replace: {self.said} removes no parameter"
        return f"nothing to replace: the model's {format_bytes(self.facts.nbytes)} are within {format_bytes(self.most)}"

    def out_of_reach(self, who: str, least: int, ratio: float) -> PlanError:
        """Return the error for a target that is missed: `least` is what is left at best, at this ratio."""
        source, before = self.facts.source, self.facts.nbytes
        if self.of_parameters:
            share = math.floor((1 - least / before) * 1e6) / 1e6  # as a setting, it is within reach
            return PlanError(
                f"{self.said} is out of reach: {who} removes {share:.6f} of the parameters of {source} at best, at "
                f"ratio {ratio:.6g}"
            )
        return PlanError(
            f"{format_bytes(self.most)} is out of reach: {who} brings {source} from {format_bytes(before)} down to "
            f"{format_bytes(least)} ({least} bytes) at best, at ratio {ratio:.6g}"
        )


def target_of(settings: Selection, facts: ModelFacts) -> Target | None:
    """Return what the settings ask of the whole model, None where they give a ratio of its experts.

    Raises:
        UnderstudyError: the size is not one.
    """
    if settings.size is not None:
        return Target(_with_vectors(facts, settings), parse_bytes(settings.size), settings.size)
    if settings.model_ratio is not None:
        most = math.floor((1 - settings.model_ratio) * facts.params + 1e-6)
        return Target(
            _with_vectors(in_parameters(facts), settings), most, f"model ratio {settings.model_ratio:g}", True
        )
    return None


def _with_vectors(facts: ModelFacts, settings: Selection) -> ModelFacts:
    """Count what `--main-k` adds to every layer, whatever else is chosen for it."""
    return facts.model_copy(update={"nbytes": facts.nbytes + overlay_bytes(facts.layers, settings)})


def in_parameters(facts: ModelFacts) -> ModelFacts:
    """Return facts in which every parameter takes one byte, so that what counts bytes counts parameters.

    Exact for experts. Of the rest of a layer only bytes are known: exact where all tensors outside the routed experts
    have the same dtype, else by their average.
    """
    rest = facts.nbytes - facts.routed_bytes
    rate = (facts.params - facts.routed_params) / rest if rest else 0.0
    layers = {key: _in_parameters(layer, rate) for key, layer in facts.layers.items()}
    dense = facts.dense
    if dense is not None:
        dense = dense.model_copy(update={"neuron_bytes": round(dense.neuron_bytes * rate)})
    unloaded = round(facts.unloaded_bytes * rate)
    more = {"nbytes": facts.params, "unloaded_bytes": unloaded, "dense": dense, "layers": layers}
    return facts.model_copy(update=more)


def _in_parameters(layer: LayerFacts, rate: float) -> LayerFacts:
    in_experts = layer.experts * layer.expert_bytes

    def with_experts(nbytes: int) -> int:
        return layer.experts * layer.expert_params + round((nbytes - in_experts) * rate) if nbytes else 0

    return layer.model_copy(
        update={
            "expert_bytes": layer.expert_params,
            "channel_bytes": layer.channel_bytes // layer.element_bytes,
            "router_row_bytes": round(layer.router_row_bytes * rate),
            "router_bytes": round(layer.router_bytes * rate),
            "block_bytes": with_experts(layer.block_bytes),
            "decoder_bytes": with_experts(layer.decoder_bytes),
            "element_bytes": 1,
        }
    )
