"""Experts at full size again: every expert of a layer with weights of its own, as ordinary checkpoints have them.

What was merged is repeated, lost neurons are zeros, bases and low-rank parts are multiplied out. Nothing is saved that
way, but everything loads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from understudy.channels import neurons, rest, set_neurons, set_rest
from understudy.cut import tensor_bytes
from understudy.errors import PlanError
from understudy.experts import StandInExperts, copied
from understudy.moe import MoELayer
from understudy.runtime import quiet_transformers
from understudy.shards import Lazy, Piece, whole
from understudy.skeleton import Skeleton
from understudy.standins import ABSENT, AFFINE, ARCHITECTURE_PREFIX, MERGED, SHARED, SLIM, StandIn
from understudy.weights import DTYPES


def at_full_size(made: Any, plain: Any) -> Any:
    """Give every expert of a module with stand-ins its own weights of full width.

    Args:
        made: the live module with stand-ins.
        plain: a module of the family with all experts, live or on the meta device; it tells the shapes, and is left as
            it is.
    """
    full = copied(plain)
    stacked = [name for name, p in plain._parameters.items() if p is not None and _has_rows(p, plain)]
    for name in stacked:
        like = made.down_proj
        zeros = torch.zeros(plain._parameters[name].shape, dtype=like.dtype, device=like.device)
        full._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
    for expert in range(made.num_logical_experts):
        stand_in = made.stand_ins.get(expert, StandIn(MERGED, into=expert))
        if stand_in.format == MERGED:
            for name in stacked:
                full._parameters[name].data[expert] = made._parameters[name][made.rows[expert]]
        if stand_in.format == SLIM:
            child, row = made.slim_place(expert)
            values = torch.zeros_like(neurons(full, expert))
            values[: stand_in.width] = neurons(child, row)
            set_neurons(full, expert, values)
            set_rest(full, expert, rest(child, row))
        if stand_in.format == SHARED:
            bases = made.bases
            if stand_in.into is not None:
                base = bases.base_row(stand_in.into)
                set_neurons(full, expert, neurons(bases, base))
                set_rest(full, expert, rest(bases, base))
            bases.adapters.merge_into(full, bases.replaced.index(expert), expert)
    return full


def _has_rows(parameter: Tensor, experts: Any) -> bool:
    return parameter.dim() > 0 and parameter.shape[0] == experts.down_proj.shape[0]


def check_ordinary(key: str, stand_ins: Mapping[int, StandIn]) -> None:
    """Refuse stand-ins that no expert of a family can be.

    Raises:
        PlanError: an expert becomes a vector, or an affine map.
    """
    for expert, stand_in in stand_ins.items():
        if stand_in.constant or stand_in.format not in (MERGED, SLIM, ABSENT, SHARED):
            what = "an affine map" if stand_in.format == AFFINE else "a vector"
            raise PlanError(
                f"layer {key}: expert {expert} becomes {what}, which no expert of the family can be; leave out "
                "--materialise"
            )


def ordinary(source: Skeleton) -> tuple[list[Piece], dict[str, Any]]:
    """Say what tensors and what config the ordinary checkpoint has that a folder with stand-ins stands for.

    Raises:
        PlanError: a stand-in that no expert of the family can be, or sublayers that are gone.
    """
    config = copy.deepcopy(source.checkpoint.config)
    transform = config.get("compression_config", {}).get("transform_config", {})
    if set(transform) - {"expert_substitution"}:
        raise PlanError(f"{source.checkpoint.folder}: layers are gone, which --materialise cannot bring back")
    config.pop("compression_config", None)
    names = config.get("architectures") or []
    config["architectures"] = [name.removeprefix(ARCHITECTURE_PREFIX) for name in names]
    workshop = _Workshop(source)
    gone: set[str] = set()
    added: dict[str, list[Piece]] = {}
    for layer in source.layers:
        experts: Any = source.model.get_submodule(layer.name)
        if not isinstance(experts, StandInExperts):
            continue
        check_ordinary(layer.key, experts.stand_ins)
        stays = set(workshop.parameters(layer, stacked=False))
        mine = [key for key, target in source.targets.items() if target.startswith(f"{layer.name}.")]
        mine = [key for key in mine if source.targets[key] not in stays]
        gone.update(mine)
        dtype = next(source.checkpoint.entries[key].dtype for key in mine)
        for name, tensor in workshop.saved(workshop.parameters(layer)).items():
            nbytes = tensor.numel() * DTYPES[dtype][1]
            promise = Lazy(nbytes, workshop.promise(layer, name, dtype))
            added.setdefault(mine[0], []).append(Piece(name, dtype, tuple(tensor.shape), (promise,)))
    pieces: list[Piece] = []
    for key, entry in source.checkpoint.entries.items():
        pieces += added.get(key, [])
        pieces += [] if key in gone else [whole(entry)]
    return pieces, config


class _Workshop:
    """Multiplies out the experts of a layer when the first of their tensors is asked for, one layer at a time."""

    def __init__(self, source: Skeleton) -> None:
        self.source, self.plain = source, source.build()
        self.plain._weight_conversions = source.used_conversions
        self._held: tuple[str, dict[str, Tensor]] | None = None

    def parameters(self, layer: MoELayer, stacked: bool = True) -> dict[str, Tensor]:
        """Return the parameters of a layer's experts as the family has them, by their names in the model."""
        experts: Any = self.plain.get_submodule(layer.name)
        mine = {
            name: p for name, p in experts.named_parameters() if ("." not in name and _has_rows(p, experts)) == stacked
        }
        return {f"{layer.name}.{name}": p for name, p in mine.items()}

    def saved(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn parameters into tensors of a checkpoint."""
        with quiet_transformers():
            return dict(revert_weight_conversion(self.plain, dict(parameters)))

    def promise(self, layer: MoELayer, name: str, dtype: str) -> Callable[[], bytes]:
        """Return what computes the bytes of a tensor."""
        return lambda: tensor_bytes(self._tensors(layer)[name].to(getattr(torch, DTYPES[dtype][0])))

    @torch.no_grad()
    def _tensors(self, layer: MoELayer) -> dict[str, Tensor]:
        if self._held is None or self._held[0] != layer.key:
            self._held = None
            with self.source.resident(layer.index):
                made = self.source.model.get_submodule(layer.name)
                full = at_full_size(made, self.plain.get_submodule(layer.name))
                found = {name: full.get_parameter(name[len(layer.name) + 1 :]) for name in self.parameters(layer)}
            self._held = (layer.key, self.saved({name: p.detach() for name, p in found.items()}))
        return self._held[1]
