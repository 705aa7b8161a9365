"""Small model folders with a tokenizer, text for them, and what tests compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo
from understudy.data import Blocks
from understudy.stats import ExpertStats

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [f"w{i}" for i in range(len(SPECIAL), zoo.VOCAB)]


def save_tokenizer(folder: Path) -> None:
    """A word is a token, with the special ids of the tiny configs."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def model_folder(
    folder: Path, model_type: str = "olmoe", dtype: torch.dtype = torch.float32, shard: str = "100KB", **changes: Any
) -> Path:
    """Save a tiny random model in several shards, with a tokenizer."""
    zoo.tiny_model(model_type, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


def text_file(path: Path, words: int = 400, seed: int = 0) -> str:
    """Write random words."""
    rng = np.random.default_rng(seed)
    path.write_text(" ".join(rng.choice(WORDS, words)))
    return str(path)


def blocks_of(ids: np.ndarray | torch.Tensor) -> Blocks:
    """Blocks of given tokens `[N, S]`."""
    ids = np.asarray(ids, np.int32)
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return Blocks(ids, np.zeros(len(ids), np.int16), ("test",), (), digest)


def assert_close(
    got: Mapping[str, ExpertStats], expected: Mapping[str, ExpertStats], rtol: float, exact: bool = False
) -> None:
    """Compare sums of all layers, relative to the largest entry of each; `exact` compares bits."""
    assert set(got) == set(expected)
    for key, layer in expected.items():
        for name, value in layer.arrays().items():
            other = got[key].arrays()[name]
            if exact:
                assert np.array_equal(other, value), f"layer {key}, {name}"
            else:
                scale = float(np.abs(value).max())
                np.testing.assert_allclose(other, value, rtol=rtol, atol=rtol * scale, err_msg=f"layer {key}, {name}")


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder by relative name, with the hash of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def beside(path: Path) -> set[str]:
    """Names in the folder that holds a path, without its own."""
    return {p.name for p in path.parent.iterdir()} - {path.name}
