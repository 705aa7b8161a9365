"""HTML from Python calls: text is escaped where it enters, so what files and models say can never become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import count
from typing import TypeAlias

from understudy._version import __version__

_VOID = {"br", "col", "meta"}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
Child: TypeAlias = "str | Iterable[Child] | None"


class Html(str):
    """Text that is markup already; any other text is escaped."""


def text(value: str) -> Html:
    """Return text as markup: escaped, and with a mark for what cannot be printed."""
    return value if isinstance(value, Html) else Html(html.escape(printable(value), quote=True))


def printable(value: str) -> str:
    """Return text with a mark in place of each control character and half of a surrogate pair."""
    return _UNPRINTABLE.sub("\ufffd", value)


def join(*children: Child) -> Html:
    """Put pieces one after the other; nested lists are flattened, None is nothing."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, str):
            parts.append(text(child))
        elif child is not None:
            parts.append(join(*child))
    return Html("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """Return an element; `class_` is the attribute class, `aria_label` is aria-label, None and False leave one out."""
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        given.append(f" {key}" if value is True else f' {key}="{text(str(value))}"')
    if name in _VOID:
        return Html(f"<{name}{''.join(given)}>")
    return Html(f"<{name}{''.join(given)}>{join(*children)}</{name}>")


def bar(value: str, share: float, long: bool = False) -> Html:
    """Return a table cell with a bar of some share of the room beside the figure, 0 to 1; `long` figures need more."""
    return tag("td", value, class_="bar long" if long else "bar", style=f"--share:{min(max(share, 0.0), 1.0):.3f}")


def by_value(shown: str, value: float | None) -> Html:
    """Return a table cell that sorts by another figure than it shows, as 990 KB and 1.01 MB do by bytes."""
    return tag("td", shown, data_value=value)


def table(label: str, head: Sequence[Child], rows: Iterable[Sequence[Child]], *, sortable: bool = False) -> Html:
    """Return a table in a box that scrolls sideways; the first cell of a row heads it, cells may be `td` already."""
    heads = [tag("th", name, scope="col") for name in head]
    body = []
    for first, *others in rows:
        cells = [c if isinstance(c, Html) and c.startswith("<td") else tag("td", c) for c in others]
        body.append(tag("tr", tag("th", first, scope="row"), cells))
    shown = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), class_="sortable" if sortable else None)
    return scrolling(label, shown)


def scrolling(label: str, *children: Child) -> Html:
    """Return a box for what may be wider than a phone; it can be scrolled with the keyboard, too."""
    return tag("div", children, class_="scroll", tabindex=0, role="region", aria_label=label)


def pairs(rows: Iterable[tuple[Child, Child]], class_: str | None = None) -> Html:
    """Return names with what they stand for; rows without a value are left out."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows if value], class_=class_)


def items(children: Iterable[Child]) -> Html:
    """Return a list of points."""
    return tag("ul", [tag("li", child) for child in children])


def folded(summary: Child, *children: Child, opened: bool = False) -> Html:
    """Return something that is shown when its line is clicked."""
    return tag("details", tag("summary", summary), children, open=opened)


def document(title: str, lead: Child, sections: Iterable[tuple[str, Child]]) -> Html:
    """Return the page: a heading, what leads it, and sections with a list of them; empty ones are left out."""
    numbers = count(1)
    there = [(f"s{next(numbers)}", name, body) for name, content in sections if (body := join(content))]
    contents = tag("nav", [tag("a", name, href=f"#{key}") for key, name, _ in there], aria_label="Contents")
    main = [
        tag("section", tag("h2", name, id=f"{key}-h"), body, id=key, aria_labelledby=f"{key}-h")
        for key, name, body in there
    ]
    footer = tag("footer", f"Written by Understudy {__version__}. This page is complete in itself and loads nothing.")
    files = resources.files(__package__)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html((files / "page.css").read_text(encoding="utf-8"))),
    )
    script = tag("script", Html((files / "page.js").read_text(encoding="utf-8")))
    body = tag("body", tag("header", tag("h1", title), lead), contents, tag("main", main), footer, script)
    return Html("<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n")
