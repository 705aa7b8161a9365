"""Find the Mixture-of-Experts layers of a model by what their modules look like, never by the type of the model.

The seam is the experts module: one module that holds every expert of a layer stacked along dimension 0, called as
`experts(hidden_states_TH, top_k_index_TK, top_k_weights_TK) -> TH` after the router has done all of its own arithmetic.
Around the seam stand the router, shared experts and the decoder layer; they are recognised by a few names, kept in the
tables below, and a router that is not recognised costs no more than the right to remove its rows.

Nothing here reads a weight, so models on the meta device will do.

T tokens, H width of what enters the experts, K experts picked for a token, E experts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from understudy.errors import UnsupportedModelError

_UP = ("gate_up_proj", "up_proj")
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
_GROUPS = ("num_group", "n_group", "num_expert_group")
_TOP_GROUPS = ("topk_group", "topk_groups", "num_limited_groups")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
_ROUTER = re.compile(r"(.*_)?(router|gating)|gate|moe_gate|router_gate", re.IGNORECASE)
_SHARED = re.compile(r"shared?_(expert|mlp)", re.IGNORECASE)
_ROUTING_TENSOR = re.compile(r"bias|expert|router", re.IGNORECASE)
# Towers and experts that text never passes through: what they hold must be left alone, for text says nothing about it.
_NOT_TEXT = re.compile(r"vision(?!_?lang)|visual|image|video|audio|speech|talker", re.IGNORECASE)


@dataclass(frozen=True)
class MoELayer:
    """A handle on one MoE layer of a model: where its parts are and how large they are.

    Attributes:
        key: the decoder layer index as text; a further experts module of that layer adds the name that tells it apart.
        index: decoder layer index inside its stack.
        name: dotted name of the experts module.
        block: dotted name of its parent.
        stack: dotted name of the ModuleList that holds the decoder layers.
        num_experts: E, routed experts.
        top_k: K, experts picked for a token.
        hidden_size: H, width of what enters and leaves the experts; a latent MoE has it narrower than the model.
        width: I, inner width of an expert, or None where the weights do not tell.
        expert_params: parameters of one expert, biases included.
        router: state-dict names of the tensors that hold one entry per expert along `expert_dim`, outside the experts.
        groups: number of expert groups of a group-limited router, else 1.
        top_groups: groups that a token may pick from, None where the router is not group-limited.
        shared: dotted names of the shared-expert modules beside the experts.
        removable: None when router rows can be removed, else why not, in words.
    """

    key: str
    index: int
    name: str
    block: str
    stack: str
    num_experts: int
    top_k: int
    hidden_size: int
    width: int | None
    expert_params: int
    router: tuple[str, ...]
    groups: int
    top_groups: int | None
    shared: tuple[str, ...]
    removable: str | None


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is a seam: stacked expert weights, called with hidden states, expert ids and weights."""
    return _why_not(module) is None


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers of a model's text decoder, in order of depth.

    Raises:
        UnsupportedModelError: the model has no experts, none that can be reached, or more than one stack of them.
    """
    found = [name for name, module in model.named_modules() if is_experts(module) and not _NOT_TEXT.search(name)]
    # Experts inside experts are parts of a layer with stand-ins.
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if not found:
        raise UnsupportedModelError(_nothing_found(model))
    stacks = {_stack_of(model, name) for name in found}
    if len(stacks) > 1:
        names = " and ".join(sorted(stack or "no layer list" for stack in stacks))
        raise UnsupportedModelError(f"{type(model).__name__} has experts in {names}; one decoder stack is supported")
    stack = stacks.pop()
    if stack is None:
        raise UnsupportedModelError(f"{type(model).__name__}: {found[0]} is not inside a list of decoder layers")
    layers: list[MoELayer] = []
    for name in found:
        first = next((layer for layer in layers if layer.index == _index_in(stack, name)), None)
        layers.append(_describe(model, name, stack, first))
    return sorted(layers, key=lambda layer: layer.index)


def expert_dim(shape: tuple[int, ...], num_experts: int) -> int:
    """Return which dimension of a router tensor runs over the experts: the first, or the second of a `[1, E]` row."""
    return 1 if len(shape) == 2 and shape[0] == 1 and shape[1] == num_experts else 0


def text_config(config: Any) -> Any:
    """Return the part of a model's config that describes its text decoder: the config itself for a plain text model."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def expert_count_keys(config: Any, num_experts: int) -> list[str]:
    """Return the attributes of a text config that hold the number of routed experts, aliases included."""
    return [name for name in _COUNTS if _read(config, name) == num_experts]


def top_k_keys(config: Mapping[str, Any], top_k: int) -> list[str]:
    """Return the entries of a config.json, or of a part of it, that hold the number of experts picked for a token."""
    return [name for name in (*_TOP_K, "experts_per_token") if config.get(name) == top_k]


def _why_not(module: nn.Module) -> str | None:
    """Return None for a seam, else what keeps the module from being one."""
    if hasattr(module, "unrouted"):
        return "it has no router any more"
    down = _weight(module, "down_proj")
    up = next((weight for name in _UP if (weight := _weight(module, name)) is not None), None)
    if down is None or up is None:
        return "it does not hold the experts as stacked gate_up_proj (or up_proj) and down_proj"
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(parameters) < 3 or not re.search(r"ind|ids", parameters[1]) or "weight" not in parameters[2]:
        return f"it is called with ({', '.join(parameters)}), not with hidden states, expert ids and routing weights"
    if up.shape[0] != down.shape[0]:
        return f"its router also picks {up.shape[0] - down.shape[0]} experts that have no weights"
    return None


def _weight(module: nn.Module, name: str) -> Tensor | None:
    weight = module._parameters.get(name, module._buffers.get(name))
    return weight if weight is not None and weight.ndim == 3 else None


def _nothing_found(model: nn.Module) -> str:
    kind = type(model).__name__
    modules = [(name, module) for name, module in model.named_modules() if not _NOT_TEXT.search(name)]
    named = [(name, module) for name, module in modules if "Expert" in type(module).__name__]
    counting = [(name, module) for name, module in modules if name and _first([module], _COUNTS)]
    if not named and not counting:
        return f"{kind} is not a Mixture-of-Experts model: it has no module that holds experts"
    name, module = (named or counting)[0]
    return f"{kind} is not supported: {name} ({type(module).__name__}) is no seam: {_why_not(module)}"


def _stack_of(model: nn.Module, name: str) -> str | None:
    """Return the outermost ModuleList on the way to a module."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        stack = ".".join(parts[:depth])
        if isinstance(model.get_submodule(stack), nn.ModuleList):
            return stack
    return None


def _index_in(stack: str, name: str) -> int:
    return int(name[len(stack) + 1 :].split(".", 1)[0])


def _describe(model: nn.Module, name: str, stack: str, first: MoELayer | None) -> MoELayer:
    experts = model.get_submodule(name)
    index = _index_in(stack, name)
    block_name = name.rpartition(".")[0]
    layer_name = f"{stack}.{index}"
    down = _weight(experts, "down_proj")
    assert down is not None
    num_experts = getattr(experts, "num_logical_experts", down.shape[0])  # those of the router, stand-ins included
    hidden, width = (down.shape[2], down.shape[1]) if getattr(experts, "is_transposed", False) else down.shape[1:]
    width = getattr(experts, "logical_width", width)  # before experts lost neurons
    routers = _routers(model, block_name)
    config = text_config(getattr(model, "config", None))
    places = [module for _, module in routers] + [experts, model.get_submodule(block_name), config]
    tensors = dict(_router_tensors(model, block_name, routers, num_experts))
    top_k = _first(places, _TOP_K)
    if top_k is None:
        raise UnsupportedModelError(f"{type(model).__name__}: nothing beside {name} tells how many experts it picks")
    key = str(index)
    if first is not None:
        pairs = zip(name.split("."), first.name.split("."))
        key = f"{index}.{next(mine for mine, other in pairs if mine != other)}"
    return MoELayer(
        key=key,
        index=index,
        name=name,
        block=block_name,
        stack=stack,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        width=width,
        expert_params=_expert_params(experts, num_experts),
        router=tuple(tensors),
        groups=_groups(routers),
        top_groups=_first([module for _, module in routers], _TOP_GROUPS) if _groups(routers) > 1 else None,
        shared=_shared(model, block_name, layer_name),
        removable=_why_not_removable(model, block_name, routers, tensors, config, num_experts),
    )


def _expert_params(experts: nn.Module, num_experts: int) -> int:
    own = [tensor for tensor in experts._parameters.values() if tensor is not None and tensor.ndim > 1]
    return sum(tensor[0].numel() for tensor in own if tensor.shape[0] == num_experts)


def _routers(model: nn.Module, block: str) -> list[tuple[str, nn.Module]]:
    """Return the router modules beside an experts module, with their names."""
    return [
        (f"{block}.{child}", module)
        for child, module in model.get_submodule(block).named_children()
        if _ROUTER.fullmatch(child) and not _SHARED.search(child)
    ]


def _router_tensors(
    model: nn.Module, block: str, routers: list[tuple[str, nn.Module]], num_experts: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the saved tensors with an entry per expert: the router's, and what the block itself keeps for it."""
    for name, module in routers:
        for key, tensor in module.state_dict(keep_vars=True).items():
            if _runs_over(tensor, num_experts):
                yield f"{name}.{key}", tensor
    own: dict[str, Tensor] = {}
    model.get_submodule(block)._save_to_state_dict(own, "", keep_vars=True)  # without those of its children
    for key, tensor in own.items():
        if _ROUTING_TENSOR.search(key) and _runs_over(tensor, num_experts):
            yield f"{block}.{key}", tensor


def _runs_over(tensor: Tensor, num_experts: int) -> bool:
    shape = tuple(tensor.shape)
    return bool(shape) and tensor.is_floating_point() and shape[expert_dim(shape, num_experts)] == num_experts


def _why_not_removable(
    model: nn.Module,
    block: str,
    routers: list[tuple[str, nn.Module]],
    tensors: dict[str, Tensor],
    config: Any,
    num_experts: int,
) -> str | None:
    for name, module in routers:
        for key, tensor in module.state_dict(keep_vars=True).items():
            if tensor.ndim > 1 and not tensor.is_floating_point():
                return f"{name}.{key} is a table of expert ids, which removal would have to rewrite"
    if not any(tensor.ndim == 2 and tensor.shape[0] == num_experts for tensor in tensors.values()):
        return f"the router beside {block} has no weight with exactly one row per expert"
    if not expert_count_keys(config, num_experts):
        return f"no entry of the config holds the number of experts, {num_experts}"
    siblings = model.get_submodule(block.rpartition(".")[0]).named_children()
    if any(_NOT_TEXT.search(child) and any(map(is_experts, module.modules())) for child, module in siblings):
        return "experts for other than text share the number of experts in the config"
    return None


def _groups(routers: list[tuple[str, nn.Module]]) -> int:
    modules = [module for _, module in routers]
    if any(getattr(module, "topk_method", None) == "greedy" for module in modules):
        return 1  # the router keeps the number of groups but does not look at it
    return _first(modules, _GROUPS) or 1


def _shared(model: nn.Module, block: str, layer: str) -> tuple[str, ...]:
    """Return the shared experts beside the experts or on the way up to the decoder layer."""
    found: list[str] = []
    place = block
    while place.startswith(layer):
        for child, module in model.get_submodule(place).named_children():
            if _SHARED.search(child) and not child.endswith("gate") and next(module.parameters(), None) is not None:
                found.append(f"{place}.{child}")
        place = place.rpartition(".")[0]
    return tuple(found)


def _first(places: list[Any], names: tuple[str, ...]) -> int | None:
    """Return the first whole number found under any of the names, searching place by place."""
    values = (_read(place, name) for place in places for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _read(place: Any, name: str) -> Any:
    try:
        return getattr(place, name, None)
    except RuntimeError:  # transformers refuses to read from the whole config what varies by layer
        return None
