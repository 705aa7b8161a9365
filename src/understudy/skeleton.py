"""A model without weights, and the loading of any part of it: what streaming stands on.

The skeleton lives on torch's meta device. Which checkpoint tensors make up which part is asked of transformers' own
renaming rules, and loading a part goes through its own converters, so a streamed layer is what `from_pretrained` gives.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from understudy.checkpoint import Checkpoint, Weights
from understudy.errors import CheckpointError, NumericError, UnderstudyError, UnsupportedModelError
from understudy.loading import adapt_conversions, install_declared
from understudy.moe import MoELayer, find_moe_layers
from understudy.runtime import all_finite, pick_device, pick_dtype, quiet_transformers, refuse_quantised
from understudy.stacking import find_stacks
from understudy.standins import ARCHITECTURE_PREFIX

ROOT = -1  # the part of a model that is outside its decoder layers


class Skeleton:
    """A checkpoint and its model on the meta device, with stand-ins installed where the folder declares them.

    `folder` is a model folder, or weights from elsewhere with the class of their config.

    Raises:
        CheckpointError: the folder is damaged or is quantised.
        UnsupportedModelError: transformers has no model class for it.
    """

    def __init__(
        self,
        folder: str | Path | Weights,
        *,
        dtype: str = "auto",
        device: str = "auto",
        experts: str = "auto",
        trust_remote_code: bool = False,
        config_class: type[PreTrainedConfig] | None = None,
    ) -> None:
        self.checkpoint = folder if isinstance(folder, Weights) else Checkpoint(folder)
        refuse_quantised(self.checkpoint)
        self.device = pick_device(device)
        folder = self.checkpoint.folder
        self._options: dict[str, Any] = {"device": device, "experts": experts, "trust_remote_code": trust_remote_code}
        try:
            if config_class is not None:
                self.config = read_config(config_class, self.checkpoint.config)
            else:
                self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # configs check themselves with errors of many packages
            why = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"{folder}: transformers cannot read its config ({why})") from None
        self.dtype = pick_dtype(dtype, self.config)
        if experts not in ("auto", "eager", *ALL_EXPERTS_FUNCTIONS.keys()):
            names = ", ".join(["auto", "eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())])
            raise UnderstudyError(f"--experts {experts}: transformers has no such implementation; there is {names}")
        if experts != "auto":
            self.config._experts_implementation = experts
        self.model = self.build()
        self.has_stand_ins = install_declared(self.model)
        self.model.eval().requires_grad_(False)
        self._dtype_plan = self.model._get_dtype_plan(self.dtype)
        self._materialise_buffers()
        self.layers: list[MoELayer] = find_moe_layers(self.model)
        self.stack = self.layers[0].stack
        if len({layer.stack for layer in self.layers}) > 1:
            raise UnsupportedModelError(f"{folder}: has MoE layers in several stacks of layers, which is not supported")
        self.decoder_layers = list(self.model.get_submodule(self.stack).children())
        self.targets = self._route_keys()
        self.keys, self.names = self._split_parts()

    def like(self, weights: str | Path | Weights, dtype: str = "auto") -> Skeleton:
        """Open other weights of the same class of config, on the same device and with the same experts' code."""
        return Skeleton(weights, dtype=dtype, config_class=type(self.config), **self._options)

    @cached_property
    def as_stored(self) -> Skeleton:
        """The same checkpoint in the dtype that its config names, which is what new weights are computed in."""
        if self.dtype == pick_dtype("auto", self.config):
            return self
        return self.like(self.checkpoint)

    # ---- building ---------------------------------------------------------------------------------------------

    def build(self, config: Any = None) -> PreTrainedModel:
        """Make the model on the meta device, as its config (or another) describes it before any stand-in is installed.

        Raises:
            UnsupportedModelError: transformers has no class for it.
        """
        config, why = self.config if config is None else config, ""
        with quiet_transformers(), torch.device("meta"):
            for cls in self._classes():
                try:
                    if hasattr(cls, "_from_config"):
                        return cls._from_config(config, dtype=self.dtype)
                    return cls.from_config(
                        config, dtype=self.dtype, trust_remote_code=self._options["trust_remote_code"]
                    )
                except (ValueError, KeyError) as error:
                    text = " ".join(str(error).split())[:200]
                    why = why or ("" if text.startswith("Unrecognized configuration") else f" ({text})")
        raise UnsupportedModelError(
            f"{self.checkpoint.folder}: transformers {transformers.__version__} has no language model class for "
            f"model type {self.config.model_type!r} with this config{why}"
        )

    def _classes(self) -> Iterator[Any]:
        for name in getattr(self.config, "architectures", None) or []:
            name = name.removeprefix(ARCHITECTURE_PREFIX)
            if isinstance(cls := getattr(transformers, name, None), type) and issubclass(cls, PreTrainedModel):
                yield cls
        yield transformers.AutoModelForCausalLM
        yield transformers.AutoModelForImageTextToText

    def _materialise_buffers(self) -> None:
        """Compute what no checkpoint holds (rotary frequencies, ...) the way `from_pretrained` does.

        Weights are marked as initialised beforehand, so the model's own initialisation touches nothing else.
        """
        for module in self.model.modules():
            module.__dict__.pop("_is_hf_initialized", None)
        for tensor in self.model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device=self.device)
        self.model.initialize_weights()

    # ---- which tensors belong where ---------------------------------------------------------------------------

    def conversions(self) -> list[Any]:
        """Weight conversions of the model; fresh at every call, because transformers keeps state in them."""
        found = get_model_conversion_mapping(self.model)
        return adapt_conversions(found, self.model) if self.has_stand_ins else found

    def _route_keys(self) -> dict[str, str]:
        """Map every checkpoint tensor to the name of the model tensor that it becomes (the first, if several)."""
        conversions = self.conversions()
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        routed: dict[str, str] = {}
        patterns: dict[str, str] = {}
        for key in self.checkpoint.entries:
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, pattern = rename_source_key(key, [], [], prefix, state)
            routed[key] = target
            if pattern is not None:
                patterns[key] = pattern
        self.used_conversions = [c for c in conversions if c.was_used()]
        planned = [name.strip(".*^$") for name in self._dtype_plan]
        stacks = find_stacks(routed, patterns, conversions).values()
        self._stacks = {
            stack.target: stack
            for stack in stacks
            if stack.target in state
            and stack.fits(self.checkpoint, state[stack.target].shape)
            and not any(name in stack.target for name in planned)
        }
        return routed

    def _split_parts(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """Checkpoint tensors and model tensors by decoder layer, and those outside the layers under `ROOT`."""
        state = self.model.state_dict()

        def part_of(name: str) -> int:
            inside = name.startswith(self.stack + ".")
            return int(name[len(self.stack) + 1 :].partition(".")[0]) if inside else ROOT

        keys: dict[int, list[str]] = defaultdict(list)
        names: dict[int, list[str]] = defaultdict(list)
        for key, target in self.targets.items():
            if (
                target in state
            ):  # others (multi-token-prediction heads, ...) have no place in the model; they are copied
                keys[part_of(target)].append(key)
        for name in state:
            names[part_of(name)].append(name)
        return keys, names

    @property
    def unloaded_bytes(self) -> int:
        """Bytes of tensors that the model has no place for; they are on disk, and nobody loads them."""
        state = self.model.state_dict()
        return sum(self.checkpoint.entries[key].nbytes for key, target in self.targets.items() if target not in state)

    # ---- loading ----------------------------------------------------------------------------------------------

    def load(self, part: int) -> None:
        """Load one decoder layer by its index, or what is outside the layers (`ROOT`).

        Raises:
            CheckpointError: a tensor is missing or of the wrong shape.
            NumericError: a weight is NaN or infinite.
        """
        where = "the part outside the decoder layers" if part == ROOT else f"decoder layer {part}"
        load_config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self._dtype_plan,
            weight_mapping=self.conversions(),
        )
        stacks = [self._stacks[name] for name in self.names[part] if name in self._stacks]
        stacked = {key for stack in stacks for key in stack.keys}
        for stack in stacks:
            meta = self.get(stack.target)
            self._set(stack.target, stack.read(self.checkpoint, meta.shape, meta.dtype).to(self.device))
        tensors = {key: self.checkpoint.lazy(key) for key in self.keys[part] if key not in stacked}
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(
                model=self.model, state_dict=tensors, load_config=load_config
            )
        self.checkpoint.release()
        folder = self.checkpoint.folder
        if info.conversion_errors:
            name, trace = next(iter(info.conversion_errors.items()))
            why = [*str(trace).strip().splitlines()][-2:][0][:200]  # the line before transformers' own last one
            raise CheckpointError(f"{folder}: the tensors of {name} are incomplete or do not fit each other ({why})")
        if info.mismatched_keys:
            name, got, expected = sorted(info.mismatched_keys, key=str)[0]
            raise CheckpointError(f"{folder}: {name} has shape {tuple(got)}, the model expects {tuple(expected)}")
        if part == ROOT:
            self.model.tie_weights()
        for name in self.names[part]:
            tensor = self.get(name)
            if tensor.is_meta:
                raise CheckpointError(f"{folder}: {where} is incomplete, the weights of {name} are missing")
            if tensor.is_floating_point() and not all_finite(tensor):
                raise NumericError(self._why_not_finite(name))

    def _why_not_finite(self, name: str) -> str:
        """Say which tensor of the checkpoint a weight got its NaN or infinity from."""
        folder = self.checkpoint.folder
        for key, target in self.targets.items():
            if target == name and not all_finite(self.checkpoint.read(key)):
                return f"{folder}: tensor {key} holds NaN or infinity; the checkpoint is broken, fetch it again"
        return f"{folder}: {name} overflows in {self.dtype}; use another --dtype (float32, bfloat16)"

    def free(self, part: int) -> None:
        """Send a loaded part back to the meta device."""
        for name in self.names[part]:
            self._set(name, torch.empty_like(self.get(name), device="meta"))

    @contextmanager
    def resident(self, part: int) -> Iterator[nn.Module]:
        """Hold one part in memory for a while."""
        try:
            self.load(part)
            yield self.model if part == ROOT else self.decoder_layers[part]
        finally:
            self.free(part)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor

    def get(self, name: str) -> torch.Tensor:
        """A tensor of the model by its dotted name."""
        parent, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(parent), leaf)


def read_config(config_class: type[PreTrainedConfig], config: dict[str, Any]) -> PreTrainedConfig:
    """Read a config as transformers reads a file: it understands more there than in a dictionary."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return config_class.from_pretrained(folder)
