"""Heat maps of layers x experts: how often experts are used, how they score, and what the plan made of them.

Cells of the same shade are one path, so a map of twenty thousand experts stays small, and the page's colours decide
what the shades look like. Letters: L layers, E experts.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from understudy.entries import OVERLAYS, Entry, ids_of
from understudy.kinds import all_kinds
from understudy.plans import Plan
from understudy.reports.markup import Html, folded, scrolling, table, tag
from understudy.reports.words import few, number
from understudy.sums import RANKS

KIND_COLOURS = {"constant": 0, "drop": 1, "merge": 2, "slim": 3, "layer_drop": 4, "block_drop": 5}
_USE = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # bounds of shades, in shares of an even split
_SEPARATE = 3000  # cells up to which each is outlined, and groups are named
_WIDTH_STEPS = 5


def frequency(counts: Mapping[str, np.ndarray]) -> Html:
    """Map how many routes each expert got, `[E]` by layer, against an even split among the experts of its layer."""
    shares = {key: c * len(c) / c.sum() if c.sum() else np.zeros(len(c)) for key, c in counts.items()}
    levels = {key: [bisect.bisect_right(_USE, x) for x in share] for key, share in shares.items()}
    names = [
        f"below {_USE[0]:g}×",
        *(f"{a:g}–{b:g}×" for a, b in pairwise(_USE)),
        f"from {_USE[-1]:g}×",
    ]
    unseen = sum(int((c == 0).sum()) for c in counts.values())
    most = max(float(share.max()) for share in shares.values())
    caption = (
        f"Shade: routes of an expert in the calibration text, as a multiple of an even split in its layer. The busiest "
        f"expert gets {number(most)} times its even share; {few(unseen, 'expert')} saw no token."
    )
    return _shaded("How often experts are used", caption, levels, names)


def scores(name: str, source: str, values: Mapping[str, np.ndarray], because: str) -> Html:
    """Map a score `[E]` by layer, each layer from its lowest to its highest."""
    levels = {}
    for key, v in values.items():
        low, high = min(float(v.min()), 0.0), float(v.max())
        levels[key] = [min(int(9 * (x - low) / (high - low)), 8) if high > low else 0 for x in v]
    names = [f"{round(100 * i / 9)}–{round(100 * (i + 1) / 9)}%" for i in range(9)]
    caption = f"Shade: {name} ({source}) as a share of the highest in the layer; higher is kept. {because}"
    return _shaded("Scores of experts", caption, levels, names)


def plan_map(plan: Plan, widths: Mapping[str, int | None]) -> Html:
    """Map what each expert became; `widths` are neurons of an expert by layer, None where they are not known."""
    layers = list(plan.model.experts)
    columns = max(plan.model.experts.values())
    cells: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    groups: list[Html] = []
    firsts: list[tuple[int, int]] = []
    named = len(layers) * columns <= _SEPARATE
    kinds: dict[str, int] = {}
    for row, key in enumerate(layers):
        cells["kept", "kept as it was"] += [(i, row) for i in plan.kept(key, plan.model.experts[key])]
        for kind, entry in _replacing(plan, key).items():
            kinds[kind] = kinds.get(kind, 0) + len(ids_of(entry))
            colour = f"c{_colour(kind)}"
            if isinstance(entry, dict) and _for_all_tokens(kind):
                for i, weight in entry.items():
                    label = "answers every token" if weight else "removed"
                    cells[f"{colour} o{1 if weight else _WIDTH_STEPS}", f"{kind}: {label}"].append((i, row))
            elif isinstance(entry, dict) and counts_ranks(kind):
                for i, rank in entry.items():
                    step = min(int(_WIDTH_STEPS * (rank - 1) / RANKS), _WIDTH_STEPS - 1)
                    cells[f"{colour} o{_WIDTH_STEPS - step}", f"{kind}: rank {rank}"].append((i, row))
            elif isinstance(entry, dict):
                full = widths.get(key) or max(entry.values()) or 1
                for i, width in entry.items():
                    step = min(int(_WIDTH_STEPS * width / full), _WIDTH_STEPS - 1)
                    label = (
                        f"{kind}: {100 * step // _WIDTH_STEPS}–{100 * (step + 1) // _WIDTH_STEPS}% of its neurons kept"
                    )
                    cells[f"{colour} o{_WIDTH_STEPS - step}", label].append((i, row))
            elif entry and isinstance(entry[0], tuple):
                for turn, group in enumerate(entry):
                    assert isinstance(group, tuple)
                    label = (
                        f"{kind}: layer {key}, experts {', '.join(map(str, sorted(group)))} share one, under {group[0]}"
                    )
                    shade = f"{colour} o{5 - turn % 3}"
                    if named:
                        groups.append(_path([(i, row) for i in group], shade, label))
                    else:
                        cells[shade, f"{kind}: shares one with others"] += [(i, row) for i in group]
                    firsts.append((group[0], row))
            else:
                cells[colour, kind] += [(i, row) for i in ids_of(entry)]
    paths = [_path(places, style, label) for (style, label), places in cells.items() if places]
    if firsts and named:
        paths += [*groups, _path(firsts, "dot", "the expert whose id the group goes by", size=0.36)]
    else:
        paths += groups
    total = sum(plan.model.experts.values())
    said = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items()) or "nothing"
    caption = (
        f"Colour: what became of each of the {total:,} routed experts ({said}; {total - sum(kinds.values()):,} kept)."
    )
    grid = _grid("What the plan did", f"{caption}", layers, columns, paths)
    legend = [_sample("kept", "kept"), *_legend(plan)]
    return _figure("What the plan did", caption, grid, tag("ul", legend, class_="legend"))


def layer_table(plan: Plan, counts: Mapping[str, np.ndarray] | None) -> Html:
    """List by layer what the maps show: experts kept and replaced, and how evenly they are used."""
    kinds = sorted({kind for entry in plan.layers.values() for kind in entry})
    head = ["layer", "experts", "kept", *kinds]
    if counts:
        head += ["unseen", "busiest, × even"]
    rows = []
    for key, experts in plan.model.experts.items():
        listed = plan.layers.get(key, {})
        row = [key, str(experts), str(len(plan.kept(key, experts)))]
        row += [_entry(kind, listed[kind]) if kind in listed else "0" for kind in kinds]
        if counts:
            c = counts[key]
            row += [str(int((c == 0).sum())), number(float(c.max() * len(c) / c.sum())) if c.sum() else "–"]
        rows.append(row)
    text = "\n".join(line for line in plan.text().splitlines() if not line.startswith("#"))
    return Html(
        folded("The same, by layer, as a table", table("What the plan did, by layer", head, rows))
        + folded("The plan itself", tag("pre", text, class_="lines", tabindex=0))
    )


def _replacing(plan: Plan, key: str) -> dict[str, Entry]:
    """Return what a layer's experts become, without what lies over all of them."""
    return {kind: entry for kind, entry in plan.layers.get(key, {}).items() if kind not in OVERLAYS}


def _for_all_tokens(kind: str) -> bool:
    """Whether the numbers of a kind are constants that answers are multiplied by, not neurons."""
    return kind in all_kinds() and not all_kinds()[kind].whole_numbers


def counts_ranks(kind: str) -> bool:
    """Whether the numbers of a kind are ranks, not neurons."""
    return kind in all_kinds() and all_kinds()[kind].counts == "ranks"


def _entry(kind: str, entry: Entry) -> str:
    if isinstance(entry, dict) and _for_all_tokens(kind):
        return f"{len(entry)} ({sum(1 for weight in entry.values() if weight)} answer every token)"
    if isinstance(entry, dict):
        mean = number(sum(entry.values()) / len(entry))
        return f"{len(entry)} ({f'of rank {mean}' if counts_ranks(kind) else f'to {mean} neurons'} on average)"
    if entry and isinstance(entry[0], tuple):
        return f"{len(ids_of(entry))} in {few(len(entry), 'group')}"
    return str(len(entry))


def _legend(plan: Plan) -> list[Html]:
    found: dict[str, Html] = {}
    for key in plan.layers:
        for kind, entry in _replacing(plan, key).items():
            colour = f"c{_colour(kind)}"
            if isinstance(entry, dict) and _for_all_tokens(kind):
                found[kind] = _sample(f"{colour} o1", f"{kind}: pale where an expert answers every token, else removed")
            elif isinstance(entry, dict):
                fewer = "the lower the rank" if counts_ranks(kind) else "the fewer neurons are left"
                found[kind] = _sample(f"{colour} o3", f"{kind}: the stronger, {fewer}")
            elif entry and isinstance(entry[0], tuple):
                found[kind] = _sample(colour, f"{kind}: a group in one shade; a dot marks the one that it goes by")
            else:
                found[kind] = _sample(colour, kind)
    return list(found.values())


def _colour(kind: str) -> int:
    return KIND_COLOURS.get(kind, sum(map(ord, kind)) % 6)


def _shaded(title: str, caption: str, levels: Mapping[str, Sequence[int]], names: Sequence[str]) -> Html:
    cells: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, key in enumerate(levels):
        for column, level in enumerate(levels[key]):
            cells[level].append((column, row))
    paths = [_path(cells[level], f"q{level}", names[level]) for level in sorted(cells)]
    grid = _grid(title, caption, list(levels), max(map(len, levels.values())), paths)
    legend = [tag("li", tag("i", style=f"background:var(--q{i})"), name) for i, name in enumerate(names)]
    return _figure(title, caption, grid, tag("ul", legend, class_="legend steps"))


def _figure(title: str, caption: str, grid: Html, legend: Html) -> Html:
    return tag("figure", tag("figcaption", tag("strong", title), f" – {caption}"), scrolling(title, grid), legend)


def _sample(style: str, name: str) -> Html:
    first, *more = style.split()
    opacity = {"o1": 0.28, "o2": 0.46, "o3": 0.64, "o4": 0.82}.get(more[0], 1) if more else 1
    return tag("li", tag("i", style=f"background:var(--{first});opacity:{opacity}"), name)


def _path(places: Sequence[tuple[int, int]], style: str, label: str, size: float = 1.0) -> Html:
    """Draw cells (column, row) as one shape; runs of neighbours become one rectangle where cells are many."""
    off = (1 - size) / 2
    if size < 1 or len(places) < 400:
        drawn = [f"M{x + off:g} {y + off:g}h{size:g}v{size:g}h-{size:g}z" for x, y in places]
    else:
        drawn, runs = [], sorted((y, x) for x, y in places)
        start = 0
        for i in range(1, len(runs) + 1):
            if i == len(runs) or runs[i] != (runs[i - 1][0], runs[i - 1][1] + 1):
                y, x = runs[start]
                drawn.append(f"M{x} {y}h{i - start}v1h-{i - start}z")
                start = i
    return tag("path", tag("title", label), class_=style, d="".join(drawn))


def _grid(title: str, caption: str, layers: Sequence[str], columns: int, paths: Sequence[Html]) -> Html:
    """Put layer and expert numbers around the cells; letters keep their size when the cells are stretched."""
    height = min(max(360 // len(layers), 6), 24)
    every = -(-12 // height)  # one label in so many rows, so that they do not touch
    rows = [tag("span", key if i % every == 0 else "") for i, key in enumerate(layers)]
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 10**9) if columns / s <= 16)
    names = [tag("span", str(i), style=f"left:{100 * (i + 0.5) / columns:.2f}%") for i in range(0, columns, step)]
    drawing = tag(
        "svg",
        paths,
        role="img",
        aria_label=f"{title}: {len(layers)} layers (rows) by {columns} experts (columns). {caption}",
        viewBox=f"0 0 {columns} {len(layers)}",
        preserveAspectRatio="none",
        style=f"height:{height * len(layers)}px",
        class_="cells fine" if len(layers) * columns <= _SEPARATE else "cells",
    )
    style = f"--least:{3 * columns + 40}px;--most:{34 * columns + 40}px"
    sizes = f"grid-template-rows:repeat({len(layers)},{height}px)"
    return tag(
        "div",
        tag("div", rows, class_="rows", style=sizes, aria_hidden="true"),
        drawing,
        tag("div", names, class_="columns", aria_hidden="true"),
        class_="map",
        style=style,
    )
