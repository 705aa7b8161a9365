"""What cutting one layer changes in a checkpoint: tensors that go, that are written otherwise, and that are new.

What is kept becomes ranges of source bytes. What is computed becomes a promise: its name and size are told by a model
on the meta device, its bytes by a workshop that holds one layer at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers.core_model_loading import revert_weight_conversion

from understudy.errors import UnsupportedModelError
from understudy.experts import install, modulate, parts_of
from understudy.layout import ExpertTensors, expert_dtype
from understudy.loading import adapt_conversions
from understudy.moe import MoELayer, expert_dim
from understudy.runtime import quiet_transformers
from understudy.shards import Lazy, Piece, rows, whole
from understudy.skeleton import Skeleton
from understudy.standins import CONSTANT, Modulated, StandIn
from understudy.stats import ExpertStats
from understudy.weights import DTYPES, Weights

# the live experts of the source -> the live experts as they will be, or tensors by their names in the checkpoint
Make = Callable[[Any], Any]


@dataclass(frozen=True)
class LayerSource:
    """What a kind is given of one layer."""

    source: Skeleton
    layer: MoELayer
    tensors: ExpertTensors
    checkpoint: Weights
    stats: ExpertStats | None
    workshop: Workshop

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
    stand_ins: Mapping[int, StandIn] = field(default_factory=dict)
    vectors: dict[int, str] = field(default_factory=dict)  # original id to the tensor that holds its constant


class Outline:
    """The model as it will be, on the meta device: it knows what tensors will be called.

    Names are those that transformers itself gives on saving, so that saving again gives the same; constants lie outside
    `experts`, where engines that do not know stand-ins refuse them.
    """

    def __init__(
        self,
        source: Skeleton,
        stand_ins: Mapping[str, Mapping[int, StandIn]],
        modulated: Modulated | None = None,
    ) -> None:
        self.model = source.build()
        for layer in source.layers:
            experts = self.model.get_submodule(layer.name)
            if layer.key in stand_ins:
                install(experts, stand_ins[layer.key], layer.num_experts)
            if modulated is not None and layer.name in modulated.layers:
                modulate(experts, layer.num_experts, modulated.main_k, modulated.vectors, modulated.renormalise)
        self.model._weight_conversions = adapt_conversions(source.used_conversions, self.model)

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Turn tensors by their names in the model into those of the checkpoint."""
        with quiet_transformers():
            return dict(revert_weight_conversion(self.model, dict(tensors)))


class Workshop:
    """Computes the new tensors of a layer when the first of them is asked for, and keeps one layer's at a time."""

    def __init__(self, source: Skeleton, outline: Outline) -> None:
        self.source, self.outline = source.as_stored, outline
        self._lock = threading.RLock()  # transformers reads tensors in several threads
        self._held: tuple[str, dict[str, torch.Tensor]] | None = None

    def promise(self, layer: MoELayer, make: Make, name: str, shape: Sequence[int], dtype: str, row: int = -1) -> Lazy:
        """Promise one tensor of a layer by its name in the checkpoint, or one row (dim 0) of it."""
        count = int(np.prod(shape, dtype=np.int64))

        def compute() -> bytes:
            with self._lock:
                value = self._tensors(layer, make)[name]
                value = value if row < 0 else value[row]
                assert tuple(value.shape) == tuple(shape)
                return tensor_bytes(value.to("cpu", getattr(torch, DTYPES[dtype][0])))

        return Lazy(count * DTYPES[dtype][1], compute)

    def release(self) -> None:
        """Let go of the layer that is held."""
        with self._lock:
            self._held = None

    @torch.no_grad()
    def _tensors(self, layer: MoELayer, make: Make) -> dict[str, torch.Tensor]:
        if self._held is None or self._held[0] != layer.key:
            self._held = None
            experts = self.source.model.get_submodule(layer.name)
            if experts.down_proj.is_meta:
                with self.source.resident(layer.index):
                    made = make(experts)
            else:  # somebody else has the layer in memory and will free it
                made = make(experts)
            if isinstance(made, dict):  # tensors by their names in the checkpoint
                self._held = (layer.key, made)
                return made
            found = {f"{layer.name}.{name}": p.detach() for name, p in own_parameters(made).items()}
            self._held = (layer.key, self.outline.saved(found))
        return self._held[1]


def own_parameters(experts: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of an experts module and of its parts for stand-ins, by name."""
    found = {name: p for name, p in experts._parameters.items() if p is not None}
    for place, part in parts_of(experts).items():
        found |= {f"{place}.{name}": p for name, p in part._parameters.items() if p is not None}
    return found


def cut_stand_ins(
    source: Skeleton, given: LayerSource, workshop: Workshop, make: Make, vectors: Mapping[int, np.ndarray]
) -> LayerCut:
    """Cut one layer whose outline has stand-ins; `vectors` are constants that are known without the weights.

    Raises:
        UnsupportedModelError: transformers would save the experts under other names than the source has.
    """
    layer, tensors = given.layer, given.tensors
    experts: Any = workshop.outline.model.get_submodule(layer.name)
    by_row = _with_rows(source, layer)
    narrow = any(experts.stand_ins[e].width is not None for e in experts.kept if e in experts.stand_ins)
    computed = [e for e in experts.kept if narrow or e in experts.stand_ins]
    expected = {key for e in experts.kept for key in tensors.by_expert.get(e, ())} | set(tensors.stacked)
    saved = workshop.outline.saved({f"{layer.name}.{n}": experts._parameters[n] for n in by_row}) if computed else {}
    if computed and set(saved) != expected:
        odd = sorted(set(saved) ^ expected)[0]
        raise UnsupportedModelError(
            f"{given.checkpoint.folder}: transformers would not save the experts of {layer.name} under the names they "
            f"have here (the first that differs is {odd}); only constant and drop are possible for it"
        )
    changed = {} if narrow else without_rows(given.checkpoint, tensors.stacked, experts.kept)
    for key in sorted(expected if computed else ()):
        entry = given.checkpoint.entries[key]
        shape, dtype = tuple(saved[key].shape), entry.dtype
        if key not in tensors.stacked or narrow:
            if narrow or any(key in tensors.by_expert[e] for e in computed):
                promise = workshop.promise(layer, make, key, shape, dtype)
                changed[key] = Piece(key, dtype, shape, (promise,))
        else:
            new = {e: workshop.promise(layer, make, key, shape[1:], dtype, experts.rows[e]) for e in computed}
            changed[key] = rows(entry, experts.kept, new)
    added, names = _added(source, given, workshop, make, vectors)
    gone = given.own_tensors([e for e in range(layer.num_experts) if e not in experts.kept])
    return LayerCut(gone, changed, added, experts.stand_ins, names)


def materialised(source: Skeleton, given: LayerSource, workshop: Workshop, make: Make, ids: Sequence[int]) -> LayerCut:
    """Write experts `ids` of one layer at their full size, as the module that `make` gives holds them."""
    layer, tensors = given.layer, given.tensors
    own = dict(source.model.get_submodule(layer.name)._parameters)
    saved = workshop.outline.saved({f"{layer.name}.{n}": own[n] for n in _with_rows(source, layer)})
    if set(saved) != set(tensors.all_experts):
        raise UnsupportedModelError(
            f"{given.checkpoint.folder}: transformers would not save the experts of {layer.name} under the names they "
            "have here; leave out --materialise"
        )
    changed = {}
    for expert in ids:
        for key in tensors.by_expert.get(expert, ()):
            entry = given.checkpoint.entries[key]
            promise = workshop.promise(layer, make, key, entry.shape, entry.dtype)
            changed[key] = Piece(key, entry.dtype, entry.shape, (promise,))
    for key in tensors.stacked:
        entry = given.checkpoint.entries[key]
        new = {e: workshop.promise(layer, make, key, entry.shape[1:], entry.dtype, e) for e in ids}
        changed[key] = rows(entry, range(layer.num_experts), new)
    return LayerCut(changed=changed)


def rewritten(given: LayerSource, make: Make, kept: Sequence[int]) -> dict[str, Piece]:
    """Promise the tensors of one layer with experts `kept` alone, as the module that `make` gives holds them.

    That module still has all experts; in the checkpoint those that are kept move up.

    Raises:
        UnsupportedModelError: transformers would save the experts under other names than the source has.
    """
    layer, tensors, workshop = given.layer, given.tensors, given.workshop
    own = dict(given.source.model.get_submodule(layer.name)._parameters)
    saved = workshop.outline.saved({f"{layer.name}.{n}": own[n] for n in _with_rows(given.source, layer)})
    if set(saved) != set(tensors.all_experts):
        raise UnsupportedModelError(
            f"{given.checkpoint.folder}: transformers would not save the experts of {layer.name} under the names they "
            "have here; only constant and drop are possible for it"
        )
    changed = {}
    for key in tensors.stacked:
        entry = given.checkpoint.entries[key]
        new = {e: workshop.promise(layer, make, key, entry.shape[1:], entry.dtype, e) for e in kept}
        changed[key] = rows(entry, kept, new)
    for place, expert in enumerate(kept):
        for key in tensors.by_expert.get(expert, ()):
            piece = renamed(given.checkpoint, tensors, key, expert, place)
            promise = workshop.promise(layer, make, key, piece.shape, piece.dtype)
            changed[key] = replace(piece, parts=(promise,))
    return changed


def _with_rows(source: Skeleton, layer: MoELayer) -> list[str]:
    """Names of the parameters of an experts module that have a row for each expert."""
    own = source.model.get_submodule(layer.name)._parameters.items()
    return [name for name, p in own if p is not None and p.dim() and p.shape[0] == layer.num_experts]


def _added(
    source: Skeleton, given: LayerSource, workshop: Workshop, make: Make, vectors: Mapping[int, np.ndarray]
) -> tuple[list[Piece], dict[int, str]]:
    """New tensors of a layer, and the names of its constants by original id."""
    layer, entries = given.layer, given.checkpoint.entries
    experts: Any = workshop.outline.model.get_submodule(layer.name)
    stored = {source.targets[key]: entries[key].dtype for key in given.tensors.all_experts}
    added = []
    usual = expert_dtype(given.checkpoint, given.tensors)
    for place, part in parts_of(experts).items():
        for leaf, parameter in part.named_parameters(recurse=False):
            saved = workshop.outline.saved({f"{layer.name}.{place}.{leaf}": parameter})
            (name,), shape, dtype = saved, tuple(parameter.shape), stored.get(f"{layer.name}.{leaf}", usual)
            added.append(Piece(name, dtype, shape, (workshop.promise(layer, make, name, shape, dtype),)))
    if experts.constants is None:
        return added, {}
    dtype = usual
    names = list(workshop.outline.saved({f"{layer.name}.constants": experts.constants}))
    by_id = dict(zip(experts.replaced, names, strict=True))
    shape = tuple(experts.constants.shape[1:])
    for expert, name in by_id.items():
        if experts.stand_ins[expert].format == CONSTANT and expert in vectors:
            vector = torch.from_numpy(vectors[expert]).to(getattr(torch, DTYPES[dtype][0]))
            added.append(Piece(name, dtype, shape, (tensor_bytes(vector),)))
        else:
            added.append(Piece(name, dtype, shape, (workshop.promise(layer, make, name, shape, dtype),)))
    return added, by_id


def without_rows(checkpoint: Weights, keys: Sequence[str], kept: Sequence[int]) -> dict[str, Piece]:
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


def renamed(checkpoint: Weights, tensors: ExpertTensors, key: str, old: int, new: int) -> Piece:
    """Keep a tensor of expert `old` whole, under the name it has as expert `new`."""
    parts = key.split(".")
    assert parts[tensors.id_position] == str(old)
    parts[tensors.id_position] = str(new)
    return whole(checkpoint.entries[key], ".".join(parts))


def tensor_bytes(value: torch.Tensor) -> bytes:
    """Bytes of a CPU tensor in its own dtype, as safetensors stores them."""
    return value.contiguous().view(torch.uint8).numpy().tobytes()
