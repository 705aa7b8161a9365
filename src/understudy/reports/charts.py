"""Charts of quality against bytes, drawn by matplotlib as vector graphics that take the page's colours and fonts."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from understudy.errors import DependencyError
from understudy.reports.markup import Html, printable, tag, text
from understudy.reports.words import number

MOST = 6  # series that get a colour of their own
_MARKS = "osD^vP"
_SERIES = "series-"  # with its number, the id under which a series is drawn
_LONGEST = 24  # characters of a name in a chart
# Colours that stand for the page's own; matplotlib writes them as they are, and they are exchanged afterwards.
_COLOURS = {"ink": "#0a0b01", "muted": "#0a0b02", "line": "#0a0b03", "paper": "#0a0b04", "rest": "#0a0b05"}
_COLOURS |= {f"c{i}": f"#0a0b1{i}" for i in range(MOST)}


@dataclass(frozen=True)
class Point:
    """One method at one size: bytes, a figure, and its standard deviation where there are several seeds."""

    nbytes: float
    value: float
    sd: float | None


@dataclass(frozen=True)
class Series:
    """The points of one method; a leading one is drawn in a colour and named beside its first point."""

    name: str
    points: Sequence[Point]
    leads: bool


def chart(key: str, title: str, unit: str, series: Sequence[Series], original: float | None, described: str) -> Html:
    """Draw a figure against bytes, both for wide and for narrow screens; the page shows one of them.

    Args:
        key: what tells the ids of this chart from those of others.
        title: what is drawn.
        unit: of the figure.
        series: every method; the leading ones first get a colour, as far as colours go.
        original: the figure of the original, drawn as a line.
        described: what is to be seen, for those who cannot see it.

    Raises:
        DependencyError: matplotlib is missing.
    """
    wide = _drawn(f"{key}-w", (10.6, 5.6), unit, series, original)
    narrow = _drawn(f"{key}-n", (5.0, 5.6), unit, series, original)
    names = [s.name for s in series]
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), f" – {described}"),
        tag(
            "div",
            _inline(wide, f"{key}-w", title, "wide", names),
            _inline(narrow, f"{key}-n", title, "narrow", names),
            class_="chart",
        ),
    )


def _drawn(key: str, inches: tuple[float, float], unit: str, series: Sequence[Series], original: float | None) -> str:
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError("charts need matplotlib: pip install understudy[report]") from None
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 11, "axes.unicode_minus": True}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the font has not; the page's font draws them
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        colours = _plot(axes, series, original)
        _scale(axes, series, unit, inches[0])
        _name(axes, series, colours, inches[1])
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def _plot(axes: Any, series: Sequence[Series], original: float | None) -> dict[str, str]:
    """Draw the points, the leading series last; return the colours of those."""
    leading = [s.name for s in series if s.leads][:MOST]
    colours = {name: _COLOURS[f"c{i}"] for i, name in enumerate(leading)}
    if original is not None:
        axes.axhline(original, color=_COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for i, s in sorted(enumerate(series), key=lambda pair: pair[1].name in colours):
        points = sorted(s.points, key=lambda p: p.nbytes)
        lead = s.name in colours
        line, *_ = axes.errorbar(
            [p.nbytes for p in points],
            [p.value for p in points],
            yerr=_errors(points),
            color=colours.get(s.name, _COLOURS["rest"]),
            marker=_MARKS[leading.index(s.name)] if lead else ".",
            markersize=7 if lead else 5,
            linewidth=2 if lead else 1,
            elinewidth=1.4 if lead else 0.8,
            capsize=4 if lead else 2,
            alpha=1.0 if lead else 0.75,
            zorder=3 if lead else 2,
        )
        line.set_gid(f"{_SERIES}{i}")
    return colours


def _errors(points: Sequence[Point]) -> Any:
    """One standard deviation either way; on a logarithmic axis the lower end stays above zero."""
    if all(p.sd is None for p in points):
        return None
    up = [p.sd or 0.0 for p in points]
    return [[min(sd, 0.9 * p.value) for sd, p in zip(up, points, strict=True)], up]


def _scale(axes: Any, series: Sequence[Series], unit: str, inches: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from understudy.facts import format_bytes

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([v for v in _steps(low, high) if low <= v <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    sizes = [p.nbytes for s in series for p in s.points]
    left, right = min(sizes), max(sizes)
    if right - left < 0.1 * right:  # one size, to the byte or nearly so
        left, right = left - 0.05 * right, right + 0.05 * right
    width = right - left
    longest = max((len(s.name) for s in series if s.leads), default=0)
    room = min(6.6 * min(longest, _LONGEST) + 24, 200) / (72 * inches * 0.82)  # of the axes, for names
    axes.set_xlim(left - width * room / (1 - room), right + 0.05 * width)
    axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(set(sizes)), width)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
    axes.set_xlabel("size of the weights", color=_COLOURS["muted"])
    axes.set_ylabel(unit, color=_COLOURS["muted"])
    axes.grid(axis="y", color=_COLOURS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_COLOURS["muted"], length=0, pad=6)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_COLOURS["line"])
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def _steps(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2, 5 of each power of ten, or evenly spaced where it spans less."""
    low = max(low, 1e-12)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(powers) > 5:
        return [10.0**p for p in powers]
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(found) > 2:
        return found
    step = 10.0 ** math.floor(math.log10((high - low) or low))
    step = step if (high - low) / step > 3 else step / 4
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(values: Sequence[float], width: float) -> list[float]:
    """Of sizes that lie close together, one."""
    shown: list[float] = []
    for value in values:
        if not shown or value - shown[-1] > 0.12 * width:
            shown.append(value)
    return shown


def _name(axes: Any, series: Sequence[Series], colours: dict[str, str], height: float) -> None:
    """Write the names of leading series left of their first points, as far apart as letters are high."""
    first = {s.name: min(s.points, key=lambda p: p.nbytes) for s in series if s.name in colours and s.points}
    low, high = (math.log10(v) for v in axes.get_ylim())
    places = {name: (math.log10(point.value) - low) / (high - low) for name, point in first.items()}
    gap = 16 / (72 * height * 0.86)
    spots = _spread([places[name] for name in sorted(places, key=places.__getitem__)], gap)
    for name, spot in zip(sorted(places, key=places.__getitem__), spots, strict=True):
        axes.annotate(
            printable(name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"),
            xy=(first[name].nbytes, first[name].value),
            xytext=(0.01, spot),
            textcoords="axes fraction",
            color=colours[name],
            va="center",
            ha="left",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.7, "alpha": 0.6, "shrinkB": 5},
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move ascending places apart to at least `gap`, between 0 and 1, as little as it takes."""
    spots = list(wanted)
    for i in range(1, len(spots)):
        spots[i] = max(spots[i], spots[i - 1] + gap)
    if spots and spots[-1] > 1 - gap / 2:
        spots[-1] = 1 - gap / 2
        for i in range(len(spots) - 2, -1, -1):
            spots[i] = min(spots[i], spots[i + 1] - gap)
    return spots


def _inline(svg: str, key: str, title: str, width: str, names: Sequence[str]) -> Html:
    """Make matplotlib's file a part of the page: page colours, ids of its own, no style that reaches beyond it."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)  # they repeat what is drawn as text
    body = re.sub(f'<g id="{_SERIES}([0-9]+)">', lambda m: f"<g><title>{text(names[int(m[1])])}</title>", body)
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"', body)
    body = re.sub(r'(xlink:href="|url\()#', lambda m: f"{m[1]}#{key}-", body).replace("xlink:href", "href")
    body = re.sub(r"font: ?([0-9.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: ?[^;\"]*;?", "", body)
    for name, colour in _COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    view = re.search(r'viewBox="([^"]*)"', body)
    assert view is not None
    head = f'<svg class="{width}" viewBox="{view[1]}" role="img" aria-label="{text(title)}">'
    return Html(head + re.sub(r"^<svg[^>]*>", "", body).strip())


def described(series: Sequence[Series], unit: str) -> str:
    """Say what a chart shows: how many methods, and between which figures."""
    values = [p.value for s in series for p in s.points]
    leads = sum(s.leads for s in series)
    spread = any(p.sd is not None for s in series for p in s.points)
    bars = "Bars are one standard deviation over the seeds" if spread else "One seed, so there are no error bars"
    rest = f"; the other {len(series) - leads} are grey, and in the tables below" if leads < len(series) else ""
    return (
        f"lower is better, the axis is logarithmic; from {number(min(values))} to {number(max(values))} {unit}. "
        f"{bars}{rest}."
    )
