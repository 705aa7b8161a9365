"""Teach transformers to load and save folders with stand-ins; runs when both packages are imported.

A folder says what it holds in the words of vLLM >= 0.33 (`compression_config.transform_config.expert_substitution`).
transformers lets a quantizer reshape a model before its weights are loaded and adapt the weight converters, which is
what stand-ins need; the model that comes out is an ordinary one, and no quantizer stays attached to it.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import transformers.modeling_utils as modeling
from transformers.core_model_loading import ConversionOps, MergeModulelist, SplitModulelist, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from understudy.absent import install_absent
from understudy.errors import CheckpointError
from understudy.experts import StandInExperts, install, modulate, parts_of
from understudy.standins import (
    ARCHITECTURE_PREFIX,
    declared,
    declared_absent,
    declared_modulated,
    declared_unrouted,
    impossible,
    known_to_engines,
)
from understudy.unrouted import UnroutedExperts, install_unrouted

NOVICE_PATTERN = "novices.*.approx_value"


class _SplitByOriginalId(SplitModulelist):
    """Undo `_MergeByOriginalId` on saving: rows are named by the ids that the live module kept."""

    def __init__(self, dim: int = 0, constants: bool = False) -> None:
        super().__init__(dim)
        self.constants = constants

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        name = full_layer_name or ""
        module = _stand_in_of(model, name)
        if module is None:
            return super().convert(input_dict, source_patterns, target_patterns)
        ids = module.replaced if self.constants and isinstance(module, StandInExperts) else module.kept
        # The converter completes names only from the name of expert 0, which may be gone: return complete names.
        prefix = name[: name.index(target_patterns[0])]
        named = {}
        for pattern, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            assert tensor.shape[self.dim] == len(ids)
            target = target_patterns[0] if len(input_dict) == 1 else pattern
            for row, expert in enumerate(ids):
                named[prefix + target.replace("*", str(expert))] = tensor.select(self.dim, row)
        return named

    @property
    def reverse_op(self) -> ConversionOps:
        return _MergeByOriginalId(self.dim, self.constants)


class _MergeByOriginalId(MergeModulelist):
    """Stack per-expert tensors; gaps in the ids are harmless, since they arrive in the order of their numbers."""

    def __init__(self, dim: int = 0, constants: bool = False) -> None:
        super().__init__(dim)
        self.constants = constants

    @property
    def reverse_op(self) -> ConversionOps:
        return _SplitByOriginalId(self.dim, self.constants)


class _AsItIs(ConversionOps):
    """Keep a tensor as it is, out of reach of other converters."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (value,) = input_dict.values()
        return {target_patterns[0]: value}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


class _WithoutGuard(_AsItIs):
    """Take away the dimension by which loaders that do not know of stand-ins know that they do not know the model."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (value,) = input_dict.values()
        return {target_patterns[0]: (value[0] if isinstance(value, list) else value)[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        return _WithGuard()


class _WithGuard(_AsItIs):
    """Give it back on saving."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (value,) = input_dict.values()
        return {target_patterns[0]: (value[0] if isinstance(value, list) else value)[None]}

    @property
    def reverse_op(self) -> ConversionOps:
        return _WithoutGuard()


def _stand_in_of(model: Any, tensor_name: str) -> StandInExperts | UnroutedExperts | None:
    """The experts module that we changed in the decoder layer that a tensor name points into, if there is one."""
    best, best_length = None, 0
    for name, module in model.named_modules():
        if isinstance(module, (StandInExperts, UnroutedExperts)):
            layer = re.match(r".*\.\d+\.", name + ".")
            common = _common_parts(name, tensor_name)
            if layer and tensor_name.startswith(layer.group(0)) and common > best_length:
                best, best_length = module, common
    return best


def _common_parts(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


@register_quantization_config("understudy")
class StandInConfig(QuantizationConfigMixin):
    """Names the loader below; never written to a folder."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = "understudy"


@register_quantizer("understudy")
class StandInLoader(HfQuantizer):
    """Shrinks the skeleton to the experts that a folder keeps, and adapts the weight converters to their ids."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        install_declared(model)
        self._model = model  # older versions of transformers do not pass it below
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        return adapt_conversions(weight_conversions, model or self._model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        conversions = getattr(model, "_weight_conversions", None)
        self.remove_quantization_config(model)
        if conversions is not None:  # some versions take them away, too; saving would number the kept experts anew
            model._weight_conversions = conversions
        del self._model
        experts = [m for m in model.modules() if isinstance(m, StandInExperts)]
        whole_layers = (
            declared_absent(model.config) or declared_unrouted(model.config) or declared_modulated(model.config)
        )
        if whole_layers or not all(known_to_engines(m.stand_ins) for m in experts):
            model.__class__ = _renamed(type(model))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def install_declared(model: Any) -> bool:
    """Install the stand-ins that `model.config` declares; say whether there were any.

    Raises:
        CheckpointError: the declaration does not fit the model.
    """
    found = declared(model.config)
    for name, stand_ins in (found or {}).items():
        try:
            experts = model.get_submodule(name)
            total = experts.down_proj.shape[0]
        except AttributeError:
            raise CheckpointError(f"config.json declares stand-ins in {name}, which this model does not have") from None
        if why := impossible(stand_ins, total):
            raise CheckpointError(f"config.json declares stand-ins {list(stand_ins)} in {name}: {why}")
        install(experts, stand_ins, total)
    for block, guard in declared_absent(model.config).items():
        try:
            install_absent(model, block, guard)
        except AttributeError:
            raise CheckpointError(f"config.json declares {block} as removed, which this model does not have") from None
    for name, (guard, weights) in declared_unrouted(model.config).items():
        try:
            install_unrouted(model, name, guard, weights)
        except (AttributeError, ValueError) as error:
            raise CheckpointError(f"config.json declares {name} as condensed, which cannot be: {error}") from None
    modulated = declared_modulated(model.config)
    for name in modulated.layers if modulated is not None else ():
        assert modulated is not None
        try:
            experts = model.get_submodule(name)
            total = getattr(experts, "num_logical_experts", experts.down_proj.shape[0])
        except AttributeError:
            raise CheckpointError(f"config.json declares vectors in {name}, which this model does not have") from None
        modulate(experts, total, modulated.main_k, modulated.vectors, modulated.renormalise)
    return found is not None


def adapt_conversions(conversions: list[Any], model: Any) -> list[Any]:
    """Make a model's weight converters name experts by original id, and read and write constants."""
    adapted = []
    for conversion in conversions:
        if isinstance(conversion, WeightConverter) and any(type(o) is MergeModulelist for o in conversion.operations):
            operations = [_MergeByOriginalId(o.dim) if type(o) is MergeModulelist else o for o in conversion.operations]
            conversion = _with_operations(conversion, operations)
        adapted.append(conversion)
    with_constants = (n for n, m in model.named_modules() if isinstance(m, StandInExperts) and m.constants is not None)
    leaves = {name.rpartition(".")[2] for name in with_constants}
    for leaf in sorted(leaves):
        adapted.append(WeightConverter(NOVICE_PATTERN, f"{leaf}.constants", [_MergeByOriginalId(0, constants=True)]))
    # The first converter that matches wins, the last one on saving; some families' match any name that ends alike.
    as_they_are = [WeightConverter(name, name, [_AsItIs()]) for name in sorted(_names_of_parts(model))]
    modulated = declared_modulated(model.config)
    for guard in modulated.layers.values() if modulated is not None else ():
        as_they_are.append(WeightConverter(guard, guard, [_WithoutGuard()]))
    return [*as_they_are, *adapted, *as_they_are]


def _names_of_parts(model: Any) -> set[str]:
    """Ends of the names of weights that no converter is to touch: `experts.slim.0.down_proj`."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, StandInExperts):
            for place, part in parts_of(module).items():
                found |= {f"{name.rpartition('.')[2]}.{place}.{leaf}" for leaf in part._parameters}
            if module.modulation is not None:
                found |= {f"{name.rpartition('.')[2]}.modulation.{leaf}" for leaf in module.modulation._parameters}
    return found


def _with_operations(converter: WeightConverter, operations: list[ConversionOps]) -> WeightConverter:
    """A fresh converter of the same patterns and scope with other operations."""
    fresh = WeightConverter(
        list(converter._original_source_patterns), list(converter._original_target_patterns), operations=operations
    )
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):  # not all versions have all of them
        if hasattr(converter, name):
            setattr(fresh, name, getattr(converter, name))
    return fresh


_RENAMED: dict[type, type] = {}  # one for each class, so that equal models have equal classes


def _renamed(cls: type) -> type:
    """A class that saves the name by which engines know that they do not know the model."""
    if cls not in _RENAMED:
        _RENAMED[cls] = type(ARCHITECTURE_PREFIX + cls.__name__, (cls,), {"__module__": cls.__module__})
    return _RENAMED[cls]


def hook() -> None:
    """Let transformers recognise folders with stand-ins; calling it again changes nothing."""
    original = modeling.get_hf_quantizer
    if getattr(original, "_understudy", False):
        return

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        if declared(config) is None:
            return original(config, quantization_config, device_map, *args, **kwargs)
        if quantization_config is not None or getattr(config, "quantization_config", None) is not None:
            raise CheckpointError("stand-ins and quantisation cannot be combined in one folder by transformers yet")
        return StandInLoader(StandInConfig(), pre_quantized=True), config, device_map

    get_hf_quantizer._understudy = True  # type: ignore[attr-defined]
    modeling.get_hf_quantizer = get_hf_quantizer
