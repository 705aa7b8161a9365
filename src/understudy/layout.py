"""Which checkpoint tensors hold which expert: told from names and shapes, for per-expert and for stacked layouts."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from dataclasses import dataclass

from understudy.channels import channel_bytes, channel_width
from understudy.checkpoint import DTYPES, Weights
from understudy.errors import UnsupportedModelError
from understudy.facts import DenseLayers, LayerFacts, ModelFacts
from understudy.moe import MoELayer
from understudy.skeleton import Skeleton
from understudy.unrouted import router_tensors, why_router_stays


@dataclass(frozen=True)
class ExpertTensors:
    """Checkpoint tensors of one MoE layer."""

    by_expert: dict[int, list[str]]  # original id to tensors of that expert alone
    stacked: list[str]  # tensors of all experts, one row (dim 0) an expert
    router: list[str]  # tensors outside the experts with one row an expert
    id_position: int = -1  # which dotted part of a per-expert name is the id

    @property
    def all_experts(self) -> list[str]:
        """Every tensor that belongs to the routed experts."""
        return [key for keys in self.by_expert.values() for key in keys] + self.stacked


def expert_tensors(skeleton: Skeleton, layer: MoELayer) -> ExpertTensors:
    """Find the tensors of one MoE layer in the checkpoint.

    Raises:
        UnsupportedModelError: experts are stored in a form that cannot be cut between experts.
    """
    entries = skeleton.checkpoint.entries
    groups: dict[str, list[str]] = defaultdict(list)
    router = []
    for key, target in skeleton.targets.items():
        if target.startswith(layer.name + "."):
            groups[target].append(key)
        elif target in layer.router:
            router.append(key)
    by_expert: dict[int, list[str]] = defaultdict(list)
    stacked: list[str] = []
    id_position = -1
    for target, keys in groups.items():
        weight = skeleton.get(target)
        if weight.dim() == 0 or weight.shape[0] != layer.num_experts:
            continue  # a norm shared by all experts, say: it is not an expert's own
        position = _id_position(keys, layer.num_experts)
        if position is not None:
            id_position = position
            for key in keys:
                by_expert[int(key.split(".")[position])].append(key)
        elif all(entries[key].shape[:1] == (layer.num_experts,) for key in keys):
            stacked.extend(keys)
        else:
            raise UnsupportedModelError(
                f"{skeleton.checkpoint.folder}: {target} is stored in a form that cannot be cut between experts "
                f"({len(keys)} tensors, the first {keys[0]} of shape {entries[keys[0]].shape})"
            )
    return ExpertTensors(dict(sorted(by_expert.items())), sorted(stacked), sorted(router), id_position)


def _id_position(keys: list[str], num_experts: int) -> int | None:
    """Which dotted part of the names is the expert id: the last number that runs over all experts."""
    split = [key.split(".") for key in keys]
    if len({len(parts) for parts in split}) != 1:
        return None
    for position in reversed(range(len(split[0]))):
        column = [parts[position] for parts in split]
        if all(c.isdigit() for c in column) and {int(c) for c in column} == set(range(num_experts)):
            return position
    return None


def model_facts(skeleton: Skeleton, source: str) -> ModelFacts:
    """Measure what planning needs to know; `source` is what people call the model."""
    from understudy.dense import dense_layers, shared_width, why_not_folded  # they ask this module in turn

    entries, dense = skeleton.checkpoint.entries, dense_layers(skeleton)
    layers = {}
    for layer in skeleton.layers:
        found = expert_tensors(skeleton, layer)
        mine = [entries[key] for key in found.all_experts]
        rows = [entries[key] for key in found.router]
        width, of_channel = _channels(skeleton, layer)
        layers[layer.key] = LayerFacts(
            name=layer.name,
            experts=layer.num_experts,
            top_k=layer.top_k,
            hidden=layer.hidden_size,
            groups=layer.groups,
            top_groups=layer.top_groups,
            expert_params=sum(e.numel for e in mine) // layer.num_experts,
            expert_bytes=sum(e.nbytes for e in mine) // layer.num_experts,
            width=width,
            channel_bytes=of_channel,
            block_bytes=sum(entries[key].nbytes for key in block_keys(skeleton, layer)),
            block_stays=why_block_stays(skeleton, layer),
            router_bytes=sum(entries[key].nbytes for key in router_keys(skeleton, layer)),
            router_stays=why_router_stays(skeleton.model, layer, guard_of(skeleton, layer)),
            folds_not=why_not_folded(skeleton, layer),
            shared_width=shared_width(skeleton, layer),
            decoder_bytes=sum(entries[key].nbytes for key in skeleton.keys[layer.index]),
            router_row_bytes=sum(e.nbytes for e in rows) // layer.num_experts,
            removable=layer.removable,
            element_bytes=DTYPES[mine[0].dtype][1],
        )
    return ModelFacts(
        source=source,
        family=str(skeleton.config.model_type),
        fingerprint=skeleton.checkpoint.fingerprint,
        nbytes=skeleton.checkpoint.nbytes,
        params=sum(e.numel for e in entries.values()),
        unloaded_bytes=skeleton.unloaded_bytes,
        dense=dense if isinstance(dense, DenseLayers) else None,
        not_dense=None if isinstance(dense, DenseLayers) else dense,
        layers=layers,
    )


def router_keys(skeleton: Skeleton, layer: MoELayer) -> list[str]:
    """Checkpoint tensors that go with a router, where it can go at all."""
    guard = guard_of(skeleton, layer)
    if guard is None or why_router_stays(skeleton.model, layer, guard):
        return []
    names = set(router_tensors(skeleton.model, layer, guard))
    return [key for key, target in skeleton.targets.items() if target in names]


def block_keys(skeleton: Skeleton, layer: MoELayer) -> list[str]:
    """Checkpoint tensors of a MoE sublayer: experts, router, and shared experts that lie in it."""
    return [key for key, target in skeleton.targets.items() if target.startswith(layer.block + ".")]


def why_block_stays(skeleton: Skeleton, layer: MoELayer) -> str | None:
    """Say why a MoE sublayer cannot be left out, or None where the stream may pass it by."""
    block = skeleton.model.get_submodule(layer.block)
    if layer.block == f"{skeleton.stack}.{layer.index}":
        return "its experts lie directly in the decoder layer, there is no sublayer to leave out"
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(block).forward)))
    if any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(tree)):
        return f"{type(block).__name__} hands on more than its output"
    if guard_of(skeleton, layer) is None:
        return "its router has no matrix of a row for each expert"
    return None


def guard_of(skeleton: Skeleton, layer: MoELayer) -> str | None:
    """The router's matrix, which an absent sublayer leaves behind empty: at its shape, stock loaders stop."""
    return next((name for name in layer.router if skeleton.get(name).dim() == 2), None)


def _channels(skeleton: Skeleton, layer: MoELayer) -> tuple[int | None, int]:
    """Return the neurons of an expert and the bytes of one in the checkpoint; None and 0 where they are not told."""
    experts = skeleton.model.get_submodule(layer.name)
    sizes: dict[str, int] = {}
    for key, target in skeleton.targets.items():
        block, _, name = target.rpartition(".")
        if block == layer.name:
            entry = skeleton.checkpoint.entries[key]
            sizes[name] = entry.nbytes // entry.numel
    try:
        return channel_width(experts), channel_bytes(experts, sizes)
    except UnsupportedModelError:
        return layer.width, 0


def expert_dtype(checkpoint: Weights, tensors: ExpertTensors) -> str:
    """Dtype that a layer's experts are stored in, as safetensors spells it."""
    return checkpoint.entries[tensors.all_experts[0]].dtype


def vllm_refuses(layer: MoELayer, tensors: ExpertTensors) -> str | None:
    """Say why stock vLLM >= 0.33 cannot read constants in a layer's place, or None.

    It also needs a model class of its own for the family, which cannot be told from here.
    """
    if tensors.stacked:
        return f"the experts of {layer.name} are stored stacked, and vLLM reads constants beside single experts only"
    if sum(part.isdigit() for part in layer.name.split(".")) != 1:
        return f"vLLM needs one number, the layer's, in the name of the experts; {layer.name} has another count"
    return None
