"""The page about a comparison: which methods lead at which size, which cannot be told apart, and what each lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from understudy.comparison import ALL, ResultSet, load_results
from understudy.errors import UnderstudyError
from understudy.reports import charts, parts, sight
from understudy.reports.markup import Child, Html, bar, by_value, document, folded, items, join, pairs, table, tag
from understudy.reports.ranks import Found, ratio_name, size_at, verdict
from understudy.reports.ranks import summary as summary_section
from understudy.reports.words import NATS, few, number, parameters, percent, size, spread
from understudy.summary import Summary, summarise

_FIGURES = (("kl", f"KL to the original, {NATS}"), ("perplexity", "perplexity"))


def page(path: Path, full: bool) -> tuple[Html, list[str]]:
    """Return the page about a comparison, and what it lacks; not `full` keeps maps and examples to leading methods.

    Raises:
        UnderstudyError: the results cannot be read, or no record is there yet.
    """
    results = load_results(path)
    if not any(record.skipped is None for record in results.results):
        why = next((f": {r.label} was skipped, {r.skipped}" for r in results.results), "")
        raise UnderstudyError(f"{path}: holds no finished record yet{why}; `understudy compare` goes on from there")
    summary = summarise(results)
    found = Found(path, results, summary, _leading(summary))
    sections: list[tuple[str, Child]] = [
        ("Summary", summary_section(results, summary)),
        ("Quality against size", _charts(found)),
        ("All methods", [_methods(found, ratio) for ratio in summary.ratios]),
        ("Damage by source of text", [_sources(found, ratio) for ratio in summary.ratios]),
        ("Damage by task", _tasks(found)),
        ("Worst examples", sight.examples(found, full)),
        ("What the plans did", sight.plans(found, full)),
        ("Memory and speed", sight.speed(found)),
        ("What was skipped or is special", _notes(results)),
        ("Provenance", _provenance(found)),
    ]
    title = f"Comparison of {few(len(summary.rows), 'method')} on {Path(results.model.source).name}"
    lead = tag("p", "The same model made smaller in several ways: which of them costs least, at which size.")
    return document(title, lead, sections), list(results.notes)


def _leading(summary: Summary) -> tuple[str, ...]:
    """Choose whom to show in colour: the best at each ratio, then those that follow at the middle one."""
    best = [label for label in summary.best.values() if label]
    there = [label for label, row in summary.rows.items() if any(cell.seeds for cell in row.values())]
    return tuple(dict.fromkeys([*best, *there]))[: charts.MOST]


# ---- charts and tables ------------------------------------------------------------------------------------------


def _charts(found: Found) -> Child:
    original = found.results.original
    return [
        charts.chart(name, title, title, (drawn := _series(found, name)), line, charts.described(drawn, unit))
        for (name, title), line, unit in zip(
            _FIGURES, (None, original.perplexity.get(ALL)), (NATS, "(dashed: the original)"), strict=True
        )
    ]


def _series(found: Found, figure: str) -> list[charts.Series]:
    rows = found.summary.rows
    order = [*found.leading, *(label for label in rows if label not in found.leading)]
    drawn = []
    for label in order:
        cells = [c for c in rows[label].values() if c.seeds and {figure, "bytes"} <= c.mean.keys()]
        usable = [c for c in cells if 0 < c.mean[figure] < math.inf]
        points = [charts.Point(c.mean["bytes"], c.mean[figure], c.sd.get(figure)) for c in usable]
        if points:
            drawn.append(charts.Series(label, points, label in found.leading))
    return drawn


def _methods(found: Found, ratio: float) -> Child:
    ranked = found.ranked(ratio)
    if not ranked:
        return None
    most = max(cell.mean["kl"] for _, cell in ranked) or 1.0
    head = [
        "method",
        f"KL, {NATS}",
        "perplexity",
        "top-1 agreement",
        "weights",
        "parameters active a token",
        "against the best",
    ]
    rows = []
    for label, cell in ranked:
        active = [r.params["active"] for r in found.records(label, ratio) if r.params]
        passed = sum(active) / max(len(active), 1)
        rows.append(
            (
                label,
                bar(spread(cell.mean["kl"], cell.sd.get("kl")), cell.mean["kl"] / most, long=True),
                spread(cell.mean.get("perplexity"), cell.sd.get("perplexity")),
                percent(cell.mean.get("top1_agreement")),
                by_value(size(round(cell.mean["bytes"])), cell.mean["bytes"]),
                by_value(parameters(round(passed)), passed) if active else "–",
                verdict(label, cell, found.summary.best[ratio]),
            )
        )
    title = f"{ratio_name(ratio)}: {size_at(found.results, ratio)}"
    return join(tag("h3", title), table(f"All methods, {title}", head, rows, sortable=True))


def _sources(found: Found, ratio: float) -> Child:
    ranked = found.ranked(ratio)
    names = [name for name in found.results.original.tokens if name != ALL]
    if not ranked or not names:
        return None
    kinds: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("kl", f"KL to the original, {NATS}", number),
        ("perplexity", "Perplexity", number),
        ("top1_agreement", "Top-1 agreement", percent),
    )
    shown = [_source_table(found, ratio, names, *kind) for kind in kinds]
    title = f"{ratio_name(ratio)}: {size_at(found.results, ratio)}"
    more = [
        folded(f"{kind[1]} by source, {ratio_name(ratio).lower()}", t)
        for kind, t in zip(kinds[1:], shown[1:], strict=True)
    ]
    first = join(tag("p", kinds[0][1], class_="muted"), shown[0])
    if ratio != found.middle:
        return join(tag("h3", title), folded(kinds[0][1], shown[0]), more)
    return join(tag("h3", title), first, more)


def _source_table(
    found: Found, ratio: float, names: Sequence[str], figure: str, title: str, write: Callable[[float], str]
) -> Html:
    """Show a figure by method and source, means over seeds; bars within each source, since sources differ."""
    values: dict[str, dict[str, float]] = {}
    for label, _ in found.ranked(ratio):
        records = found.records(label, ratio)
        values[label] = {
            name: sum(getattr(r.sources[name], figure) for r in records) / len(records)
            for name in names
            if all(name in r.sources for r in records)
        }
    most = {name: max((v[name] for v in values.values() if name in v), default=0.0) or 1.0 for name in names}
    rows: list[Sequence[Child]] = [
        (label, *(bar(write(v[name]), v[name] / most[name]) if name in v else "–" for name in names))
        for label, v in values.items()
    ]
    if figure == "perplexity":
        original = found.results.original.perplexity
        rows.insert(0, ("the original", *(bar(write(original[n]), original[n] / most[n]) for n in names)))
    return table(f"{title} by source, {ratio_name(ratio)}", ["method", *names], rows, sortable=True)


def _tasks(found: Found) -> Child:
    original = found.results.original.tasks
    columns = [(t, m) for t, metrics in original.items() for m in metrics if "_stderr" not in m]
    if not columns:
        return None
    parts_: list[Child] = [tag("p", "Means over the seeds, ± their standard deviation.", class_="muted")]
    for ratio in found.summary.ratios:
        rows: list[Sequence[Child]] = [("the original", *(number(original[t][m]) for t, m in columns))]
        for label, cell in found.ranked(ratio):
            values = [(cell.mean.get(f"{t}:{m}"), cell.sd.get(f"{t}:{m}")) for t, m in columns]
            rows.append((label, *(spread(mean, sd) for mean, sd in values)))
        head = ["method", *(f"{t}, {m}" for t, m in columns)]
        parts_ += [tag("h3", ratio_name(ratio)), table(f"Tasks, {ratio_name(ratio)}", head, rows, sortable=True)]
    return parts_


def _notes(results: ResultSet) -> Child:
    skipped = {(r.label, r.ratio): r.skipped for r in results.results if r.skipped}
    lines: list[Child] = [
        f"{label}, {ratio_name(ratio).lower()}: skipped, {why}" for (label, ratio), why in skipped.items()
    ]
    said: dict[str, list[str]] = {}
    for record in results.results:
        for note in record.notes:
            said.setdefault(note, []).append(record.label)
    lines += [f"{', '.join(dict.fromkeys(labels))}: {note}" for note, labels in said.items()]
    lines += list(results.notes)
    return items(lines) if lines else None


def _provenance(found: Found) -> Child:
    results = found.results
    rows = [
        ("model", results.model.source),
        ("fingerprint", results.model.fingerprint),
        ("family", results.model.family),
    ]
    for name, value in results.settings.items():
        if value not in (None, "", [], {}, (), False, "auto"):
            rows.append((_SETTINGS.get(name, name.replace("_", " ")), _plain(value)))
    seen: dict[str, str] = {}
    for record in results.results:
        if record.stats and record.stats not in seen and (plan := found.plan(record)) is not None and plan.stats:
            seen[record.stats] = plan.stats
    rows += [(f"hash of {name}", digest) for name, digest in sorted(seen.items())]
    rows.append(("Understudy", results.understudy))
    named = [(name, tag("code", value)) for name, value in rows]
    commands = [*results.commands, f"understudy report {found.folder}"]
    return join(pairs(named, class_="facts"), tag("h3", "To make it again"), parts.command_lines(commands))


_SETTINGS = {"digest": "digest of the test tokens", "blocks": "blocks of test text", "data": "calibration text"}
_SETTINGS |= {"test": "test text", "seq_len": "calibration, tokens in a block", "samples": "calibration, blocks"}
_SETTINGS |= {"test_seq_len": "test, tokens in a block", "test_samples": "test, blocks"}


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
