"""Parts that reports of one model and of a comparison share: damage by source and task, examples, commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from understudy.comparison import Example
from understudy.reports.markup import Html, bar, by_value, folded, join, table, tag
from understudy.reports.words import NATS, change, number, percent

ALL = "all"
_TAIL = 420  # characters of a prompt that are shown at once
Tasks = Mapping[str, Mapping[str, "float | None"]]


@dataclass(frozen=True)
class Damage:
    """What a model lost on one source of text; None where it was not compared with an original."""

    source: str
    perplexity: float
    original: float | None = None
    kl: float | None = None
    top1: float | None = None


def damage_table(rows: Sequence[Damage]) -> Html:
    """Show damage by source, worst first and all text last, with small bars."""
    ranked = sorted(rows, key=lambda r: (r.source == ALL, -(r.kl or 0.0), r.source))
    most = max((r.kl or 0.0 for r in rows), default=0.0) or 1.0
    if all(r.kl is None for r in rows):
        plain = [(_source(r.source), number(r.perplexity)) for r in ranked]
        return table("Perplexity by source of text", ["source of text", "perplexity"], plain)
    head = [
        "source of text",
        f"KL to the original, {NATS}",
        "perplexity",
        "of the original",
        "change",
        "top-1 agreement",
    ]
    body = [
        (
            _source(r.source),
            bar(number(r.kl), (r.kl or 0.0) / most),
            number(r.perplexity),
            number(r.original),
            by_value(change(r.original, r.perplexity), r.perplexity / r.original) if r.original else "–",
            bar(percent(r.top1), r.top1 or 0.0),
        )
        for r in ranked
    ]
    return table("Damage by source of text", head, body, sortable=True)


def _source(name: str) -> str:
    return "all text" if name == ALL else name


def task_table(original: Tasks, model: Tasks) -> Html | None:
    """Show the results of tasks beside those of the original; None where there are none."""
    rows = []
    for task, metrics in model.items():
        for metric, value in metrics.items():
            if "_stderr" in metric or value is None:
                continue
            before = original.get(task, {}).get(metric)
            error = metrics.get(stderr_of(metric))
            cells = [
                number(before),
                number(value),
                "–" if before is None else f"{value - before:+.3g}".replace("-", "−"),
            ]
            rows.append((f"{task}, {metric}", *cells, "–" if error is None else f"± {number(error, 2)}"))
    if not rows:
        return None
    head = ["task, metric", "original", "this model", "difference", "standard error"]
    return table("Damage by task", head, rows, sortable=True)


def stderr_of(metric: str) -> str:
    """Return the name under which lm-eval keeps the standard error of a metric: `acc_norm,flexible`, `acc`."""
    name, comma, rest = metric.partition(",")
    return f"{name}_stderr{comma}{rest}"


def example(found: Example, opened: bool = True, level: int = 4) -> Html:
    """Show how the original and the model go on with a block, under a heading of some level."""
    pairs = zip(found.original, found.model, strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    agree = "from the first character on they differ" if not same else f"the first {same} characters are the same"
    if found.original == found.model:
        agree = "both write the same"
    tail = found.prompt[-_TAIL:]
    before = tag("pre", f"{'…' * (len(tail) < len(found.prompt))}{tail}")
    if len(tail) < len(found.prompt):
        before = join(before, folded("The whole prompt", tag("pre", found.prompt)))
    sides = [
        ("The original writes", found.original),
        ("This model writes", found.model),
        ("The text itself", found.actual),
    ]
    return tag(
        "div",
        tag(f"h{level}", f"{found.source}, block {found.block}: KL {number(found.kl)} {NATS}; {agree}"),
        folded("After this text", before, opened=opened),
        tag(
            "div",
            [tag("div", tag(f"h{level + 1}", name), tag("pre", said or "(nothing)")) for name, said in sides],
            class_="sides",
        ),
        class_="example",
    )


def command_lines(lines: Iterable[str]) -> Html:
    """Show what to type."""
    return tag("pre", "\n".join(lines), class_="lines", tabindex=0)


def notes(found: Iterable[str]) -> Html | None:
    """Show what a reader of the figures should know."""
    there = list(dict.fromkeys(found))
    return tag("ul", [tag("li", note) for note in there], class_="muted") if there else None
