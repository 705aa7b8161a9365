"""Tiny random models, one for every Mixture-of-Experts type of the installed transformers.

The list of types is scanned from the modelling files, and each tiny config is made by shrinking the default config by
attribute name, so a family of a later transformers comes in by itself. The tables below hold sizes and, for the types
where names alone are not enough, a few overrides; none of them decides what is in the zoo.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

HIDDEN, LAYERS, EXPERTS, TOP_K, VOCAB = 32, 4, 8, 2, 97

# Types that span the distinct ways of holding, naming and calling experts; quick tests run over these.
DISTINCT = [
    "olmoe",  # one tensor per expert in the checkpoint, fused on load
    "qwen3_moe",  # the same, with tied embeddings
    "mixtral",  # renames: block_sparse_moe, w1/w2/w3
    "granitemoe",  # fused in the checkpoint as it is in memory
    "gpt_oss",  # biased, transposed, gate and up interleaved, an activation of its own
    "nemotron_h",  # ungated up_proj, layers that are either attention, mamba or MoE
    "deepseek_v3",  # dense first layer, shared experts, router in groups with a correction bias
    "lfm2_moe",  # w1/w2/w3 in feed_forward, router bias in the block
    "minimax_m3_vl",  # clamped activation of its own, vision wrapper
    "muse_spark",  # norm after each expert, latent experts narrower than the model
    "qwen3_vl_moe",  # vision wrapper, fused and transposed in the checkpoint
    "gemma4",  # experts and router directly in the decoder layer, per-layer inputs
    "ernie4_5_moe",  # correction bias of shape [1, E]
    "zaya",  # top-1 with a skip class, router state that travels from layer to layer
]

# Types that are in the scan but cannot be built, loaded or run with text, with the beginning of what happens.
UNBUILDABLE = {
    "qwen3_omni_moe": "LookupError: Qwen3OmniMoeForConditionalGeneration has no forward of its own",
}

# Auto classes whose models give logits for input_ids, best first.
_HEADS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION")

_SIZES: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "hidden_size d_model out_hidden_size projector_hidden_size output_proj_dims text_hidden_size output_dim "
        "adapter_in_dim adapter_out_dim adapter_input_size vision_output_dim projector_input_dim vision_hidden_size "
        "projector_output_dim audio_hidden_size thinker_hidden_size projection_hidden_dim decoder_dim",
    ),
    (LAYERS, "num_hidden_layers n_layers num_layers decoder_layers num_decoder_layers"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (TOP_K, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    (VOCAB, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (
        64,
        "max_position_embeddings max_seq_len model_max_length ngram_vocab_size_base position_embedding_size "
        "num_position_embeddings max_source_positions codebook_size image_size max_img_size",
    ),
    (
        48,
        "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_hidden_size encoder_ffn_dim d_ff mlp_dim "
        "decoder_ffn_dim prefix_dense_intermediate_size merged_hidden_size projection_intermediate_size",
    ),
    (
        24,
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    ),
    (
        16,
        "q_lora_rank kv_lora_rank o_lora_rank hc_lowrank router_hidden_size index_head_dim mamba_dt_rank "
        "downsample_hidden_size output_channels moe_hidden_size",
    ),
    (
        8,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim sliding_window sliding_window_size d_kv kv_channels "
        "swa_head_dim swa_v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state "
        "ssm_state_size hidden_size_per_layer_input mamba_chunk_size chunk_size attention_chunk_size index_topk "
        "pos_emb_height pos_emb_width posemb_grid_size",
    ),
    (
        4,
        "num_attention_heads n_heads num_heads encoder_attention_heads decoder_attention_heads d_rel index_n_heads "
        "swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads num_code_groups num_quantizers",
    ),
    (
        2,
        "num_key_value_heads swa_num_key_value_heads linear_num_key_heads n_group num_expert_group depth window_size "
        "encoder_layers zero_expert_num n_layers_per_attn_res_block",
    ),
    (1, "topk_group first_k_dense_replace num_dense_layers moe_layer_start_index"),
)
_SIZE = {name: size for size, names in _SIZES for name in names.split()}

_ROUTING = [name for size, names in _SIZES[2:4] for name in names.split()]
_DENSE_FIRST = ["dense"] + ["sparse"] * (LAYERS - 1)
_FULL_SLIDING = ["full_attention", "sliding_attention"] * (LAYERS // 2)
_SWA = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")


def _rope(*mrope_section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope_section)}


# What the names alone do not tell, by the model_type of the config or of a part of it.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": {"n_group": 2, "topk_group": 1},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32]},
    "deepseek_ocr2_text": {"mlp_layer_types": _DENSE_FIRST},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "diffusion_gemma": {"canvas_length": 8},
    "diffusion_gemma_text": {"moe_intermediate_size": 24},
    "doge": {"is_moe": True},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {f"swa_{name}": _SIZE[name] for name in _SWA}
    | {"swa_num_key_value_heads": 4, "swa_head_dim": 16, "head_dim": 16},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 16], "rope_parameters": _rope(1, 1, 2)},
    "gemma4_text": {"enable_moe_block": True, "moe_intermediate_size": 24},
    "glm4v_moe_text": {"rope_parameters": _rope(2, 1, 1) | {"partial_rotary_factor": 1.0}},
    "glm5_next_text": {"index_kpool": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_vision": {"patch_size": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _FULL_SLIDING, "sliding_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mellum": {"layer_types": _FULL_SLIDING},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * (LAYERS // 2)},
    "muse_spark_audio": {"hidden_sizes": (8, 8, 8, 8)},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_group": 2,
        "topk_group": 1,
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "text_config": {"moe_latent_size": 16}},
    "qwen3_moe": {"tie_word_embeddings": True},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [3],
        "eos_token_id": 2,
    },
    "step3p5": {"sliding_window": 8, "layer_types": _FULL_SLIDING, "swiglu_limits": [None, 0.5, None, 0.5]},
    "switch_transformers": {"decoder_start_token_id": 0},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [16, 32]},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Return every model type with a head and experts, its own or those of the text model in its default config."""
    names = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in _HEADS]
    with_head = [name for name in configuration_auto.CONFIG_MAPPING_NAMES if any(name in heads for heads in names)]
    return [name for name in with_head if any(map(_defines_experts, [name, *_part_types(name)]))]


def model_class(model_type: str) -> type[PreTrainedModel]:
    """Return the class that gives logits for text; raise LookupError where the type has none."""
    config_class = CONFIG_MAPPING[model_type]
    for head in _HEADS:
        found = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING").get(config_class, None)
        # A composite type may name the class of its text part under CAUSAL_LM.
        if found is not None and issubclass(config_class, found.config_class):
            if found.forward is nn.Module.forward:
                raise LookupError(f"{found.__name__} has no forward of its own")
            return found
    raise LookupError(f"{model_type} has no class with a language head")


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a config with 4 decoder layers, 8 experts and top-2 wherever the family allows; `changes` go on top."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_merge(_shrink(config_class), changes))


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a float32 model in eval mode with random weights, spread wide enough for routing to be decisive."""
    build, config = model_class(model_type), tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    assert size < 5_000_000, f"the tiny {model_type} has {size} parameters: some size of its config was not shrunk"
    torch.manual_seed(seed)
    model = build(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            _randomise(name, tensor, generator)
    return model


def sample_inputs(model: PreTrainedModel, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Return token ids `[batch, length]`, clear of every special token, under the names that the model wants."""
    ids = torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))
    wanted = inspect.signature(model.forward).parameters
    return {name: ids for name in ("input_ids", "decoder_input_ids") if name in wanted}


@functools.cache
def _experts_folders() -> frozenset[str]:
    """Names of the model folders whose modelling file defines a module of experts."""
    root = Path(configuration_auto.__file__).parent.parent
    experts = re.compile(r"^class \w*(Expert|MoE|Moe|SparseMLP)\w*\(nn\.Module", re.MULTILINE)
    return frozenset(f.parent.name for f in root.glob("*/modeling_*.py") if experts.search(f.read_text("utf-8")))


def _defines_experts(model_type: str) -> bool:
    return configuration_auto.model_type_to_module_name(model_type) in _experts_folders()


@functools.cache
def _part_types(model_type: str) -> tuple[str, ...]:
    try:
        default = CONFIG_MAPPING[model_type]()
    except Exception:  # a default config that does not validate has no parts to look at
        return ()
    return tuple(part.model_type for name, part in _parts(default).items() if "text" in name)


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    parts = {name: vars(config).get(name) for name in type(config).sub_configs}
    return {name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def _shrink(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return keyword arguments that make a tiny config of this class."""
    default = config_class()
    values = vars(default)
    small: dict[str, Any] = {}
    specials = iter(range(VOCAB - 1, 0, -1))
    for field in dataclasses.fields(config_class):
        name = field.name
        # Not getattr: it refuses to read what varies by layer.
        value = values.get(default.attribute_map.get(name, name))
        size = _SIZE.get(name)
        too_large = size is not None and isinstance(value, int) and value > size
        if too_large or (name in _ROUTING and value != 0):  # counts of experts also where the default is None or small
            small[name] = size
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            small[name] = fixed[name] if name in fixed else next(specials)
        elif name == "mlp_layer_types" and set(value or ()) == {"dense", "sparse"}:
            small[name] = _DENSE_FIRST
        elif name in ("layer_types", "indexer_types") and isinstance(value, list):
            kinds = sorted(set(value), key=value.index)  # every kind of layer, though only four layers are left
            small[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif name == "deepstack_visual_indexes":
            small[name] = [0, 1]
    if "num_key_value_heads" in small and values.get("num_attention_heads") == values["num_key_value_heads"]:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has no grouped heads
    for name, part in _parts(default).items():
        small[name] = _shrink(type(part)) | {"model_type": part.model_type}
    return _merge(small, _OVERRIDES.get(config_class.model_type, {}))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _randomise(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("tid2eid"):  # a table from token id to expert ids, all zeros until it is loaded
        picks = torch.rand(tensor.shape[0], EXPERTS, generator=generator).topk(tensor.shape[1]).indices
        tensor.copy_(picks)
    elif not tensor.is_floating_point():
        return
    elif isinstance(tensor, nn.Parameter) and tensor.ndim >= 2:
        tensor.copy_((1.0 if "router_mlp" in name else 0.2) * noise)  # the deep router of zaya dampens its input
    elif isinstance(tensor, nn.Parameter) or "bias" in name:
        tensor.add_(0.1 * noise)


# Types that are no seam, with the reason that discovery gives.
REFUSED = {
    "dbrx": r"blocks\.0\.ffn\.experts \(DbrxExperts\) is no seam: it does not hold the experts as stacked",
    "diffusion_gemma": r"experts in model\.decoder\.layers and model\.encoder\.language_model\.layers",
    "doge": r"layers\.0\.mlp \(DogeCDMoE\) is no seam",
    "jetmoe": r"layers\.0\.mlp\.input_linear \(JetMoeParallelExperts\) is no seam",
    "llama4": r"\(Llama4TextExperts\) is no seam: it is called with \(hidden_states\)",
    "llama4_text": r"\(Llama4TextExperts\) is no seam: it is called with \(hidden_states\)",
    "longcat_flash": r"\(LongcatFlashExperts\) is no seam: its router also picks 2 experts that have no weights",
    "nllb-moe": r"\(NllbMoeExperts\) is no seam",
    "switch_transformers": r"\(SwitchTransformersExperts\) is no seam",
}

# Types whose experts are at the seam.
SEAM = [name for name in model_types() if name not in REFUSED and name not in UNBUILDABLE]
