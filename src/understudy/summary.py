"""What a comparison sums up to: means over seeds, their spread, and which methods cannot be told from the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from understudy.comparison import Record, ResultSet

# Student's t, two-sided 95 %, by degrees of freedom; past the end nearly the normal's
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cell(_Data):
    """One method at one ratio over its seeds.

    Attributes:
        seeds: how many of them have figures.
        mean, sd: by figure (`kl`, `perplexity`, `top1_agreement`, `bytes`, and `task:metric`); the sd is over the
            seeds, with n - 1 below the line, None for one seed.
        tied: not told from the best at this ratio; None where one seed leaves that open.
        skipped: why there are no figures.
    """

    seeds: int
    mean: dict[str, float] = {}
    sd: dict[str, float | None] = {}
    tied: bool | None = None
    skipped: str | None = None


class Summary(_Data):
    """Means over seeds: `rows[label][ratio]`, the labels by KL at the middle ratio, lowest first."""

    ratios: list[float]
    rows: dict[str, dict[float, Cell]]
    best: dict[float, str | None]  # by ratio
    rule: str = (
        "tied with the best: the difference of mean KL is within Student's t (95 %) times its standard error over seeds"
    )


def summarise(results: ResultSet) -> Summary:
    """Sum up the records over their seeds, and say which methods cannot be told from the best at their ratio.

    A difference of two means counts as one where it exceeds t sqrt(p (1/a + 1/b)): p the pooled variance over the a and
    b seeds of the two, t Student's at 95 % with a + b - 2 degrees of freedom. With three seeds each that is 2.3 times
    the seed spread (sd), so what is smaller than the spread is never called a difference.
    """
    ratios = sorted({record.ratio for record in results.results})
    labels = list(dict.fromkeys(record.label for record in results.results))
    cells: dict[str, dict[float, Cell]] = {label: {} for label in labels}
    best: dict[float, str | None] = {}
    for ratio in ratios:
        groups = {label: [r for r in results.results if (r.label, r.ratio) == (label, ratio)] for label in labels}
        values = {label: [r.kl for r in group if r.kl is not None] for label, group in groups.items()}
        there = [label for label in labels if values[label]]
        best[ratio] = min(there, key=lambda label: _mean(values[label]), default=None)
        for label, group in groups.items():
            if group:
                reference = values[best[ratio] or label]
                cells[label][ratio] = _cell(group, differs(values[label], reference), label == best[ratio])
    middle = ratios[len(ratios) // 2] if ratios else 0.0

    def order(label: str) -> tuple[bool, float]:
        cell = cells[label].get(middle)
        return (cell is None or not cell.seeds, cell.mean["kl"] if cell is not None and cell.seeds else 0.0)

    return Summary(ratios=ratios, rows={label: cells[label] for label in sorted(labels, key=order)}, best=best)


def as_markdown(results: ResultSet) -> str:
    """Return the table of a comparison: what the methods left at each ratio, lowest KL at the middle ratio first."""
    summary = summarise(results)
    original = results.original
    lines = [
        f"KL(original || model) in nats a token, mean ± sd over calibration seeds, and perplexity (the original's is "
        f"{original.perplexity['all']:.4g}); * {summary.rule}.",
        "",
        "| method | " + " | ".join(f"KL at {at:.4g} | perplexity | MB" for at in summary.ratios) + " |",
        "|---|" + "---|---|---|" * len(summary.ratios),
    ]
    for label, row in summary.rows.items():
        cells = " | ".join(_markdown_cell(row.get(ratio)) for ratio in summary.ratios)
        lines.append(f"| `{label}` | {cells} |")
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None or not cell.seeds:
        return "skipped | | " if cell else " | | "
    kl, sd = cell.mean["kl"], cell.sd["kl"]
    spread = "" if sd is None else f" ± {sd:.2g}" if sd > 1e-9 else " ± 0"
    tied = " *" if cell.tied else ""
    return f"{kl:.3g}{spread}{tied} | {cell.mean['perplexity']:.4g} | {cell.mean['bytes'] / 1e6:.2f}"


def differs(a: Sequence[float], b: Sequence[float]) -> bool | None:
    """Whether the means of two samples differ by more than their spread explains; None where no spread is known."""
    freedom = len(a) + len(b) - 2
    if not a or not b or freedom < 1:
        return None
    pooled = (_squares(a) + _squares(b)) / freedom
    t = _T[freedom - 1] if freedom <= len(_T) else 2.0
    return abs(_mean(a) - _mean(b)) > t * math.sqrt(pooled * (1 / len(a) + 1 / len(b)))


def _cell(group: list[Record], differ: bool | None, best: bool) -> Cell:
    done = [record for record in group if record.skipped is None]
    if not done:
        return Cell(seeds=0, skipped=group[0].skipped)
    columns: dict[str, list[float]] = {}
    for record in done:
        figures: dict[str, float | None] = {
            name: getattr(record, name) for name in ("kl", "perplexity", "top1_agreement", "bytes")
        }
        figures |= {f"{t}:{m}": v for t, metrics in record.tasks.items() for m, v in metrics.items()}
        for name, value in figures.items():
            if value is not None:
                columns.setdefault(name, []).append(float(value))
    return Cell(
        seeds=len(done),
        mean={name: _mean(column) for name, column in columns.items()},
        sd={name: _sd(column) for name, column in columns.items()},
        tied=True if best else None if differ is None else not differ,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _squares(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _sd(values: Sequence[float]) -> float | None:
    return math.sqrt(_squares(values) / (len(values) - 1)) if len(values) > 1 else None
