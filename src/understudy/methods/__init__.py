"""Methods: what a paper does, said in terms of shared parts; a file each, found by looking into this folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind, get_kind
from understudy.recipe import Scope, Search, Selection
from understudy.registry import discover, lookup
from understudy.resuming import Left
from understudy.scores import Scores
from understudy.stats import Stats

if TYPE_CHECKING:  # searching needs torch, planning must not wait for it
    from understudy.data import Blocks
    from understudy.skeleton import Skeleton

# settings that only the methods obey that name them
OPTIONAL = (
    *("bases", "rank", "start", "grouping", "keep_experts", "layers", "weights", "beam"),
    *("main_k", "vectors", "renormalise", "fit", "plain"),
)


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
class Task:
    """What a method searches with: its problem, and the model and text to try it on.

    `report` is told of progress, and `left` keeps what an interrupted search need not do again.
    """

    problem: Problem
    source: Skeleton
    blocks: Blocks
    settings: Search
    report: Callable[[str, int, int], None]
    left: Left


@dataclass(frozen=True)
class Method:
    """A composition: which score ranks the experts and what the lowest become, or a choice of another form.

    Attributes:
        name: as plans and people spell it.
        paper: title and number.
        kind: what the experts become unless told otherwise.
        scopes: over what experts may be ranked, the default first; by mass only where the score adds up over tokens and
            is never negative.
        score: name of the criterion; None where single experts are not ranked.
        kinds: what may be asked for with `--kind`.
        choose: called with the problem and a ratio, the share of the routed experts' bytes to remove as far as whole
            units allow; a larger ratio never needs more bytes. None: the experts that rank lowest become the kind.
        needs: fields of `ExpertStats` that `choose` reads.
        options: those of `OPTIONAL` settings that `choose` obeys.
        most: the largest ratio that `choose` can meet.
        search: how `search` finds its plan on the model; None: the numbers of experts that layers give up evolve.
        mass: the rule of `--scope mass`.
        sequential: the paper takes a layer's statistics from the compressed layers before it; calibration does so when
            it is told the method and the ratio (`compress` and `compare` do).
        shrinks: it removes something, so that a ratio or a size says how much.
        judge: says of a choice what there is to say once it is made.
        gradients: share of the blocks that `compress` walks back through unless told otherwise.
        fades: in recovery the originals fade out instead of being gone from the start.
    """

    name: str
    paper: str
    kind: str
    scopes: tuple[Scope, ...] = ("layer",)
    score: str | None = None
    kinds: tuple[str, ...] = ("drop", "constant")
    choose: Callable[[Problem, float], Choice] | None = None
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    most: Callable[[Problem], float] = lambda problem: 1.0
    search: Callable[[Task], Choice] | None = None
    mass: Mass = Mass()
    sequential: bool = False
    shrinks: bool = True
    judge: Callable[[Problem, Choice], tuple[str, ...]] = lambda problem, choice: ()
    gradients: float = 1.0
    fades: bool = False


def kind_of(method: Method, wanted: str | None) -> Kind:
    """Return the kind that a method makes: as asked for, or its own.

    Raises:
        PlanError: there is no such kind, or the method cannot make it.
    """
    kind = get_kind(wanted or method.kind)
    if kind.name not in method.kinds:
        raise PlanError(f"{method.name} cannot make {kind.name}; use --kind {' or '.join(method.kinds)}")
    return kind


def scope_of(method: Method, settings: Selection) -> Scope:
    """Return over what experts are ranked: as asked for, or as the method does."""
    return settings.scope or method.scopes[0]


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
