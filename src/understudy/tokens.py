"""The tokenizer of a model folder, and how many positions the model has."""

from __future__ import annotations

import filecmp
import sys
from pathlib import Path
from typing import Any

from understudy.errors import CheckpointError

_VOCABULARY = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_FILES = ("*token*.json", "vocab*", "merges.txt", "chat_template*", "*.model", "*.tiktoken")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: the folder has none that transformers can read.
    """
    from transformers import AutoTokenizer

    if not trust_remote_code and not any(path for pattern in _VOCABULARY for path in folder.glob(pattern)):
        raise CheckpointError(f"{folder}: has no tokenizer; copy its files (tokenizer.json, ...) from where it came")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise bare exceptions of their own for damaged files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: no tokenizer can be loaded from it ({reason})") from None


def same_tokenizer_files(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same tokenizer, file by file; differing files may still tokenise alike."""
    names = {path.name for folder in (a, b) for pattern in _FILES for path in folder.glob(pattern)}
    return all((a / n).is_file() and (b / n).is_file() and filecmp.cmp(a / n, b / n, shallow=False) for n in names)


def longest_sequence(config: Any) -> int:
    """Positions that the config allows; unlimited where it names none."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else sys.maxsize
