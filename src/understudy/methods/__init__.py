"""Methods: what a paper does, said in terms of shared parts; a file each, found by looking into this folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from understudy.entries import Entry
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.recipe import Scope, Selection
from understudy.registry import discover, lookup
from understudy.scores import Scores
from understudy.stats import Stats


@dataclass(frozen=True)
class Problem:
    """What a method chooses from: statistics, layers that may be touched, settings, kind, and scores if it has some."""

    stats: Stats
    layers: dict[str, LayerFacts]
    settings: Selection
    kind: Kind
    scores: Scores | None
    protected: Mapping[str, frozenset[int]] = field(default_factory=dict)  # by layer, the experts that stay


@dataclass(frozen=True)
class Mass:
    """How `--scope mass` sets the share of a layer's mass that goes, from one number for the whole model.

    Attributes:
        alpha: how much less is taken from a layer with large router logits (LightMoE, arXiv 2603.12645, eq. 3); 0 takes
            the same share everywhere.
        crossing: the expert that crosses the share goes with the others (LightMoE), or stays (SHAPE).
    """

    alpha: float = 0.3
    crossing: bool = True


@dataclass(frozen=True)
class Choice:
    """What a method chose: entries of a plan by layer and kind, settings of the kinds, and notes for people.

    `ratio` is the one at which it was chosen, where that was searched for.
    """

    layers: dict[str, dict[str, Entry]]
    how: dict[str, dict[str, bool | int | float | str]] = field(default_factory=dict)
    scores: Scores | None = None
    notes: tuple[str, ...] = ()
    ratio: float | None = None


@dataclass(frozen=True)
class Method:
    """A composition: which score ranks the experts and what the lowest become, or a choice of another form.

    Attributes:
        name: as plans and people spell it.
        paper: title and number.
        kind: what the experts become unless told otherwise.
        scopes: over what experts may be ranked; by mass only where the score adds up over tokens and is never negative.
        score: name of the criterion; None where single experts are not ranked.
        kinds: what may be asked for with `--kind`.
        choose: called with the problem and a ratio, the share of the routed experts' bytes to remove as far as whole
            units allow; a larger ratio never needs more bytes. None: the experts that rank lowest become the kind.
        needs: fields of `ExpertStats` that `choose` reads.
        most: the largest ratio that `choose` can meet.
        mass: the rule of `--scope mass`.
        sequential: the paper takes a layer's statistics from the compressed layers before it; calibration does so when
            it is told the method and the ratio (`compress` and `compare` do).
    """

    name: str
    paper: str
    kind: str
    scopes: tuple[Scope, ...] = ("layer",)
    score: str | None = None
    kinds: tuple[str, ...] = ("drop", "constant")
    choose: Callable[[Problem, float], Choice] | None = None
    needs: tuple[str, ...] = ()
    most: Callable[[Problem], float] = lambda problem: 1.0
    mass: Mass = Mass()
    sequential: bool = False


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
