"""Write a trained model: its tensors, its config, what it came from, and a card; verified before it appears."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from understudy.card import recovered_card
from understudy.checkpoint import Checkpoint
from understudy.errors import OutputError, reason
from understudy.full_size import ordinary
from understudy.shards import MAX_SHARD, Piece, write_folder, write_rest
from understudy.skeleton import Skeleton
from understudy.training.written import recovered
from understudy.verify import verify_tensors

if TYPE_CHECKING:
    from understudy.training.loop import Run

Progress = Callable[[str, int, int], None]
FILE = "recovery.json"  # in the folder `understudy` of a model
_OF_BEFORE = ("metrics.json", "examples.json")  # figures of the model before it was trained


@dataclass(frozen=True)
class Recovered:
    """What `recover` wrote: the folder, what was trained, every run with its figures, and which of them was kept."""

    folder: Path
    nbytes: int
    train_what: str
    trained: int  # parameters
    runs: tuple[dict[str, Any], ...]
    chosen: int  # place among the runs
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "out": str(self.folder),
            "bytes": self.nbytes,
            "train_what": self.train_what,
            "trained": self.trained,
            "runs": [{k: v for k, v in run.items() if k != "losses"} for run in self.runs],
            "chosen": self.chosen,
            "notes": list(self.notes),
        }


def write_recovered(
    folder: Path,
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    work: Path,
    target: Path,
    trust_remote_code: bool,
    report: Progress,
    max_shard: int = MAX_SHARD,
) -> int:
    """Write a model with what was trained of it, and return the bytes of its tensors.

    Args:
        folder: the model that was trained, as it was before.
        state: what was trained, by the names of the live model.
        facts: of the training, for `recovery.json` and the card; `materialised`: write every expert at full size.
        work: a folder to work in, on the disk of `target`.
        target: the new folder.
        max_shard: bytes of a shard file at most.

    Raises:
        CheckpointError: what was written is not what should have been.
        OutputError: it cannot be written.
    """
    source = Skeleton(folder, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    pieces, config, staging = recovered(source, state), source.checkpoint.config, work / "folder"
    try:
        _write(staging, source, pieces, config, trust_remote_code, report, max_shard)
        if facts["materialised"]:
            source = Skeleton(staging, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
            pieces, config = ordinary(source)
            staging = work / "full"
            _write(staging, source, pieces, config, trust_remote_code, report, max_shard)
        _write_artefacts(staging, folder, target.name, facts)
        if target.is_dir():
            target.rmdir()
        os.replace(staging, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({reason(error)})") from None
    return sum(piece.nbytes for piece in pieces)


def _write(
    staging: Path, source: Skeleton, pieces: Sequence[Piece], config: dict[str, Any], trust: bool, report: Progress,
    max_shard: int,
) -> None:  # fmt: skip
    """Write tensors and config, and read all back: the bytes are right, the model opens, and it is finite."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    write_folder(staging, source.checkpoint, pieces, max_shard=max_shard, progress=partial(report, "write"))
    write_rest(staging, Checkpoint(source.checkpoint.folder), config)
    written = Skeleton(staging, device="cpu", trust_remote_code=trust)
    verify_tensors(written.checkpoint, source.checkpoint, pieces)
    parts = sorted(written.names)
    for step, part in enumerate(parts):
        with written.resident(part):
            report("verify", step + 1, len(parts))


def _write_artefacts(staging: Path, folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Keep with the model what it came from and how it was trained."""
    mine, theirs = staging / "understudy", folder / "understudy"
    mine.mkdir(exist_ok=True)
    for path in sorted(theirs.iterdir()) if theirs.is_dir() else ():
        if path.is_file() and path.name not in _OF_BEFORE:
            shutil.copyfile(path, mine / path.name)
    write_file(mine / FILE, json.dumps({**facts, "earlier": _earlier(theirs / FILE)}, indent=2) + "\n")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    write_file(staging / "README.md", recovered_card(text, name, folder.name, dict(facts)))


def _earlier(path: Path) -> list[dict[str, Any]]:
    """Return how the model was trained before, the first time first; nothing where no record of it can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [*found.pop("earlier", []), found]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def write_file(path: Path, text: str) -> None:
    """Write a small file, under a temporary name first.

    Raises:
        OutputError: it cannot be written.
    """
    partial_file = path.with_name(path.name + ".tmp")
    try:
        partial_file.write_text(text, encoding="utf-8")
        os.replace(partial_file, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)})") from None


def objective(run: Run, loss: str) -> float:
    """Return what was trained on, as it is on the held-out text."""
    return sum(
        run.held_out[{"lm": "loss", "kd": "kd", "layers": "kd", "repair": "kd"}[name]] for name in loss.split("+")
    )


def said(runs: Sequence[Run], best: int) -> tuple[str, ...]:
    """Say which of several end ratios was kept, and why."""
    if len(runs) < 2:
        return ()
    figures = ", ".join(f"{run.end_ratio:g}: {run.held_out['loss']:.4f}" for run in runs)
    return (f"end ratio {runs[best].end_ratio:g} was kept; losses on the held-out text by end ratio: {figures}",)


def layers_said(run: Run) -> tuple[str, ...]:
    """Say how far layers that were trained or repaired one by one came."""
    if not run.layers:
        return ()
    parts = (f"{x['layer']:g}: {x['before']:.4f} to {x['after']:.4f}" for x in run.layers)
    return (f"share of what a layer adds that is missed on held-out text, before and after: {', '.join(parts)}",)
