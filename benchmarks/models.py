"""Random models for the benchmarks, written shard by shard so that making them needs little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.core_model_loading import revert_weight_conversion


def olmoe_config(layers: int = 16, hidden: int = 1024, experts: int = 64, width: int = 512, **more: Any) -> OlmoeConfig:
    """OLMoE of a given shape, top-8 as the 1B-7B model."""
    sizes = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "num_experts_per_tok": 8}
    return OlmoeConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_experts=experts,
        intermediate_size=width,
        vocab_size=more.pop("vocab_size", 8192),
        max_position_embeddings=4096,
        **(sizes | more),
    )


def write_random(folder: Path, config: OlmoeConfig, dtype: torch.dtype, shard_bytes: int = 500_000_000) -> Path:
    """Write a random checkpoint; a folder that is there already is used again."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shapes = {k: v.shape for k, v in revert_weight_conversion(model, dict(model.state_dict())).items()}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = size = 0

    def flush() -> None:
        nonlocal number, size
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        number, size = number + 1, 0

    for key, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 else 0.7 / shape[-1] ** 0.5
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * scale
        shard[key] = value.to(dtype)
        size += shard[key].nbytes
        if size > shard_bytes:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["OlmoeForCausalLM"]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)  # last: its presence says that the folder is complete
    return folder
