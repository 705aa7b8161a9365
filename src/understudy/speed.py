"""How fast a model runs and how much memory it takes, beside its original in the same minutes on the same machine.

Both are loaded whole. Machines are never quiet, so the two take turns and ratios are taken within a turn.
"""

from __future__ import annotations

import inspect
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from understudy.comparison import Speed
from understudy.errors import UnderstudyError
from understudy.examples import cannot_run_whole
from understudy.runtime import quiet_transformers
from understudy.skeleton import ROOT, Skeleton

DECODED, REPEATS, PROMPT = 32, 3, 16  # tokens, turns, tokens before those that are decoded


@torch.no_grad()
def measure_speed(
    model: Skeleton, original: Skeleton, ids_S: np.ndarray, *, decoded: int = DECODED, repeats: int = REPEATS
) -> Speed:
    """Time a model and its original on one block of tokens, and take the most memory that each needs for it.

    Args:
        model: the model, with or without stand-ins.
        original: what it was made from.
        ids_S: the tokens of the block; a prefill is one forward over all of them.
        decoded: tokens that are generated one at a time with a cache, after the first few of the block.
        repeats: turns, after one to warm up.

    Raises:
        UnderstudyError: the two do not fit into memory together, or cannot generate.
    """
    for skeleton in (model, original):
        if why := cannot_run_whole(skeleton):
            raise UnderstudyError(why)
    ids_1S = torch.from_numpy(np.ascontiguousarray(ids_S[None])).long()
    with whole(model), whole(original):
        actions: list[Callable[[], None]] = []
        for skeleton in (model, original):
            actions += [_prefill(skeleton, ids_1S), _decode(skeleton, ids_1S[:, :PROMPT], decoded)]
        try:
            peaks = [_peak(skeleton, action) for skeleton, action in zip((model, original), actions[::2], strict=True)]
            turns = [[_seconds(action, model.device) for action in actions] for _ in range(repeats + 1)][1:]
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            why = " ".join(str(error).split())[:200]
            raise UnderstudyError(f"{model.checkpoint.folder}: cannot be timed ({why})") from error
    tokens = (ids_1S.shape[1], decoded, ids_1S.shape[1], decoded)
    rates = [statistics.median(n / turn[i] for turn in turns) for i, n in enumerate(tokens)]
    ratios = [statistics.median(turn[i + 2] / turn[i] for turn in turns) for i in range(2)]
    return Speed(
        device=_device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        prompt_tokens=ids_1S.shape[1],
        decoded_tokens=decoded,
        repeats=repeats,
        prefill=rates[0],
        decode=rates[1],
        original_prefill=rates[2],
        original_decode=rates[3],
        prefill_ratio=ratios[0],
        decode_ratio=ratios[1],
        peak_memory_bytes=peaks[0],
        original_peak_memory_bytes=peaks[1],
    )


@contextmanager
def whole(skeleton: Skeleton) -> Iterator[Any]:
    """Hold all of a model in memory."""
    with ExitStack() as stack:
        for part in (ROOT, *range(len(skeleton.decoder_layers))):
            stack.enter_context(skeleton.resident(part))
        yield skeleton.model


def _prefill(skeleton: Skeleton, ids_1S: torch.Tensor) -> Callable[[], None]:
    model: Any = skeleton.model
    # who serves a model needs the prediction after the last token only
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = ids_1S.to(skeleton.device)
    return lambda: model(input_ids=ids, use_cache=False, **last)


def _decode(skeleton: Skeleton, ids_1S: torch.Tensor, tokens: int) -> Callable[[], None]:
    model: Any = skeleton.model
    ids = ids_1S.to(skeleton.device)
    # all are to generate equally many; an end token of the model's own config would stop them
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    def run() -> None:
        with quiet_transformers():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        if found.shape[1] - ids.shape[1] != tokens:
            raise ValueError(f"generates {found.shape[1] - ids.shape[1]} tokens, not {tokens}")

    return run


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak(skeleton: Skeleton, action: Callable[[], None]) -> int:
    """Bytes of the weights, and the most that was allocated on top while an action ran."""
    state = skeleton.model.state_dict().values()
    weights = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}.values())
    if skeleton.device.type == "cuda":
        torch.cuda.synchronize(skeleton.device)
        before = torch.cuda.memory_allocated(skeleton.device)
        torch.cuda.reset_peak_memory_stats(skeleton.device)
        action()
        torch.cuda.synchronize(skeleton.device)
        return weights + torch.cuda.max_memory_allocated(skeleton.device) - before
    with _Allocations(state) as seen:
        action()
    return weights + seen.peak


class _Allocations(TorchDispatchMode):
    """Follows the storages that operations allocate and that are let go of; what is inside a kernel is not seen."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: set[int] = set()
        self._held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._alive or place in self._known or not size:
            return
        self._alive.add(place)
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self._held -= size


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
