"""Dense layers of a family: how its config says which they are, and which condensed layers can be one of them.

Which entries of a config say so is found by changing them and looking at the model that is built then; what a module
does is found by running it with stand-ins for its children that say what they were asked. No weight is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from understudy.channels import channel_views, projections
from understudy.errors import PlanError, UnsupportedModelError
from understudy.facts import DenseLayers
from understudy.layout import guard_of
from understudy.moe import MoELayer, text_config
from understudy.skeleton import Skeleton, read_config
from understudy.unrouted import SilentRouter

_WORD, _LISTS, _NUMBERS = (
    ("mlp_layer_types",),
    ("mlp_only_layers",),
    (
        "first_k_dense_replace",
        "num_dense_layers",
        "moe_layer_start_index",
    ),
)
_DENSE = "dense"
_WIDTH = re.compile(r"(?!.*(moe|expert|shared|vision|audio))(.*_)?(intermediate_size|ffn_hidden_size|ffn_dim)")
_ROLES = {"gate": r"gate_proj|w1", "up": r"up_proj|w3", "down": r"down_proj|w2"}
_STEP = 8  # neurons, to see what a width is the width of
_FOUND: WeakKeyDictionary[Skeleton, DenseLayers | str] = WeakKeyDictionary()


# ---- what a config can say ---------------------------------------------------------------------------------------


def dense_layers(source: Skeleton) -> DenseLayers | str:
    """Find how the config says which layers are dense, or why it cannot say that condensed ones are."""
    if source not in _FOUND:
        _FOUND[source] = _find(source)
    return _FOUND[source]


def _find(source: Skeleton) -> DenseLayers | str:
    why = f"the config of {source.config.model_type} cannot say that a layer is dense"
    inner, index = text_config(source.config), source.layers[0].index
    widths = [n for n, v in vars(inner).items() if type(v) is int and v > 0 and _WIDTH.fullmatch(n)]
    for setting in (*_WORD, *_LISTS, *_NUMBERS):
        if _value(inner, setting) is None:
            continue
        for width_setting in sorted(widths, key=lambda name: (_DENSE not in name, len(name))):
            wider = int(_value(inner, width_setting)) + _STEP
            found = DenseLayers(
                setting=setting, first=setting in _NUMBERS, width_setting=width_setting, widths={}, neuron_bytes=0
            )
            try:
                layers = _layers_of(source, dense_config(source, found, [index], wider))
                return found.model_copy(update=_widths(source, layers, index, wider))
            except (PlanError, UnsupportedModelError) as error:
                why = str(error)
    return why


def _widths(source: Skeleton, layers: Sequence[nn.Module], index: int, wider: int) -> dict[str, Any]:
    """Return which layers are dense already, with their widths, once one more has become so and all are wider."""
    place, sparse = place_of(source.layers[0]), {layer.index for layer in source.layers}
    widths, element = {}, 0
    for i, (old, new) in enumerate(zip(source.decoder_layers, layers, strict=True)):
        if i in sparse - {index} and form_of(old) != form_of(new):
            raise cannot(f"layer {i} would change with it")
        if i == index and (width_of(new, place) != wider or not _acts_alike(source, source.layers[0], new, place)):
            raise cannot("it would not become a dense MLP of that width that does what an expert does")
        if i == index and form_of(old, place) != form_of(new, place):
            raise cannot("more than its experts would change")
        if i not in sparse and form_of(old) != form_of(new):
            width = width_of(old, place)
            if width is None or width_of(new, place) != wider or form_of(old, place) != form_of(new, place):
                raise cannot(f"layer {i} would change with it")
            widths[i] = width
            entries = source.checkpoint.entries
            mine = [entries[k] for k, t in source.targets.items() if t.startswith(f"{source.stack}.{i}.{place}.")]
            element = sum(e.nbytes for e in mine) // width
    return {"widths": widths, "neuron_bytes": element}


def dense_config(
    source: Skeleton, dense: DenseLayers, indices: Collection[int], width: int, config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the config.json of the model in which layers `indices` are dense, too, and all of them `width` wide."""
    config = copy.deepcopy(source.checkpoint.config if config is None else config)
    inner = text_config(source.config)
    nested = [n for n in source.config.sub_configs if getattr(source.config, n, None) is inner and n in config]
    raw = config[nested[0]] if nested else config
    value, many = _value(inner, dense.setting), set(indices) | set(dense.widths)
    if dense.setting in _WORD:
        value = [_DENSE if i in set(indices) else word for i, word in enumerate(value)]
    else:
        value = max(indices) + 1 if dense.first else sorted({*value, *indices})
    if many == set(range(len(many))):  # other readers may go by how many of the first are dense
        raw.update({name: len(many) for name in _NUMBERS if name in raw})
    names = getattr(inner, "attribute_map", {})
    raw[names.get(dense.setting, dense.setting)] = value
    raw[names.get(dense.width_setting, dense.width_setting)] = width
    return config


def _layers_of(source: Skeleton, config: dict[str, Any]) -> list[nn.Module]:
    try:
        model = source.build(read_config(type(source.config), config))
        layers = list(model.get_submodule(source.stack).children())
    except Exception as error:  # configs check themselves with errors of many packages
        raise cannot(" ".join(str(error).split())[:200]) from None
    if len(layers) != len(source.decoder_layers):
        raise cannot("it would have another number of layers")
    return layers


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to read from the whole config what varies by layer
        return None


def form_of(layer: nn.Module, but: str | None = None) -> dict[str, Any]:
    """Modules of a layer by class, and shapes of its weights; without those at a place in it."""
    form: dict[str, Any] = {name: type(module).__name__ for name, module in layer.named_modules()}
    form |= {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    return {n: x for n, x in form.items() if but is None or not f"{n}.".startswith(f"{but}.")}


# ---- whether a layer is a dense MLP when it is condensed ----------------------------------------------------------


def why_not_folded(source: Skeleton, layer: MoELayer) -> str | None:
    """Say why a few experts of a layer, with its shared ones, are no dense MLP; None where they are."""
    block, experts = source.model.get_submodule(layer.block), source.model.get_submodule(layer.name)
    if not place_of(layer) or "." in layer.name[len(layer.block) + 1 :]:
        return "its experts lie directly in the decoder layer"
    try:
        roles = list(channel_views(experts))
    except UnsupportedModelError as error:
        return str(error)
    if roles != ["gate", "up", "down"] or "down_proj_bias" in experts._parameters:
        return "its experts have biases, or no gate projection"
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm follows each of its experts"
    if any(re.search(r"shared?_.*gate", name) for name, _ in block.named_children()):
        return "a gate stands before its shared expert"
    for name in shared_in(layer):
        if "." in name or not _acts_alike(source, layer, block, name):
            return "its shared experts are no MLP like its experts"
    if not _adds_up(source, layer):
        return f"{type(block).__name__} does more than add up what experts and shared experts answer"
    return None


def shared_width(source: Skeleton, layer: MoELayer) -> int:
    """Return how many neurons the shared experts inside of a MoE block have together."""
    block = source.model.get_submodule(layer.block)
    return sum(width_of(block, name) or 0 for name in shared_in(layer))


def place_of(layer: MoELayer) -> str:
    """Name of the block in its decoder layer."""
    return layer.block[len(f"{layer.stack}.{layer.index}") + 1 :]


def shared_in(layer: MoELayer) -> list[str]:
    """Names of the shared experts in the block."""
    return [n[len(layer.block) + 1 :] for n in layer.shared if n.startswith(f"{layer.block}.")]


def projections_of(mlp: nn.Module) -> dict[str, str] | None:
    """Names of the gate, up and down projections of a dense MLP; None where it has other parts."""
    found = {}
    for name, parameter in mlp.named_parameters():
        role = next((r for r, pattern in _ROLES.items() if re.fullmatch(rf"({pattern})\.weight", name)), None)
        if role is None or parameter.dim() != 2:
            return None
        found[role] = name.removesuffix(".weight")
    return {role: found[role] for role in _ROLES} if len(found) == len(_ROLES) else None


def width_of(owner: nn.Module, place: str) -> int | None:
    """Neurons of the dense MLP at a place in a module; None where there is another thing."""
    mlp = owner.get_submodule(place)
    parts = projections_of(mlp)
    return None if parts is None else len(mlp.get_parameter(f"{parts['gate']}.weight"))


class _Answer(nn.Module):
    """Answers what it is told to, and remembers what it was asked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value, self.asked = value, value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the value, in the shape of the input where they are equally large."""
        self.asked = x
        return self.value.view_as(x) if self.value.numel() == x.numel() else self.value


def _with(module: nn.Module, children: Mapping[str, nn.Module]) -> Any:
    made = copy.copy(module)
    made.__dict__["_modules"] = {**module._modules, **children}
    return made


def _acts_alike(source: Skeleton, layer: MoELayer, owner: nn.Module, place: str) -> bool:
    """Whether a dense MLP does between its projections what an expert does between its own, and nothing else."""
    mlp, experts = owner.get_submodule(place), source.model.get_submodule(layer.name)
    parts = projections_of(mlp)
    if parts is None:
        return False
    gate, up = torch.linspace(-9, 9, 64).repeat(2, 1), torch.linspace(-9, 9, 2)[:, None].expand(2, 64)
    gate, up = torch.stack((gate, gate.flip(1))).flatten(0, 1), torch.cat((up, up))
    last = _Answer(torch.ones(4, layer.hidden_size))
    try:
        answers = {"gate": _Answer(gate), "up": _Answer(up), "down": last}
        out = _with(mlp, {parts[role]: answer for role, answer in answers.items()})(torch.zeros(4, layer.hidden_size))
        projected = torch.zeros(4, 128)
        views = projections(experts, projected)
        views["gate"].copy_(gate)
        views["up"].copy_(up)
        expected = experts._apply_gate(projected)
    except Exception:  # anything that a module might do with what it does not expect
        return False
    return torch.equal(out, last.value) and last.asked.shape == expected.shape and torch.equal(last.asked, expected)


def _adds_up(source: Skeleton, layer: MoELayer) -> bool:
    """Whether a block puts out what its experts and shared experts answer, added up, and nothing else."""
    block, guard = source.model.get_submodule(layer.block), guard_of(source, layer)
    if guard is None:
        return False
    values = torch.arange(6.0).view(3, 2) + 1
    routed, shared = (torch.zeros(3, layer.hidden_size) + values[:, i, None] for i in (0, 1))
    router = guard[len(layer.block) + 1 :].split(".")[0]
    children: dict[str, nn.Module] = {layer.name[len(layer.block) + 1 :]: _Answer(routed)}
    children |= {name: _Answer(shared) for name in shared_in(layer)}
    for parts in (3, 2, 4):
        try:
            out = _with(block, {**children, router: SilentRouter(parts)})(torch.zeros(1, 3, layer.hidden_size))
        except Exception:  # anything that a module might do with what it does not expect
            continue
        out = out[0] if isinstance(out, tuple) else out
        return torch.equal(out.view(3, -1), routed + shared * len(shared_in(layer)))
    return False


def cannot(why: str) -> PlanError:
    """Return the error that says why layers do not turn dense."""
    return PlanError(f"a layer cannot be turned into a dense one in the config: {why}")
