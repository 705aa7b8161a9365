"""The results of a comparison: one record a method, ratio and seed, the files that hold them, and what they sum up to.

DIR/results.json             everything below, rewritten after every record
DIR/results.csv              the figures, a row a record
DIR/results.md               the table, means over the seeds
DIR/records/NAME.json        one record; what a later call with the same DIR goes on from
DIR/plans/NAME.yaml          its plan
DIR/stats-seedN.safetensors  the statistics that all plans of a seed are cut from
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from understudy.errors import OutputError, UnderstudyError, reason
from understudy.facts import ModelFacts
from understudy.summary import Cell as Cell
from understudy.summary import Summary as Summary
from understudy.summary import as_markdown
from understudy.summary import summarise as summarise

FORMAT = 1
RESULTS, TABLE, MARKDOWN, RECORDS, PLANS = "results.json", "results.csv", "results.md", "records", "plans"
ALL = "all"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceFigures(_Data):
    """Figures of one source of text, or of all together: sums over the predicted tokens, and their means.

    `nll` and `kl` are in nats; KL is of the original from the model, KL(original || model); `agree` counts positions
    at which both find the same token most likely.
    """

    tokens: int
    nll_sum: float
    original_nll_sum: float
    kl_sum: float
    agree: int
    perplexity: float
    original_perplexity: float
    kl: float
    top1_agreement: float

    @classmethod
    def of(cls, tokens: int, nll: float, original_nll: float, kl: float, agree: int) -> SourceFigures:
        """Take the means of sums over at least one token."""
        return cls(
            tokens=tokens,
            nll_sum=nll,
            original_nll_sum=original_nll,
            kl_sum=kl,
            agree=agree,
            perplexity=math.exp(min(nll / tokens, 700.0)),
            original_perplexity=math.exp(min(original_nll / tokens, 700.0)),
            kl=kl / tokens,
            top1_agreement=agree / tokens,
        )


class Speed(_Data):
    """What a whole model took, and the original in the same minutes on the same machine.

    Tokens a second: `prefill` of one forward over a block, `decode` of one token at a time with a cache; the median of
    the repeats, as are the ratios, model over original within a repeat. `peak_memory_bytes`: what the model holds plus
    the most that a forward over the block had allocated on top.
    """

    device: str
    dtype: str
    threads: int
    prompt_tokens: int
    decoded_tokens: int
    repeats: int
    prefill: float
    decode: float
    original_prefill: float
    original_decode: float
    prefill_ratio: float
    decode_ratio: float
    peak_memory_bytes: int
    original_peak_memory_bytes: int


class WorstBlock(_Data):
    """A block of the test text on which a model strays far from its original."""

    source: str
    block: int  # position in the drawn blocks
    kl: float  # mean over the block, nats a token
    perplexity: float
    original_perplexity: float


class Example(_Data):
    """How the original and the model go on, greedily, after the first half of a bad block."""

    source: str
    block: int
    kl: float
    prompt: str
    actual: str
    original: str
    model: str


class Record(_Data):
    """One method at one ratio with the calibration of one seed, or why there is none.

    Attributes:
        name: of its files.
        label: the method as it was asked for, `reap` or `reap:constant`.
        method, kind, options: what the label says; kind is what the experts became (several joined by `+`).
        ratio: share of the bytes in routed experts to save; the budget follows from it.
        seed: of the calibration, and of a method's own draws.
        skipped: why there are no figures; None where there are.
        budget_bytes: what the tensors may take.
        bytes: what they take.
        params: total, routed and active (what a token passes through, measured on the test text).
        sources: figures by source of test text, those of all under "all".
        perplexity, kl, top1_agreement: those of "all".
        tasks: lm-eval's results by task and metric.
        speed: measured for one seed only.
        worst: blocks of the largest KL, worst first.
        examples: continuations of some of these.
        sequential: the statistics were taken from the model compressed so far.
        stats, plan: file names in the folder.
        seconds: what planning and evaluating took.
        notes: what a reader of the figures should know.
    """

    name: str
    label: str
    method: str
    kind: str
    options: dict[str, str] = {}
    ratio: float
    seed: int
    skipped: str | None = None
    budget_bytes: int
    bytes: int | None = None
    params: dict[str, int] | None = None
    sources: dict[str, SourceFigures] = {}
    perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    tasks: dict[str, dict[str, float | None]] = {}
    speed: Speed | None = None
    worst: list[WorstBlock] = []
    examples: list[Example] = []
    sequential: bool = False
    stats: str | None = None
    plan: str | None = None
    seconds: float = 0.0
    notes: list[str] = []


class Original(_Data):
    """Figures of the original: of the text, its size, and what lm-eval says of it."""

    bytes: int
    params: dict[str, int]
    tokens: dict[str, int]  # predicted, by source
    perplexity: dict[str, float]  # by source
    tasks: dict[str, dict[str, float | None]] = {}


class ResultSet(_Data):
    """Everything that one comparison found.

    Attributes:
        model: the original's facts.
        original: its figures.
        settings: those of the last call, and what identifies the text: `digest` of the test tokens, `blocks` by source.
        results: the records, by method as first asked for, ratio, seed.
        commands: calls that made or extended this, as typed.
        notes: about the text.
    """

    format: int = FORMAT
    understudy: str
    model: ModelFacts
    original: Original
    settings: dict[str, Any]
    results: list[Record] = []
    commands: list[str] = []
    notes: list[str] = []


def record_name(label: str, ratio: float, seed: int) -> str:
    """Return the name of a record's files: `reap-constant-0.25-seed0`."""
    plain = "".join(c if c.isalnum() or c in "._" else "-" for c in label)
    return f"{plain}-{ratio:g}-seed{seed}"


def load_results(folder: str | os.PathLike[str]) -> ResultSet:
    """Read the results of a comparison.

    Raises:
        UnderstudyError: there are none, or they cannot be read.
    """
    file = Path(folder) / RESULTS
    if not file.is_file():
        raise UnderstudyError(f"{folder}: holds no {RESULTS}; `understudy compare` writes one")
    return _read(file, ResultSet)


def load_records(folder: Path) -> list[Record]:
    """Read every finished record of a folder, in no particular order.

    Raises:
        UnderstudyError: one of them cannot be read.
    """
    return [_read(file, Record) for file in sorted((folder / RECORDS).glob("*.json"))]


def save_record(record: Record, folder: Path) -> None:
    """Write one record, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    _write(folder / RECORDS / f"{record.name}.json", record.model_dump_json(indent=1) + "\n")


def save_results(results: ResultSet, folder: Path) -> None:
    """Write `results.json`, `results.csv` and `results.md`.

    Raises:
        OutputError: they cannot be written.
    """
    _write(folder / RESULTS, results.model_dump_json(indent=1) + "\n")
    _write(folder / TABLE, as_csv(results.results))
    _write(folder / MARKDOWN, as_markdown(results))


def as_csv(records: Iterable[Record]) -> str:
    """Return the figures as comma-separated values, a row a record; what was not measured is empty."""
    records = list(records)
    sources = sorted({name for record in records for name in record.sources} - {ALL})
    tasks = sorted({(t, m) for record in records for t, metrics in record.tasks.items() for m in metrics})
    plain = ("label", "method", "kind", "ratio", "seed", "budget_bytes", "bytes")
    quality, speed = ("perplexity", "kl", "top1_agreement"), ("peak_memory_bytes", "prefill", "decode")
    head = [*plain, "params_total", "params_routed", "params_active", *quality]
    head += [f"{figure}:{name}" for name in sources for figure in quality]
    head += [*speed, "prefill_ratio", "decode_ratio", *(f"{t}:{m}" for t, m in tasks), "skipped"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for record in records:
        row: list[Any] = [getattr(record, name) for name in plain]
        row += [(record.params or {}).get(name) for name in ("total", "routed", "active")]
        row += [getattr(record, figure) for figure in quality]
        row += [getattr(record.sources.get(name), figure, None) for name in sources for figure in quality]
        row += [getattr(record.speed, name, None) for name in (*speed, "prefill_ratio", "decode_ratio")]
        row += [record.tasks.get(task, {}).get(metric) for task, metric in tasks]
        writer.writerow([*row, record.skipped])
    return text.getvalue()


def _read(file: Path, form: Any) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            raise UnderstudyError(f"{file}: results of format {data['format']}, this version reads {FORMAT}")
        return form.model_validate(data)
    except OSError as error:
        raise UnderstudyError(f"{file}: cannot be read ({reason(error)})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        why = " ".join(str(error).split())[:200]
        raise UnderstudyError(f"{file}: not results of `understudy compare`, or damaged ({why})") from None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)})") from None
