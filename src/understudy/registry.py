"""Find what the field knows (scores, kinds, methods) by looking into the package that holds it, a file each."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from understudy.errors import PlanError


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


def discover(package: str, base: type[T]) -> dict[str, T]:
    """Import every module of a package and return the instances of `base` at their top level, by name."""
    found: dict[str, T] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, base):
                assert found.setdefault(value.name, value) is value, f"two files of {package} are named {value.name!r}"
    return dict(sorted(found.items()))


def lookup(table: Mapping[str, T], name: str, noun: str) -> T:
    """Return an entry by name.

    Raises:
        PlanError: there is none; the message suggests the nearest name and lists all.
    """
    if name not in table:
        raise PlanError(f"no {noun} is named {name!r}{suggest(name, table)}; there is {', '.join(table)}")
    return table[name]


def suggest(name: str, names: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest name, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
