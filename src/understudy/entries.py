"""What one layer of a plan lists under a kind: ids, groups of ids that share something, or ids with a number each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from understudy.errors import PlanError

Entry = tuple[int, ...] | tuple[tuple[int, ...], ...] | dict[int, int]


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
        found = _members(f"layer {key}: {kind}", [] if value is None else value)
        for i in ids_of(found) if isinstance(found, dict) else _flat(found):
            if i in seen:
                where = f"twice under {kind}" if seen[i] == kind else f"under {seen[i]} and under {kind}"
                raise PlanError(f"layer {key}: expert {i} is named {where}")
            seen[i] = kind
        if found:
            kinds[kind] = found
    return dict(sorted(kinds.items()))


def _members(where: str, value: Any) -> Entry:
    """Read what a layer lists under a kind; the first of a group stays the first, all else is sorted."""
    if isinstance(value, Mapping):
        pairs = {_id(where, i): _whole(f"{where}: expert {i}", n) for i, n in value.items()}
        return dict(sorted(pairs.items()))
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


def _whole(where: str, n: Any) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise PlanError(f"{where}: must come with a whole number, not {n!r}")
    return n
