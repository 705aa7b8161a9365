"""How a model was trained after it was cut, from `recovery.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from understudy.card import recover_command
from understudy.errors import UnderstudyError
from understudy.recipe import Recovery
from understudy.reports.markup import Child, join, table, tag
from understudy.reports.words import few, listed, number, parameters, size

_SHARE = 10  # parts of a run, the first and last of which are compared


class _Of(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Run(_Of):
    """A run as the record has it."""

    end_ratio: float
    losses: list[dict[str, float]]
    held_out: dict[str, float]
    seconds: float
    peak_memory_bytes: int

    @field_validator("losses")
    @classmethod
    def _steps(cls, value: list[dict[str, float]]) -> list[dict[str, float]]:
        if not all("loss" in step for step in value):
            raise ValueError("a step without its loss")
        return value

    def loss(self, last: bool) -> float | None:
        """Return the mean loss of the first or the last tenth of the steps."""
        part = max(len(self.losses) // _SHARE, 1)
        found = [step["loss"] for step in (self.losses[-part:] if last else self.losses[:part])]
        return sum(found) / len(found) if found else None


class _Model(_Of):
    folder: str


class Training(_Of):
    """A training as the record has it."""

    model: _Model
    teacher: dict[str, Any] | None
    settings: Recovery
    train_what: str
    trained: int
    runs: list[Run]
    chosen: int

    @model_validator(mode="after")
    def _one_of_them(self) -> Training:
        if not 0 <= self.chosen < len(self.runs):
            raise ValueError("no such run")
        return self


def trainings(record: dict[str, Any] | None, file: Path) -> list[Training]:
    """Return what `recovery.json` holds, the first training first.

    Raises:
        UnderstudyError: it is damaged, or of another version.
    """
    if record is None:
        return []
    try:
        earlier = record.get("earlier", [])
        found = [Training.model_validate(entry) for entry in [*earlier, record]]
    except (ValidationError, TypeError):
        raise UnderstudyError(f"{file}: not a record of this version, or damaged; train the model again") from None
    return found


def sentence(training: Training) -> str:
    """Say in a line what was trained, on what, and what came of it."""
    s, run = training.settings, training.runs[training.chosen]
    text = listed([Path(spec.split("=")[0]).name for spec in s.train])
    faded = f"; the originals faded out over {run.end_ratio:.0%} of the steps" if run.end_ratio else ""
    return (
        f"{parameters(training.trained)} parameters ({training.train_what}) were trained for {few(s.steps, 'step')} of "
        f"{few(s.batch, 'sequence')} of up to {s.seq_len} tokens of {text}{faded}."
    )


def section(found: list[Training]) -> Child:
    """Tell each training with its runs."""
    if not found:
        return None
    shown: list[Child] = []
    for place, training in enumerate(found, 1):
        if len(found) > 1:
            shown.append(tag("h3", f"Training {place} of {len(found)}"))
        measures = list(training.runs[0].held_out)
        head = ["end ratio", "loss, first steps", "last steps", *(f"held-out {m}" for m in measures), "time", "memory"]
        rows = [
            [
                f"{run.end_ratio:g}{' (kept)' if len(training.runs) > 1 and n == training.chosen else ''}",
                number(run.loss(last=False)),
                number(run.loss(last=True)),
                *(number(run.held_out.get(m)) for m in measures),
                f"{number(run.seconds)} s",
                size(run.peak_memory_bytes),
            ]
            for n, run in enumerate(training.runs)
        ]
        shown += [tag("p", sentence(training)), table(f"Training {place}", head, rows)]
    told = (
        "The end ratio is the share of the steps over which the originals faded out; losses are nats a token, held out "
        "from the training text; first and last steps are a tenth of them each."
    )
    return join(shown, tag("p", told, class_="muted"))


def again(found: list[Training], source: str, out: str) -> list[str]:
    """Return the command lines of all trainings."""
    lines = []
    for place, training in enumerate(found):
        target = out if place == len(found) - 1 else found[place + 1].model.folder
        teacher = source if training.teacher else None
        lines.append(recover_command(training.model.folder, target, teacher, training.settings))
    return lines


def first_folder(found: list[Training], path: Path) -> str:
    """Return what the model was called before any training."""
    return found[0].model.folder if found else str(path)
