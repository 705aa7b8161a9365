"""How an original and a model made from it go on with the same text: the blocks on which they differ most, as text.

Letters: N blocks, S tokens of a block.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import GenerationConfig

from understudy.comparison import Example
from understudy.data import Blocks
from understudy.errors import OutputError, UnderstudyError, reason
from understudy.facts import format_bytes
from understudy.runtime import quiet_transformers
from understudy.skeleton import ROOT, Skeleton
from understudy.tokens import longest_sequence

logger = logging.getLogger(__name__)

FILE = "examples.json"  # in the folder `understudy` of a model
FORMAT = 1
TOKENS = 48  # of a continuation
_ROOM = 1.3  # times the weights is what a model takes at least while it writes text


def worst_blocks(kl_N: np.ndarray, count: int) -> list[int]:
    """Return the positions of the blocks of the largest KL, worst first; of equals the earlier."""
    order = np.argsort(-np.asarray(kl_N), kind="stable")
    return [int(i) for i in order[:count]]


def worst_examples(
    model: Skeleton,
    original: Skeleton,
    blocks: Blocks,
    kl_N: np.ndarray,
    tokenizer: Any,
    *,
    count: int = 3,
    tokens: int = TOKENS,
) -> list[Example]:
    """Let the original and the model go on, greedily, after the first half of the blocks on which they differ most.

    Both are loaded whole, one after the other.

    Args:
        model: the model, with or without stand-ins.
        original: what it was made from.
        blocks: the text that both were compared on.
        kl_N: mean KL of each block, nats a token.
        tokenizer: of the original.
        count: how many blocks.
        tokens: length of a continuation; it ends earlier where a model ends the text.

    Raises:
        UnderstudyError: there is not enough memory for one of the two, or it cannot generate.
    """
    chosen = worst_blocks(kl_N, count)
    if not chosen:
        return []
    half = blocks.ids.shape[1] // 2
    tokens = min(tokens, longest_sequence(original.config) - half)
    prompts, rest = blocks.ids[chosen, :half], blocks.ids[chosen, half : half + tokens]
    theirs = continuations(original, prompts, tokens, tokenizer.eos_token_id)
    mine = continuations(model, prompts, tokens, tokenizer.eos_token_id)

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    return [
        Example(
            source=blocks.names[blocks.source[i]],
            block=i,
            kl=float(kl_N[i]),
            prompt=text(prompts[row]),
            actual=text(rest[row]),
            original=text(theirs[row]),
            model=text(mine[row]),
        )
        for row, i in enumerate(chosen)
    ]


@torch.no_grad()
def continuations(skeleton: Skeleton, prompts: np.ndarray, tokens: int, end: int | None) -> list[list[int]]:
    """Return what a model finds most likely after each prompt `[N, S]`, token by token, up to and with the end token.

    Raises:
        UnderstudyError: not enough memory, or a model that cannot generate.
    """
    if why := cannot_run_whole(skeleton):
        raise UnderstudyError(why)
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=end or 0)
    ids = torch.from_numpy(np.ascontiguousarray(prompts)).long().to(skeleton.device)
    with ExitStack() as stack, quiet_transformers():
        for part in (ROOT, *range(len(skeleton.decoder_layers))):
            stack.enter_context(skeleton.resident(part))
        model: Any = skeleton.model  # transformers' own loop, with the cache that the family needs
        try:
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            why = " ".join(str(error).split())[:200]
            raise UnderstudyError(f"{skeleton.checkpoint.folder}: cannot generate text ({why})") from error
    rows = found[:, ids.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def cannot_run_whole(skeleton: Skeleton) -> str | None:
    """Say why a model cannot be loaded whole to generate text; None where it can."""
    folder, needed = skeleton.checkpoint.folder, _weights(skeleton)
    if not getattr(skeleton.model, "can_generate", bool)():
        return f"{folder}: {type(skeleton.model).__name__} cannot generate text"
    if needed * _ROOM > (free := free_memory(skeleton.device)):
        return f"{folder}: {format_bytes(needed)} of weights do not fit into the {format_bytes(free)} that are free"
    return None


def free_memory(device: torch.device | str) -> int:
    """Return how many bytes are free on a device."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _weights(skeleton: Skeleton) -> int:
    return sum(tensor.numel() for tensor in skeleton.model.state_dict().values()) * skeleton.dtype.itemsize


def save_examples(examples: Sequence[Example], path: Path, provenance: dict[str, Any]) -> None:
    """Write examples as JSON, under a temporary name first; `provenance` says of which models, on which text.

    Raises:
        OutputError: the place cannot be written.
    """
    data = {"format": FORMAT, "provenance": provenance, "examples": [e.model_dump() for e in examples]}
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)})") from None
