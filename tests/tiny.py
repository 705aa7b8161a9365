"""A tiny random OLMoE with a tokenizer, and text for it: what a command line needs to run in a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def words(seed: int, count: int) -> str:
    """Return some text, always the same for a seed."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["alpha", "beta", "gamma", "delta", "épsilon"], count))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words(0, 500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def make_model(folder: Path, card: str | None = None, seed: int = 0) -> Path:
    """Write a model folder, with a model card if its text is given."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=0,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def make_text(folder: Path, name: str = "notes", seed: int = 1, documents: int = 8) -> Path:
    """Write a JSONL file of some documents."""
    path = folder / f"{name}.jsonl"
    lines = [json.dumps({"text": words(seed + number, 80)}) for number in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
