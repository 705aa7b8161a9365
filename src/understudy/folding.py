"""Condensed layers in a checkpoint: folded into an ordinary dense MLP, or left as a few experts without a router.

Folded, the gate and up rows of the experts that stay come one after the other, their down columns are multiplied by
their constant weights, and the shared experts follow. One entry of the config gives the width of all dense layers, so
that smaller ones end in neurons of zeros.

Letters: H hidden size, D neurons of a dense MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from understudy.channels import channel_views
from understudy.cut import LayerCut, LayerSource, Workshop, without_rows
from understudy.dense import cannot, dense_config, form_of, place_of, projections_of, shared_in, width_of
from understudy.facts import DenseLayers
from understudy.layout import block_keys, expert_dtype, guard_of
from understudy.moe import MoELayer
from understudy.runtime import quiet_transformers
from understudy.shards import Part, Piece, Range, rows
from understudy.skeleton import Skeleton, read_config
from understudy.unrouted import router_tensors
from understudy.weights import TensorEntry


def cut_unrouted(given: LayerSource, weights: Mapping[int, float]) -> LayerCut:
    """Keep the experts that `weights` names, and of the router its matrix without a row."""
    source, layer, tensors = given.source, given.layer, given.tensors
    guard = guard_of(source, layer)
    assert guard, "kinds refuse what has no guard"
    routing = set(router_tensors(source.model, layer, guard))
    gone = {key for key, target in source.targets.items() if target in routing}
    left = [key for key in sorted(gone) if source.targets[key] == guard][:1]
    changed = {key: rows(given.checkpoint.entries[key], []) for key in left}
    if weights:
        changed |= without_rows(given.checkpoint, tensors.stacked, sorted(weights))
    others = given.own_tensors([e for e in range(layer.num_experts) if e not in weights])
    return LayerCut(gone=(gone | others | (set() if weights else set(tensors.stacked))) - set(left), changed=changed)


@dataclass(frozen=True)
class Folded:
    """What becomes of layers that turn dense: cuts with the tensor that they come after, and config.json."""

    cuts: list[tuple[str, LayerCut]]
    config: dict[str, Any]


def fold(
    source: Skeleton,
    layers: Mapping[MoELayer, Mapping[int, float]],
    dense: DenseLayers,
    width: int,
    config: dict[str, Any],
    given: Mapping[str, LayerSource],
) -> Folded:
    """Fold condensed layers into dense MLPs of `width` neurons, and widen those that are dense already.

    Args:
        source: the whole model.
        layers: w of the experts that stay, for each layer that is condensed.
        dense: how the config says it.
        width: D.
        config: config.json, which is left as it is.
        given: what is known of each of these layers, by its key.

    Raises:
        PlanError: the model of the new config is not what it should be.
    """
    indices = {layer.index for layer in layers}
    new = dense_config(source, dense, indices, width, config)
    plain = {k: v for k, v in new.items() if k != "compression_config"}
    model = source.build(read_config(type(source.config), plain))
    built = list(model.get_submodule(source.stack).children())
    for i, (old, module) in enumerate(zip(source.decoder_layers, built, strict=True)):
        place = place_of(source.layers[0])
        turned = i in indices or i in dense.widths
        if (width_of(module, place) != width) if turned else (form_of(old) != form_of(module)):
            raise cannot(f"layer {i} would not be what it should be")
    model._weight_conversions = list(source.used_conversions)
    cuts = [_fold_layer(source, model, given[layer.key], weights, width) for layer, weights in layers.items()]
    for i, before in dense.widths.items():
        if before != width:
            cuts.append(_widen(source, f"{source.stack}.{i}.{place_of(source.layers[0])}", before, width))
    return Folded(cuts, new)


def _fold_layer(
    source: Skeleton, model: Any, given: LayerSource, weights: Mapping[int, float], width: int
) -> tuple[str, LayerCut]:
    layer, mlp = given.layer, model.get_submodule(given.layer.block)
    names = {}
    for role, part in (projections_of(mlp) or {}).items():
        with quiet_transformers():
            saved = revert_weight_conversion(model, {f"{layer.block}.{part}.weight": mlp.get_submodule(part).weight})
        (names[role],) = saved
    workshop: Workshop = given.workshop

    def make(experts: Any) -> dict[str, Tensor]:
        block = workshop.source.model.get_submodule(layer.block)
        shared = [block.get_submodule(name) for name in shared_in(layer)]
        return {names[role]: x for role, x in folded(experts, shared, weights, width).items()}

    dtype, hidden, keys = expert_dtype(given.checkpoint, given.tensors), layer.hidden_size, block_keys(source, layer)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    added = [
        Piece(names[r], dtype, shape, (workshop.promise(layer, make, names[r], shape, dtype),))
        for r, shape in shapes.items()
    ]
    return max(keys), LayerCut(gone=set(keys), added=added)


def folded(experts: Any, shared: Sequence[Any], weights: Mapping[int, float], width: int) -> dict[str, Tensor]:
    """Return the projections of one dense MLP of experts times w, shared experts, and neurons of zeros.

    `gate` and `up` are `[D, H]`, `down` is `[H, D]`, all float32 where w was multiplied.
    """
    views = channel_views(experts)
    found: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    for expert, weight in sorted(weights.items()):
        found["gate"].append(views["gate"][expert])
        found["up"].append(views["up"][expert])
        found["down"].append(views["down"][expert].float() * weight)
    for mlp in shared:
        for role, part in (projections_of(mlp) or {}).items():
            matrix = mlp.get_submodule(part).weight.detach()
            found[role].append(matrix.t() if role == "down" else matrix)
    hidden = experts.down_proj.shape[1]
    made = {}
    for role, parts in found.items():
        filled = torch.cat([part.float() for part in parts]) if parts else torch.zeros(0, hidden)
        padded = nn.functional.pad(filled, (0, 0, 0, width - len(filled)))
        made[role] = padded.t().contiguous() if role == "down" else padded
    return made


def _widen(source: Skeleton, mlp: str, before: int, width: int) -> tuple[str, LayerCut]:
    """Add neurons of zeros to a dense MLP; what was there is copied byte for byte."""
    changed = {}
    for role, part in (projections_of(source.model.get_submodule(mlp)) or {}).items():
        keys = [key for key, target in source.targets.items() if target == f"{mlp}.{part}.weight"]
        entry = source.checkpoint.entries[keys[0]]
        if len(keys) != 1 or entry.shape != tuple(source.get(f"{mlp}.{part}.weight").shape):
            raise cannot(f"{mlp} is stored in another form than the model has it")
        changed[keys[0]] = _padded(entry, 1 if role == "down" else 0, width - before)
    return max(changed), LayerCut(changed=changed)


def _padded(entry: TensorEntry, dim: int, more: int) -> Piece:
    size = entry.nbytes // entry.numel
    if dim == 0:
        zeros = bytes(more * entry.shape[1] * size)
        return Piece(
            entry.name, entry.dtype, (entry.shape[0] + more, entry.shape[1]), (Range(entry, 0, entry.nbytes), zeros)
        )
    row, zeros = entry.nbytes // entry.shape[0], bytes(more * size)
    parts: list[Part] = [p for i in range(entry.shape[0]) for p in (Range(entry, i * row, row), zeros)]
    return Piece(entry.name, entry.dtype, (entry.shape[0], entry.shape[1] + more), tuple(parts))
