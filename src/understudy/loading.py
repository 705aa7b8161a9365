"""Teach transformers to load and save folders with stand-ins; runs when both packages are imported.

A folder says what it holds in the words of vLLM >= 0.33 (`compression_config.transform_config.expert_substitution`).
transformers lets a quantizer reshape a model before its weights are loaded and adapt the weight converters, which is
what stand-ins need; the model that comes out is an ordinary one, and no quantizer stays attached to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
import transformers.modeling_utils as modeling
from transformers.core_model_loading import ConversionOps, MergeModulelist, SplitModulelist, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from understudy.errors import CheckpointError
from understudy.experts import StandInExperts, install_constants

NOVICE_PATTERN = "novices.*.approx_value"
ROUTER_SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


def declare_constants(names: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    """Build the `compression_config` that vLLM >= 0.33 and this module read.

    `names` maps the dotted name of an experts module to the tensor name of each replaced expert, by original id.
    """
    targets = {
        module: {
            "weight_layout": "compact_retained_experts",
            "replacements": {
                str(e): {"format": "constant-v1", "tensors": {"value": tensor}} for e, tensor in sorted(by_id.items())
            },
        }
        for module, by_id in names.items()
    }
    substitution = {"version": 1, "router_semantics": ROUTER_SEMANTICS, "targets": targets}
    return {"transform_config": {"expert_substitution": substitution}}


def declared_constants(config: Any) -> dict[str, list[int]] | None:
    """Read which experts a config declares as constants: module name to sorted original ids; None where none are.

    Raises:
        CheckpointError: the declaration is there but is not one that this version reads.
    """
    compression = config.get("compression_config") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping):
        compression = getattr(config, "compression_config", None)
    transform = compression.get("transform_config") if isinstance(compression, Mapping) else None
    substitution = transform.get("expert_substitution") if isinstance(transform, Mapping) else None
    if substitution is None:
        return None
    try:
        if substitution["version"] != 1 or substitution["router_semantics"] != ROUTER_SEMANTICS:
            raise ValueError("only version 1 with unchanged routing is supported")
        found = {}
        for module, target in substitution["targets"].items():
            if target["weight_layout"] != "compact_retained_experts":
                raise ValueError(f"weight layout {target['weight_layout']!r} of {module}")
            if any(r["format"] != "constant-v1" for r in target["replacements"].values()):
                raise ValueError(f"a replacement of {module} is not constant-v1")
            found[module] = sorted(int(e) for e in target["replacements"])
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json declares expert_substitution in a form that is not read: {error}") from None


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
        ids = module.replaced if self.constants else module.kept
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


def _stand_in_of(model: Any, tensor_name: str) -> StandInExperts | None:
    """The experts module with stand-ins in the decoder layer that a tensor name points into, if there is one."""
    best, best_length = None, 0
    for name, module in model.named_modules():
        if isinstance(module, StandInExperts):
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
        self.remove_quantization_config(model)
        del self._model
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
    declared = declared_constants(model.config)
    for name, ids in (declared or {}).items():
        try:
            experts = model.get_submodule(name)
            total = experts.down_proj.shape[0]
        except AttributeError:
            raise CheckpointError(f"config.json declares stand-ins in {name}, which this model does not have") from None
        if not ids or ids[0] < 0 or ids[-1] >= total or len(ids) >= total:
            raise CheckpointError(f"config.json declares stand-ins {ids} in {name}, which has {total} experts")
        install_constants(experts, ids, total)
    return bool(declared)


def adapt_conversions(conversions: list[Any], model: Any) -> list[Any]:
    """Make a model's weight converters name experts by original id, and read and write constants."""
    adapted = []
    for conversion in conversions:
        if isinstance(conversion, WeightConverter) and any(type(o) is MergeModulelist for o in conversion.operations):
            operations = [_MergeByOriginalId(o.dim) if type(o) is MergeModulelist else o for o in conversion.operations]
            conversion = _with_operations(conversion, operations)
        adapted.append(conversion)
    leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, StandInExperts)}
    for leaf in sorted(leaves):
        adapted.append(WeightConverter(NOVICE_PATTERN, f"{leaf}.constants", [_MergeByOriginalId(0, constants=True)]))
    return adapted


def _with_operations(converter: WeightConverter, operations: list[ConversionOps]) -> WeightConverter:
    """A fresh converter of the same patterns and scope with other operations."""
    fresh = WeightConverter(
        list(converter._original_source_patterns), list(converter._original_target_patterns), operations=operations
    )
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):  # not all versions have all of them
        if hasattr(converter, name):
            setattr(fresh, name, getattr(converter, name))
    return fresh


def hook() -> None:
    """Let transformers recognise folders with stand-ins; calling it again changes nothing."""
    original = modeling.get_hf_quantizer
    if getattr(original, "_understudy", False):
        return

    @wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        if declared_constants(config) is None:
            return original(config, quantization_config, device_map, *args, **kwargs)
        if quantization_config is not None or getattr(config, "quantization_config", None) is not None:
            raise CheckpointError("stand-ins and quantisation cannot be combined in one folder by transformers yet")
        return StandInLoader(StandInConfig(), pre_quantized=True), config, device_map

    get_hf_quantizer._understudy = True  # type: ignore[attr-defined]
    modeling.get_hf_quantizer = get_hf_quantizer
