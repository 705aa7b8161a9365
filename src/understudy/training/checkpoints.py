"""Checkpoints of a training run: only what trains, and sealed, so that one cut short is never resumed from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from understudy.errors import CheckpointError

WEIGHTS, _SEAL, _PREFIX = "trained.safetensors", "complete.json", "checkpoint-"
KEPT = 2


def save_trained(tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Write the weights that train."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file(tensors, checkpoint / WEIGHTS)


@torch.no_grad()
def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Read the weights that train into a model, which is not wrapped yet.

    Raises:
        CheckpointError: they are not those of this model.
    """
    tensors = load_file(checkpoint / WEIGHTS)
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in mine.items()}:
        raise CheckpointError(f"{checkpoint}: holds other weights than those that train here; remove it to start anew")
    for name, parameter in mine.items():
        parameter.copy_(tensors[name])


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Say that a checkpoint is complete, as the last act of writing it, and with what files."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in _files(checkpoint)}
    partial = checkpoint / f"{_SEAL}.partial"
    partial.write_text(json.dumps({"files": sizes, **facts}), encoding="utf-8")
    os.replace(partial, checkpoint / _SEAL)


def sealed(checkpoint: Path) -> dict[str, Any] | None:
    """Return the facts of a complete checkpoint, or None where something of it is missing."""
    try:
        facts: dict[str, Any] = json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))
        whole = all((checkpoint / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None


def newest(folder: Path) -> Path | None:
    """Return the last complete checkpoint in a folder."""
    return next((path for path in reversed(_all(folder)) if sealed(path) is not None), None)


def tidy(folder: Path) -> None:
    """Remove checkpoints that are not complete, and complete ones but for the last few."""
    complete = [path for path in _all(folder) if sealed(path) is not None]
    for path in set(_all(folder)) - set(complete[-KEPT:]):
        (path / _SEAL).unlink(missing_ok=True)  # first, so that what is half removed does not count
        shutil.rmtree(path, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    """Checkpoints by step, complete or not."""
    found = {p: p.name.removeprefix(_PREFIX) for p in folder.glob(f"{_PREFIX}*") if p.is_dir()}
    return sorted((p for p, step in found.items() if step.isdigit()), key=lambda p: int(found[p]))


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and not p.name.startswith(_SEAL))
