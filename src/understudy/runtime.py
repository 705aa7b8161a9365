"""What computing needs before there is a model: device, dtype, bounded caches, quiet libraries, sane numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from understudy.checkpoint import SUPPORTED, Weights
from understudy.errors import CheckpointError, UnderstudyError

# torch's CPU library compiles a kernel for every number of rows that an expert happens to get, and keeps 1024 of them
# at about 100 KB each: memory that grows with the depth of the model. It reads these at its first product, so not too
# late.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "32")


def pick_device(device: str) -> torch.device:
    """Resolve `auto` to an accelerator where there is one.

    Raises:
        UnderstudyError: torch does not know or does not have the device.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        return chosen
    except (RuntimeError, AssertionError) as error:
        raise UnderstudyError(f"--device {device}: {str(error).splitlines()[0]}") from None


def pick_dtype(dtype: str, config: Any) -> torch.dtype:
    """Resolve `auto` to the checkpoint's own dtype (float32 where its config names none).

    Raises:
        UnderstudyError: not a floating-point dtype.
    """
    wanted: Any = dtype
    if dtype == "auto":
        wanted = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted.removeprefix("torch."), None)
    if wanted not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UnderstudyError(f"--dtype {dtype}: not a floating-point dtype; use auto, float32, bfloat16 or float16")
    return wanted


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; in pieces, since a sum in another dtype copies what it sums."""
    for piece in tensor.detach().reshape(-1).split(1 << 20):
        if not torch.isfinite(piece.sum(dtype=torch.float32)) and not torch.isfinite(piece).all():
            return False
    return True


def refuse_quantised(checkpoint: Weights) -> None:
    """Refuse weights that are stored quantised.

    Raises:
        CheckpointError: the config names a quantisation, or tensors have a quantised dtype.
    """
    declared = checkpoint.config.get("quantization_config")
    nested = [v.get("quantization_config") for v in checkpoint.config.values() if isinstance(v, dict)]
    declared = declared or next((n for n in nested if n), None)
    packed = sorted({e.dtype for e in checkpoint.entries.values()} & {"F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8"})
    if declared or packed:
        how = declared.get("quant_method", "unnamed") if isinstance(declared, dict) else ", ".join(packed)
        raise CheckpointError(
            f"{checkpoint.folder}: quantised weights ({how}) are not supported; use the {SUPPORTED} checkpoint, "
            "compress it, and quantise the result"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and notices for whole-model loading out of layer-wise work."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
