"""What is known of a model without its weights: the sizes that planning needs, carried inside the statistics."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, field_validator

from understudy.errors import UnderstudyError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power


class LayerFacts(BaseModel):
    """Sizes of one MoE layer; bytes are bytes in the checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # dotted name of the experts module
    experts: int
    top_k: int
    hidden: int
    groups: int = 1  # of a group-limited router
    top_groups: int | None = None  # how many of its groups a token may use
    expert_params: int
    expert_bytes: int
    width: int | None = None  # of an expert, None where its weights do not tell
    channel_bytes: int = 0  # of one neuron of an expert: its rows of gate and up, its column of down, its biases
    router_row_bytes: int = 0  # everything outside the experts that goes with one removed expert
    block_bytes: int = 0  # of the whole MoE sublayer: experts, router, shared experts
    block_stays: str | None = None  # why the sublayer cannot be left out, None where it can
    router_bytes: int = 0  # of the router, with what the sublayer keeps for it
    router_stays: str | None = None  # why the layer cannot do without its router, None where it can
    folds_not: str | None = None  # why a few experts with the shared ones are no dense MLP, None where they are
    shared_width: int = 0  # neurons of the shared experts that would be in that MLP
    decoder_bytes: int = 0  # of the whole decoder layer
    removable: str | None = None  # why experts cannot be removed with their router rows, None where they can
    element_bytes: int  # of one element of a stand-in, which is stored in the experts' own dtype


class DenseLayers(BaseModel):
    """How the config of a family says which layers have a dense MLP in the place of experts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    setting: str  # entry of the config: a list by layer, a list of layers, or how many of the first
    first: bool  # it is the number of the first
    width_setting: str  # entry of the config: neurons of all dense MLPs
    widths: dict[int, int]  # decoder layers that are dense already, and their neurons
    neuron_bytes: int  # of one of those neurons


class ModelFacts(BaseModel):
    """A model as planning sees it: identity, total size, MoE layers by key (the decoder layer index as text)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str  # folder name or hub id, for people
    family: str
    fingerprint: str
    nbytes: int
    params: int
    unloaded_bytes: int = 0  # of tensors that the model has no place for (multi-token prediction, ...)
    dense: DenseLayers | None = None  # None where the config cannot say that a condensed layer is dense
    not_dense: str | None = None  # and why not
    layers: dict[str, LayerFacts]  # in the order of the model

    @field_validator("layers")
    @classmethod
    def _in_order(cls, layers: dict[str, LayerFacts]) -> dict[str, LayerFacts]:
        return {key: layers[key] for key in layer_order(layers)}  # a JSON header may come back as 1, 10, 2

    @property
    def experts(self) -> int:
        """Routed experts of the whole model."""
        return sum(layer.experts for layer in self.layers.values())

    @property
    def routed_bytes(self) -> int:
        """Bytes in routed experts."""
        return sum(layer.experts * layer.expert_bytes for layer in self.layers.values())

    @property
    def routed_params(self) -> int:
        """Parameters in routed experts."""
        return sum(layer.experts * layer.expert_params for layer in self.layers.values())


def layer_order(keys: Iterable[str]) -> list[str]:
    """Sort layer keys as the layers follow each other: numbers by value, then text ("2", "3", "3.vision", "10")."""
    return sorted(keys, key=lambda key: [int(p) if p.isdecimal() else p for p in re.split(r"([0-9]+)", key)])


def parse_bytes(text: str) -> int:
    """Read `4.8GB` (decimal) or `4.5GiB` (binary) as a number of bytes.

    Raises:
        UnderstudyError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise UnderstudyError(f"{text!r} is not a size; write 4.8GB, 500MB (decimal) or 4.5GiB (binary)")
    return round(float(match.group(1)) * unit)


def format_bytes(nbytes: int) -> str:
    """Write a number of bytes in decimal units, as disks and model cards do."""
    value = float(nbytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
