"""Methods: what a paper does, said in terms of shared parts; a file each, found by looking into this folder."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from understudy.recipe import Scope
from understudy.registry import discover, lookup


@dataclass(frozen=True)
class Method:
    """A composition: which score ranks the experts and, unless told otherwise, what the lowest become."""

    name: str
    score: str
    kind: str  # the default; any other kind may be asked for
    scopes: tuple[Scope, ...]
    paper: str


@functools.cache
def all_methods() -> dict[str, Method]:
    """Return every method by name."""
    return discover(__name__, Method)


def get_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        PlanError: there is none; the nearest name is suggested.
    """
    return lookup(all_methods(), name, "method")
