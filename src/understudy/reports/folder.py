"""What a compressed model's folder holds for a report; every file is checked as it is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from understudy.checkpoint import Checkpoint
from understudy.comparison import Example
from understudy.errors import UnderstudyError, reason
from understudy.metrics import FORMAT, Metrics
from understudy.plans import Plan, load_plan
from understudy.reports.trained import Training, trainings
from understudy.stats import Stats, load_stats

ROUTES = ("count", "tokens")  # fields of the statistics that the maps need


@dataclass
class Folder:
    """What a model folder holds for a report; None or empty where it does not."""

    path: Path
    plan: Plan | None = None
    stats: Stats | None = None
    metrics: Metrics | None = None
    recipe: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    examples: list[Example] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)  # the first one first
    nbytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The original, as people call it."""
        if self.plan is not None:
            return self.plan.model.source
        against = self.metrics.provenance.get("against") if self.metrics else None
        return str(against["source"]) if against else "the original"

    @property
    def before(self) -> int | None:
        """Bytes of the original's weights."""
        if self.stats is not None:
            return self.stats.model.nbytes
        return int(self.metrics.against["bytes"]) if self.metrics and self.metrics.against else None

    def file(self, name: str) -> Path:
        """Path of an artefact."""
        return self.path / "understudy" / name


def open_folder(path: Path) -> Folder:
    """Read everything but weights.

    Raises:
        UnderstudyError: a file is there but cannot be read, or plan and statistics are of two models.
    """
    found = Folder(path)
    if found.file("plan.yaml").is_file():
        found.plan = load_plan(found.file("plan.yaml"))
    found.metrics = _metrics(found.file("metrics.json"))
    found.recipe, found.provenance = _json(found.file("recipe.json")), _json(found.file("provenance.json"))
    found.trainings = trainings(_json(found.file("recovery.json")), found.file("recovery.json"))
    examples = _json(found.file("examples.json"))
    try:
        found.examples = [Example.model_validate(x) for x in (examples or {}).get("examples", [])]
    except ValidationError:
        raise UnderstudyError(f"{found.file('examples.json')}: not examples of this version; run eval again") from None
    if found.file("stats.safetensors").is_file():
        found.stats = load_stats(found.file("stats.safetensors"), only=ROUTES)
        if found.plan is not None and found.plan.model.fingerprint != found.stats.model.fingerprint:
            raise UnderstudyError(
                f"{path}: plan ({found.plan.model.fingerprint}) and statistics ({found.stats.model.fingerprint}) are "
                "of two models; the report would mix them up"
            )
    against = found.metrics.provenance.get("against") if found.metrics else None
    if against and found.plan and against["fingerprint"] != found.plan.model.fingerprint:
        found.notes.append(
            f"metrics.json compares with {against['source']} ({against['fingerprint']}), the plan was made for "
            f"{found.plan.model.source} ({found.plan.model.fingerprint})"
        )
    if found.metrics:
        found.nbytes = found.metrics.bytes
    elif any(path.glob("*.safetensors")):
        found.nbytes = Checkpoint(path).nbytes  # of headers
    return found


def _json(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnderstudyError(f"{file}: cannot be read ({reason(error)})") from None
    except ValueError as error:
        raise UnderstudyError(f"{file}: not JSON, or damaged ({error}); write it again") from None
    if not isinstance(data, dict):
        raise UnderstudyError(f"{file}: holds no table of figures; write it again")
    return data


def _metrics(file: Path) -> Metrics | None:
    data = _json(file)
    if data is None:
        return None
    if data.pop("format", None) != FORMAT:
        raise UnderstudyError(f"{file}: not figures of this version; run `understudy eval` again")
    try:
        return TypeAdapter(Metrics).validate_python(data)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UnderstudyError(f"{file}: damaged ({where}); run `understudy eval` again") from None
