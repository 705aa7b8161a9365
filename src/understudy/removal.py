"""Take whole layers out of a checkpoint: MoE sublayers, or decoder layers with all that is in them.

A MoE sublayer that is gone is declared in config.json, and a module that answers zero stands in its place.

Without decoder layers, what is left is an ordinary checkpoint of its family. The layers that stay are renumbered, in
names and in config.json; a model is then built from that config and compared, layer by layer, with the one that it came
from: where a family's config cannot say which layers stayed (every second layer is another kind, say), that shows, and
nothing is written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from understudy.cut import LayerCut, LayerSource
from understudy.errors import PlanError
from understudy.layout import block_keys, guard_of
from understudy.moe import text_config
from understudy.plans import Plan
from understudy.shards import Piece, rows
from understudy.skeleton import Skeleton, read_config

_OWN = ("layer_idx", "layer_id", "layer_number", "training")  # what differs between equal layers
_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "n_layer")


def absent_blocks(source: Skeleton, plan: Plan) -> dict[str, str]:
    """Return the MoE sublayers that a plan leaves out, with the tensor that stays of each, empty."""
    gone = (layer for layer in source.layers if "layer_drop" in plan.layers.get(layer.key, {}))
    return {layer.block: guard_of(source, layer) or "" for layer in gone}


def removed_layers(source: Skeleton, plan: Plan) -> list[int]:
    """Return the decoder layers that a plan removes whole.

    Raises:
        PlanError: it also changes layers that stay; their names would be those of others.
    """
    gone = [layer for layer in source.layers if "block_drop" in plan.layers.get(layer.key, {})]
    others = sorted({kind for kinds in plan.layers.values() for kind in kinds} - {"block_drop"})
    if gone and others:
        raise PlanError(
            f"block_drop renumbers layers and cannot be in a plan with {', '.join(others)}; apply one first"
        )
    return sorted({layer.index for layer in gone})


def without_block(given: LayerSource) -> LayerCut:
    """Leave out the tensors of a MoE sublayer, but for its router's matrix, which stays without a row."""
    source, layer = given.source, given.layer
    guard = guard_of(source, layer)
    keys = block_keys(source, layer)
    kept = [key for key in keys if source.targets[key] == guard][:1]
    assert kept, "kinds refuse what has no guard"
    return LayerCut(gone=set(keys) - set(kept), changed={key: rows(given.checkpoint.entries[key], []) for key in kept})


def without_layers(
    source: Skeleton, pieces: Sequence[Piece], config: dict[str, Any], removed: Collection[int]
) -> tuple[list[Piece], dict[str, Any]]:
    """Leave out the tensors of decoder layers, and renumber those that follow.

    Raises:
        PlanError: the family's config cannot say it.
    """
    depth = len(source.decoder_layers)
    stays = [i for i in range(depth) if i not in set(removed)]
    new_index = {old: new for new, old in enumerate(stays)}
    part_of = {key: part for part, keys in source.keys.items() for key in keys}
    position = _position(source)
    left: list[Piece] = []
    for piece in pieces:
        part = part_of.get(piece.name, -1)
        words = piece.name.split(".")
        if part < 0:
            if len(words) > position and words[position].isdigit() and int(words[position]) >= depth:
                words[position] = str(int(words[position]) - depth + len(stays))  # for multi-token prediction
            left.append(replace(piece, name=".".join(words)))
        elif part in new_index:
            words[position] = str(new_index[part])
            left.append(replace(piece, name=".".join(words)))
    shorter = _shorter_config(source, config, stays)
    _check(source, shorter, stays)
    return left, shorter


def _position(source: Skeleton) -> int:
    """Which dotted part of the checkpoint's names is the number of the decoder layer."""
    found: set[int] | None = None
    for part, keys in source.keys.items():
        if part >= 0:
            for key in keys:
                here = {i for i, word in enumerate(key.split(".")) if word == str(part)}
                found = here if found is None else found & here
    if not found:
        raise _cannot(source, "names of tensors do not tell their layer")
    return min(found)


def _shorter_config(source: Skeleton, config: dict[str, Any], stays: Sequence[int]) -> dict[str, Any]:
    """Say in the config which layers stay: their number, what is listed by layer, and lists of layer numbers."""
    depth = len(source.decoder_layers)
    inner = text_config(source.config)
    nested = [n for n in source.config.sub_configs if getattr(source.config, n, None) is inner and n in config]
    raw = config[nested[0]] if nested else config
    names = {getattr(inner, "attribute_map", {}).get(n, n) for n in _COUNTS if getattr(inner, n, None) == depth}
    changed: dict[str, Any] = {
        name: len(stays) for name in names | {n for n in names | set(_COUNTS) if raw.get(n) == depth}
    }
    if not changed:
        raise _cannot(source, "its config has no number of layers")
    for name, value in raw.items():
        if not isinstance(value, list) or not value:
            continue
        if len(value) == depth:
            changed[name] = [value[i] for i in stays]
        elif name.endswith("layers") and all(type(i) is int and 0 <= i < depth for i in value):
            changed[name] = [stays.index(i) for i in value if i in stays]
    return {**config, nested[0]: {**raw, **changed}} if nested else {**config, **changed}


def _check(source: Skeleton, config: dict[str, Any], stays: Sequence[int]) -> None:
    """Compare each layer of a model built from the new config with the layer that it stands for."""
    try:
        model = source.build(read_config(type(source.config), config))
        layers = list(model.get_submodule(source.stack).children())
    except Exception as error:  # configs check themselves with errors of many packages
        raise _cannot(source, " ".join(str(error).split())[:200]) from None
    if len(layers) != len(stays):
        raise _cannot(source, f"a model of the new config has {len(layers)} layers, not {len(stays)}")
    for new, old in enumerate(stays):
        if _form(layers[new]) != _form(source.decoder_layers[old]):
            raise _cannot(source, f"layer {old} would become layer {new}, which is built otherwise")


def _form(layer: nn.Module) -> list[Any]:
    """What a layer is made of: its modules, the shapes of its weights, and its plain settings but for its number."""
    form: list[Any] = [(name, tuple(x.shape)) for name, x in layer.state_dict().items()]
    for name, module in layer.named_modules():
        plain = {
            k: v
            for k, v in vars(module).items()
            if isinstance(v, (bool, int, float, str, type(None))) and k not in _OWN and not k.startswith("_")
        }
        form.append((name, type(module).__name__, sorted(plain.items(), key=str)))
    return form


def _cannot(source: Skeleton, why: str) -> PlanError:
    return PlanError(
        f"{source.config.model_type} does not allow block_drop: {why}; choose layers that allow it, or layer_drop"
    )
