"""What cutting one layer changes in a checkpoint, and the names that new tensors get there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers.core_model_loading import revert_weight_conversion

from understudy.checkpoint import Checkpoint
from understudy.entries import ids_of
from understudy.experts import install_constants
from understudy.layout import ExpertTensors
from understudy.loading import adapt_conversions
from understudy.moe import MoELayer, expert_dim
from understudy.plans import Plan
from understudy.runtime import quiet_transformers
from understudy.shards import Piece, rows, whole
from understudy.skeleton import Skeleton
from understudy.stats import ExpertStats


@dataclass(frozen=True)
class LayerSource:
    """What a kind of stand-in is given of one layer; `names` are tensor names for stand-ins, by original id."""

    layer: MoELayer
    tensors: ExpertTensors
    checkpoint: Checkpoint
    stats: ExpertStats | None
    names: Mapping[int, str]

    def kept(self, replaced: Sequence[int]) -> list[int]:
        """Original ids of the other experts, ascending."""
        return [e for e in range(self.layer.num_experts) if e not in set(replaced)]

    def own_tensors(self, replaced: Sequence[int]) -> set[str]:
        """Tensors that belong to these experts alone."""
        return {key for expert in replaced for key in self.tensors.by_expert.get(expert, ())}


@dataclass(frozen=True)
class LayerCut:
    """Source tensors that are not written, tensors written in another form, new ones, and what config.json declares."""

    gone: set[str] = field(default_factory=set)
    changed: dict[str, Piece] = field(default_factory=dict)  # by the name of the source tensor
    added: list[Piece] = field(default_factory=list)
    declared: dict[int, str] = field(default_factory=dict)  # original id to the tensor that answers for it


def without_rows(checkpoint: Checkpoint, keys: Sequence[str], kept: Sequence[int]) -> dict[str, Piece]:
    """Cut tensors with one row an expert to the rows of kept experts."""
    cut = {}
    for key in keys:
        entry = checkpoint.entries[key]
        if expert_dim(entry.shape, entry.shape[-1]) == 1:  # a single row `[1, E]`: its elements are the experts'
            piece = rows(replace(entry, shape=entry.shape[1:]), kept)
            cut[key] = replace(piece, shape=(1, *piece.shape))
        else:
            cut[key] = rows(entry, kept)
    return cut


def renamed(checkpoint: Checkpoint, tensors: ExpertTensors, key: str, old: int, new: int) -> Piece:
    """Keep a tensor of expert `old` whole, under the name it has as expert `new`."""
    parts = key.split(".")
    assert parts[tensors.id_position] == str(old)
    parts[tensors.id_position] = str(new)
    return whole(checkpoint.entries[key], ".".join(parts))


def tensor_bytes(value: torch.Tensor) -> bytes:
    """Bytes of a CPU tensor in its own dtype, as safetensors stores them."""
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def novice_names(source: Skeleton, plan: Plan) -> dict[str, dict[int, str]]:
    """Tensor names for the constants of every layer, by the key of the layer and original id.

    They are what transformers itself would call them on saving the compressed model, so that saving it again gives the
    same names; they lie outside `experts`, where engines that do not know stand-ins refuse them.
    """
    wanted = {layer.key: list(ids_of(plan.layers.get(layer.key, {}).get("constant", ()))) for layer in source.layers}
    if not any(wanted.values()):
        return {}
    model = source.build()
    for layer in source.layers:
        if wanted[layer.key]:
            install_constants(model.get_submodule(layer.name), wanted[layer.key], layer.num_experts)
    model._weight_conversions = adapt_conversions(source.used_conversions, model)
    names: dict[str, dict[int, str]] = {}
    for layer in source.layers:
        if wanted[layer.key]:
            name = f"{layer.name}.constants"
            with quiet_transformers():
                saved = revert_weight_conversion(model, {name: model.get_submodule(layer.name).constants})
            assert len(saved) == len(wanted[layer.key])
            names[layer.key] = dict(zip(wanted[layer.key], saved, strict=True))
    return names
