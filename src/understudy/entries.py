"""What one layer of a plan lists under a kind: ids, groups of ids that share something, or ids with a number each.

Where all experts of a layer come with a number, `rest` stands for those that are not named, and the numbers may be any;
else they are whole ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from understudy.errors import PlanError

Entry = tuple[int, ...] | tuple[tuple[int, ...], ...] | dict[int, int] | dict[int, float]
REST = "rest"
# kinds that put nothing in the place of experts, but change how a layer runs them: beside others they name all of them
OVERLAYS = frozenset({"modulate"})


def ids_of(entry: Entry) -> tuple[int, ...]:
    """Return the ids of an entry, ascending."""
    if isinstance(entry, dict):
        return tuple(sorted(entry))
    return tuple(sorted(i for x in entry for i in (x if isinstance(x, tuple) else (x,))))


def read_entries(key: str, entry: Any, experts: int | None) -> dict[str, Entry]:
    """Check the kinds of one layer, as YAML gives them, and put them into their canonical form.

    Raises:
        PlanError: not ids, groups of ids or numbers by id; an id that comes twice.
    """
    entry = {} if entry is None else entry
    if not isinstance(entry, Mapping):
        raise PlanError(f"layer {key}: must name ids by kind, like {{constant: [3, 17]}}, not {entry!r}")
    kinds: dict[str, Entry] = {}
    seen: dict[int, str] = {}
    for kind, value in entry.items():
        if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", kind):
            raise PlanError(f"layer {key}: {kind!r} cannot be the name of a kind")
        if value == "all":
            value = list(range(experts or 0))
        found = _members(f"layer {key}: {kind}", [] if value is None else value, experts)
        taken = {} if kind in OVERLAYS else seen
        for i in ids_of(found) if isinstance(found, dict) else _flat(found):
            if i in taken:
                where = f"twice under {kind}" if taken[i] == kind else f"under {taken[i]} and under {kind}"
                raise PlanError(f"layer {key}: expert {i} is named {where}")
            taken[i] = kind
        if found:
            kinds[kind] = found
    return dict(sorted(kinds.items()))


def entry_text(entry: Entry, experts: int) -> str:
    """Write an entry of a layer with so many experts as `read_entries` reads it, in one line."""
    if isinstance(entry, dict):
        rest = f", {REST}: 0" if len(entry) == experts and 0 in entry.values() else ""
        named = [f"{i}: {_number_text(n)}" for i, n in entry.items() if n or not rest]
        return "{" + (", ".join(named) + rest).removeprefix(", ") + "}"
    if entry == tuple(range(experts)):
        return "all"
    return str([list(x) if isinstance(x, tuple) else x for x in entry])


def _number_text(n: float) -> str:
    mantissa, e, exponent = repr(n).partition("e")  # to YAML a number with an exponent but without a point is text
    return f"{mantissa}.0{e}{exponent}" if e and "." not in mantissa else repr(n)


def _members(where: str, value: Any, experts: int | None) -> Entry:
    """Read what a layer lists under a kind; the first of a group stays the first, all else is sorted."""
    if isinstance(value, Mapping):
        rest = {i: value[REST] for i in range(experts or 0) if i not in value} if REST in value else {}
        pairs: dict[int, Any] = {_id(where, i): n for i, n in value.items() if i != REST} | rest
        check = _any_number if REST in value or len(pairs) == experts else _whole
        return {i: check(f"{where}: expert {i}", n) for i, n in sorted(pairs.items())}
    if not isinstance(value, (list, tuple)):
        shapes = "[3, 17], or groups, [[3, 17], [5, 9]], or numbers by id, {3: 512}"
        raise PlanError(f"{where} must be a list of expert ids, like {shapes}, not {value!r}")
    if not any(isinstance(x, (list, tuple)) for x in value):
        return tuple(sorted(_id(where, i) for i in value))
    groups = []
    for group in value:
        if not isinstance(group, (list, tuple)) or not group:
            raise PlanError(f"{where}: a group of experts is a list of ids, not {group!r}")
        first, *others = (_id(where, i) for i in group)
        groups.append((first, *sorted(others)))
    return tuple(sorted(groups))


def _flat(entry: Any) -> list[int]:
    return [i for x in entry for i in (x if isinstance(x, tuple) else (x,))]


def _id(where: str, i: Any) -> int:
    if not isinstance(i, int) or isinstance(i, bool):
        raise PlanError(f"{where}: an expert id is a whole number, not {i!r}")
    return i


def _any_number(where: str, n: Any) -> float:
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not math.isfinite(n):
        raise PlanError(f"{where}: must come with a number, not {n!r}")
    return n


def _whole(where: str, n: Any) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise PlanError(f"{where}: must come with a whole number, not {n!r}")
    return n
