"""Models that FSDP2 has spread over processes: what each holds, and what all hold together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # what checkpointing and compilation put into names


def full(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on the CPU; where it is spread over processes, all of them are to call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """Return the name that a parameter had before the model was wrapped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that train in full, by name, on the CPU; all processes are to call this."""
    return {plain_name(name): full(p) for name, p in model.named_parameters() if p.requires_grad}


def forget_dropped(model: nn.Module) -> None:
    """Let FSDP2 forget the parameters of modules that have left the model; else it would gather them forever."""
    present = set(map(id, model.modules()))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                group.fsdp_params = [p for p in group.fsdp_params if id(p._module_info.module) in present]


@torch.no_grad()
def send_from_first(model: nn.Module, plugin: Any, group: Any) -> None:
    """Give all processes the weights of the first, where only that one has read them and accelerate cannot send them.

    accelerate (1.15) spreads the first process's weights over all, but stumbles over buffers among them, such as the
    biases of some routers.
    """
    saved = model.state_dict(keep_vars=True)
    if not plugin.cpu_ram_efficient_loading or all(isinstance(tensor, nn.Parameter) for tensor in saved.values()):
        return
    for tensor in {id(tensor): tensor for tensor in saved.values()}.values():
        whole = tensor.detach().contiguous()
        torch.distributed.broadcast(whole, 0, group=group)
        tensor.detach().copy_(whole)
    plugin.cpu_ram_efficient_loading = False


@torch.no_grad()
def keep_trained(model: nn.Module) -> None:
    """Leave of a model that is spread over processes only what trains, in full and on the CPU of each; the rest has no
    values any more. All processes are to call this."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                kept = full(parameter) if parameter.requires_grad else torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
