"""Tables for people, made of the same plain data that `--json` prints; one function for each command."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from understudy.facts import format_bytes

Data = dict[str, Any]


def inspect(data: Data) -> RenderableType:
    """Show what a model is made of and what can be done with it."""
    bytes_, params = data["bytes"], data["params"]
    routed = f"{format_bytes(bytes_['routed'])} in routed experts, {format_bytes(bytes_['other'])} other"
    rows = [
        ("family", f"{data['family']} ({data['architecture']}), {data['dtype']}"),
        ("layers", f"{len(data['layers'])} MoE of {data['decoder_layers']}, {data['experts']} routed experts"),
        ("bytes", f"{format_bytes(bytes_['total'])}: {routed}; {format_bytes(bytes_['load'])} to load"),
        ("parameters", ", ".join(f"{_count(value)} {name}" for name, value in params.items())),
    ]
    layers = _table(["MoE layers", "experts", "stand-ins", "top-k", "groups", "hidden", "width", "shared experts"])
    names = ("experts", "stand_ins", "top_k", "groups", "hidden", "width", "shared")
    for keys, layer in _runs({k: [x[n] for n in names] for k, x in data["layers"].items()}):
        *numbers, shared = layer
        leaves = [name.rpartition(".")[2] for name in shared]
        layers.add_row(keys, *(_text(n) for n in numbers), ", ".join(leaves) or "none")
    kinds = _table(["kind", "possible", "at most", *(f"at {float(r):.0%}" for r in _ratios(data)), "why not"])
    for name, kind in data["kinds"].items():
        sizes = [_size(kind["expected"].get(r)) for r in _ratios(data)]
        most = f"{kind['most']:.1%}" if kind["possible"] else ""
        kinds.add_row(name, "yes" if kind["possible"] else "no", most, *sizes, kind["reason"] or "")
    found = Group(_pairs([("model", data["model"]), *rows]), layers, kinds)
    if data["has_stand_ins"]:
        return found
    vllm = f"no: {data['vllm']}" if data["vllm"] else "yes, where vLLM has a model class for the family"
    return Group(found, _pairs([("vLLM >= 0.33 reads constants", vllm)]))


def calibrate(data: Data) -> RenderableType:
    """Show what statistics were taken."""
    drawn = ", ".join(f"{name} {blocks}" for name, blocks in data["data"]["blocks"].items())
    text = f"{drawn} blocks of {data['data']['seq_len']} tokens" if drawn else "none; the weights alone were read"
    unseen = f", {sum(data['unseen'].values())} saw no token" if drawn else ""
    rows = [
        ("statistics", data["out"]),
        ("model", f"{data['model']} ({data['family']})"),
        ("text", text),
        ("experts", f"{data['experts']} in {data['layers']} layers{unseen}"),
    ]
    return _pairs(rows)


def plan(data: Data) -> RenderableType:
    """Show what was decided, and what it leads to."""
    before, after, load = data["source_bytes"], data["expected_bytes"], data["load_bytes"]
    rows = [
        ("plan", data["out"]),
        ("method", f"{data['method']} ({data['paper']})"),
        ("replaced", f"{_kinds(data['replaced'])} of {data['experts']} routed experts ({data['ratio']:.1%})"),
        ("bytes", f"{format_bytes(before)} now, {format_bytes(after)} on disk after, {format_bytes(load)} to load"),
    ]
    return Group(_pairs([*rows, *_notes(data)]), _layers(data["layers"]))


def show(data: Data) -> RenderableType:
    """Show a plan that was read."""
    rows = [
        ("method", data["method"]),
        ("model", f"{data['model']['source']} ({data['model']['family']}, {data['model']['fingerprint']})"),
        ("settings", ", ".join(f"{name}={value}" for name, value in data["recipe"].items()) or "none kept"),
        ("replaced", f"{_kinds(data['replaced'])} of {data['experts']} routed experts ({data['ratio']:.1%})"),
    ]
    table = _table(["layer", "experts", "kept", "kind", "replaced", "ids"])
    for key, layer in data["layers"].items():
        for kind, chosen in layer["replaced"].items() or [("", {"count": 0, "ids": []})]:
            ids = " ".join(map(str, chosen["ids"]))
            table.add_row(key, str(layer["experts"]), str(layer["kept"]), kind, str(chosen["count"]), ids)
    return Group(_pairs(rows), table)


def check(data: Data) -> RenderableType:
    """Show that a plan is sound, and what could not be checked."""
    rows = [("plan", "sound"), ("replaced", str(data["replaced"]))]
    if data["expected_bytes"] is not None:
        rows.append(("bytes after", format_bytes(data["expected_bytes"])))
    if data["unchecked"]:
        rows.append(("not checked", f"{', '.join(data['unchecked'])}; give --stats or --model"))
    return _pairs(rows)


def compare(data: Data) -> RenderableType:
    """Show what each method left at each ratio: mean over the seeds, their standard deviation, and bytes."""
    summary, original = data["summary"], data["original"]
    ratios = [f"{ratio}" for ratio in summary["ratios"]]
    heads = [f"{float(ratio):.4g}" for ratio in summary["ratios"]]
    quality = _table(["method", *(head for at in heads for head in (f"KL at {at}", "bytes"))])
    others = _table(["method", *(head for at in heads for head in (f"perplexity at {at}", "top-1"))])
    for label, row in summary["rows"].items():
        cells = [row.get(ratio) for ratio in ratios]
        quality.add_row(label, *(text for cell in cells for text in _quality(cell)))
        others.add_row(label, *(_spread(cell, figure) for cell in cells for figure in ("perplexity", "top1_agreement")))
    skipped = {r["label"]: r["skipped"] for r in data["results"] if r["skipped"]}
    rows = [
        ("original", f"perplexity {original['perplexity']['all']:.4f}, {format_bytes(original['bytes'])}"),
        ("KL", "KL(original || model), nats a token of held-out text; mean ± sd over calibrations, lowest KL first"),
        ("*", summary["rule"]),
        *((f"{label} skipped", reason) for label, reason in skipped.items()),
        ("results", f"{data['out']}: results.json, results.csv, results.md"),
    ]
    return Group(quality, others, _pairs(rows))


def _quality(cell: Data | None) -> tuple[str, str]:
    if cell is None or not cell["seeds"]:
        return "skipped" if cell else "", ""
    return f"{_spread(cell, 'kl')} {'*' if cell['tied'] else ' '}", format_bytes(round(cell["mean"]["bytes"]))


def _spread(cell: Data | None, figure: str) -> str:
    if cell is None or not cell["seeds"]:
        return ""
    sd = cell["sd"][figure]
    return f"{cell['mean'][figure]:.3g}" + (f" ± {sd:.1g}" if sd is not None else "")


def report(data: Data) -> RenderableType:
    """Show where the page is, and what it lacks."""
    about = {"model": "one compressed model", "comparison": "a comparison of methods"}[data["about"]]
    return _pairs([("report", f"{data['out']} ({about}, {format_bytes(data['bytes'])})"), *_notes(data)])


def several(plans: dict[str, Data], view: Callable[[Data], RenderableType]) -> RenderableType:
    """Show what is said of several plans, one after the other."""
    return Group(*(part for name, data in plans.items() for part in (Text(name, style="bold"), view(data))))


def diff(data: Data) -> RenderableType:
    """Show where two plans differ."""
    rows = [
        ("same model", "yes" if data["same_model"] else "no, the fingerprints differ"),
        ("agreement", f"{data['agreement']:.1%} of {data['experts']} experts, {data['changed']} differ"),
        ("overlap", f"{data['overlap']:.1%} of what either replaces"),
    ]
    table = _table(["layer", "first to second", "ids"])
    for key, moved in data["layers"].items():
        for change, group in itertools.groupby(sorted(moved, key=_change), key=_change):
            table.add_row(key, " to ".join(change), " ".join(str(m["expert"]) for m in group))
    return Group(_pairs(rows), table) if data["layers"] else _pairs(rows)


def apply(data: Data) -> RenderableType:
    """Show what was written."""
    before, after = data["source_bytes"], data["bytes"]
    rows = [
        ("model", data["out"]),
        ("bytes", f"{format_bytes(before)} before, {format_bytes(after)} after ({1 - after / before:.1%} less)"),
        ("loads in", data["loads"]),
    ]
    return _pairs([*rows, *_notes(data)])


def compress(data: Data) -> RenderableType:
    """Show what was decided and written."""
    ratio = data["replaced"] / data["experts"]
    replaced = f"{data['replaced']} of {data['experts']} routed experts ({ratio:.1%})"
    return Group(_pairs([("method", data["method"]), ("replaced", replaced)]), apply(data))


def recover(data: Data) -> RenderableType:
    """Show what was trained, and what came of it."""
    runs = _table(["end ratio", "loss held out", "perplexity", "KL to the teacher", "seconds", "peak memory", ""])
    for place, run in enumerate(data["runs"]):
        held, kept = run["held_out"], "kept" if place == data["chosen"] and len(data["runs"]) > 1 else ""
        peak = f"{format_bytes(run['peak_memory_bytes'])} {run['peak_memory_of']}"
        figures = [held["loss"], held["perplexity"], held.get("kd")]
        runs.add_row(_text(run["end_ratio"]), *map(_text, figures), f"{run['seconds']:.0f}", peak, kept)
    rows = [
        ("model", f"{data['out']}, {format_bytes(data['bytes'])}"),
        ("trained", f"{_count(data['trained'])} parameters: {data['train_what']}"),
    ]
    return Group(_pairs(rows), runs, _pairs(_notes(data)))


def evaluate(data: Data) -> RenderableType:
    """Show the figures of a model, beside those of its original where there is one."""
    against = data["against"]
    table = _table(["figure", *(["original"] if against else []), "model"])

    def row(name: str, value: Any, other: Any = None) -> None:
        table.add_row(name, *([_text(other)] if against else []), _text(value))

    for source, value in data["perplexity"].items():
        row(f"perplexity, {source}", value, against and against["perplexity"].get(source))
    if data["kl"] is not None:
        row("KL(original || model), nats a token", data["kl"])
        row("top-1 agreement", data["top1_agreement"])
    for task, metrics in data["tasks"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                row(f"{task}, {metric}", value, against and against["tasks"].get(task, {}).get(metric))
    row("bytes", format_bytes(data["bytes"]), against and format_bytes(against["bytes"]))
    for name, value in data["params"].items():
        row(f"parameters, {name}", _count(value), against and _count(against["params"][name]))
    return Group(table, _pairs(_notes(data))) if data["notes"] else table


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    words = {"kind", "ids", "why not", "shared experts", "first to second"}
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column in words else "right", overflow="fold")
    return table


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _layers(layers: dict[str, Any]) -> Table:
    table = _table(["layer", "experts", "kept", "kind", "replaced"])
    rows = {key: [x["experts"], x["kept"], x["replaced"]] for key, x in layers.items()}
    for keys, (experts, kept, replaced) in _runs(rows):
        for kind, count in replaced.items() or [("", 0)]:
            table.add_row(keys, str(experts), str(kept), kind, str(count))
    return table


def _runs(layers: dict[str, Any]) -> list[tuple[str, Any]]:
    """Join neighbours that are alike: sixty equal lines are hard to read."""
    runs = []
    for value, group in itertools.groupby(layers.items(), key=lambda item: item[1]):
        keys = [key for key, _ in group]
        runs.append((keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]} ({len(keys)})", value))
    return runs


def _ratios(data: Data) -> list[str]:
    return sorted({ratio for kind in data["kinds"].values() for ratio in kind["expected"]})


def _size(expected: dict[str, int] | None) -> str:
    return format_bytes(expected["disk"]) if expected else ""


def _kinds(replaced: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in replaced.items()) or "0"


def _notes(data: Data) -> list[tuple[str, str]]:
    return [("note", note) for note in data["notes"]]


def _change(moved: dict[str, Any]) -> tuple[str, str]:
    return moved["from"], moved["to"]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
