"""What is trained: the parameters of a model that get gradients, and low-rank parts that come on top of its experts.

Letters: E experts, K rows of the stacked weights, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.adapters import Adapters
from understudy.errors import UnderstudyError
from understudy.experts import StandInExperts, install, parts_of
from understudy.moe import MoELayer
from understudy.recipe import Recovery
from understudy.unrouted import UnroutedExperts

STAND_INS, WITH_LORA, LORA = "stand-ins", "stand-ins+lora", "lora"
VECTORS, VECTORS_LORA = "vectors", "vectors+lora"
ANSWERS = "answers"
WHAT = (STAND_INS, WITH_LORA, LORA, VECTORS, VECTORS_LORA, "experts", "router", ANSWERS, "all")
ADDING = (WITH_LORA, LORA, VECTORS_LORA)  # those that add low-rank parts
RANK = 16
# What the output of experts is linear in: their last matrices and biases, constants, and B of affine maps.
_ANSWERS = re.compile(r"(^|\.)((down_proj|output_linear|w2)(\.weight|[._]bias)?|constants|thin\.\d+\.b)$")
_UNUSED = ("end_ratio", "gradient_checkpointing", "rank", "save_every")
_BY_STEPS = ("steps", "lr", "lr_schedule", "warmup", "weight_decay", "precision", "train_what", "dtype")


def condensed_blocks(model: nn.Module, layers: Sequence[MoELayer], keys: Collection[str]) -> list[str]:
    """Return the dotted names of the blocks that a condensed layer has in the place of its MoE sublayer.

    `keys` are those of the layers that the plan condensed; folded into dense layers, nothing else tells them.
    """
    native = [n.rpartition(".")[0] for n, module in model.named_modules() if isinstance(module, UnroutedExperts)]
    if not layers:
        return native
    like = layers[0]
    before, after = f"{like.block}.".split(f".{like.index}.", 1)  # experts may lie right in the decoder layer
    named = [f"{before}.{key}.{after}".rstrip(".") for key in keys]
    return sorted({*native, *named})


def usual(model: nn.Module, layers: Sequence[MoELayer], condensed: Sequence[str] = ()) -> str:
    """Return what is trained unless told otherwise.

    Bases and low-rank parts on all experts where experts share bases (LightMoE, METHODS 1.6), else the stand-ins there
    are, and condensed layers (CD-MoE, METHODS 4.6); everything where tokens run fewer experts (Compressed Experts,
    METHODS 2.4); in a model without any of these, low-rank parts.
    """
    modules: list[Any] = [model.get_submodule(layer.name) for layer in layers]
    found = [experts for experts in modules if isinstance(experts, StandInExperts)]
    if any(experts.bases is not None for experts in found):
        return WITH_LORA
    if any(experts.modulation is not None for experts in found):
        return "all"
    return STAND_INS if found or condensed else LORA


def in_layers(settings: Recovery, usual: str) -> str:
    """Return what is trained where layers are trained one by one, in which no parts are added to kept experts.

    Raises:
        UnderstudyError: the settings ask for something that this way of training does not do.
    """
    repairs = settings.loss == "repair"
    for name in _UNUSED + _BY_STEPS if repairs else _UNUSED:
        if getattr(settings, name) != Recovery.model_fields[name].default:
            flag = f"--{name.replace('_', '-')}"
            raise UnderstudyError(f"{flag} has no effect with --loss {settings.loss}; leave it out")
    if repairs:
        return ANSWERS
    if settings.train_what is None and usual == WITH_LORA:
        return STAND_INS
    found = settings.train_what or usual
    if found in ADDING:
        others = ", ".join(what for what in WHAT if what not in ADDING)
        raise UnderstudyError(f"--loss layers trains what is there, not parts that are added; use one of {others}")
    return found


def usual_rank(model: nn.Module, layers: Sequence[MoELayer]) -> int:
    """Return the rank of low-rank parts unless told otherwise: that of the stand-ins."""
    for layer in layers:
        bases = getattr(model.get_submodule(layer.name), "bases", None)
        if bases is not None:
            return int(bases.adapters.rank)
    return RANK


def prepare(
    model: nn.Module, layers: Sequence[MoELayer], what: str, rank: int, seed: int, condensed: Sequence[str] = ()
) -> None:
    """Let exactly the parameters get gradients that are to be trained, adding low-rank parts where these are asked for.

    Args:
        model: whole, in memory or on the meta device; changed in place.
        layers: its MoE layers.
        what: one of `WHAT`. `stand-ins` are constants, experts of fewer neurons, merged experts, bases, low-rank
            parts and vectors, and in condensed layers all experts, the shared ones among them; `vectors` are those of
            experts that do not run alone; `lora` adds B A to each expert that has weights of its own, `experts` are all
            of these and the stand-ins, `router` the routers alone; `answers` is all that a layer's output is linear
            in: constants, and the last matrices of experts, kept, changed or shared.
        rank: of the parts that are added.
        seed: of their A.
        condensed: names of condensed blocks.

    Raises:
        UnderstudyError: not one of `WHAT`, or nothing to train; or a rank above the width of the experts.
    """
    if what not in WHAT:
        raise UnderstudyError(f"--train-what {what}: there is no such choice; use one of {', '.join(WHAT)}")
    model.requires_grad_(what == "all")
    for number, layer in enumerate(layers):
        experts: Any = model.get_submodule(layer.name)
        if what == "experts":
            experts.requires_grad_(True)
        if what == ANSWERS:
            for module in (experts, *map(model.get_submodule, layer.shared)):
                _train_answers(module)
        if what == "router":
            for name in layer.router:
                _get(model, name).requires_grad_(_get(model, name).is_floating_point())
        if what in (STAND_INS, WITH_LORA) and isinstance(experts, StandInExperts):
            _train_stand_ins(experts)
        vectors = getattr(experts, "modulation", None)
        if what in (VECTORS, VECTORS_LORA, STAND_INS, WITH_LORA) and vectors is not None:
            vectors.requires_grad_(True)
        if what in ADDING:
            _add_adapters(model, layer, rank, seed + number)
    for parameter in model.parameters():
        if not parameter.numel():  # of bases where there are none: processes would wait for gradients that never come
            parameter.requires_grad_(False)
    for block in condensed if what == ANSWERS else ():
        _train_answers(model.get_submodule(block))
    for block in condensed if what in (STAND_INS, WITH_LORA) else ():
        for parameter in model.get_submodule(block).parameters():
            # not what is left of the router, nor a gate on shared experts
            parameter.requires_grad_(parameter.dim() > 1 and parameter.shape[0] > 1)
    if not any(p.requires_grad for p in model.parameters()):
        raise UnderstudyError(
            f"--train-what {what}: there is nothing of that kind in this model; use another of {', '.join(WHAT)}"
        )


def _train_stand_ins(experts: Any) -> None:
    for part in parts_of(experts).values():
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(True)
    if experts.constants is not None:
        experts.constants.requires_grad_(True)
    mine = [row for row, expert in enumerate(experts.kept) if expert in experts.stand_ins]
    if mine:  # merged experts, or the widest of those with fewer neurons, lie among the kept ones
        for parameter in _stacked(experts):
            parameter.requires_grad_(True)
            if len(mine) < len(experts.kept):
                parameter.register_hook(_only(mine, len(experts.kept)))


def _train_answers(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if _ANSWERS.search(name):
            parameter.requires_grad_(True)


def _only(rows: Sequence[int], count: int) -> Any:
    """Return a hook that leaves the gradients of some rows and zeroes the others."""

    def hook(gradient: Tensor) -> Tensor:
        keep = gradient.new_zeros(count)
        keep[list(rows)] = 1
        return gradient * keep.view(-1, *[1] * (gradient.dim() - 1))

    return hook


def masked_rows(model: nn.Module) -> bool:
    """Whether some parameter gets gradients in some of its rows only."""
    return any(p._backward_hooks for p in model.parameters())


def _add_adapters(model: nn.Module, layer: MoELayer, rank: int, seed: int) -> None:
    experts: Any = model.get_submodule(layer.name)
    if not isinstance(experts, StandInExperts):
        install(experts, {}, layer.num_experts)
    adapters = Adapters(experts, len(experts.kept), rank)
    a, b = adapters.of("down")
    smaller = min(a.shape[2], b.shape[1])
    if rank > smaller:
        raise UnderstudyError(f"--rank {rank} is more than the {smaller} that the matrices of layer {layer.key} have")
    if not a.is_meta:
        adapters.reset(torch.Generator().manual_seed(seed))
    experts.adapters = adapters.requires_grad_(True)


def _stacked(experts: Any) -> list[nn.Parameter]:
    rows = len(experts.kept)
    named = experts._parameters.items()
    return [p for name, p in named if p is not None and name != "constants" and p.dim() and p.shape[0] == rows]


def _get(model: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def trained(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
