"""Search: a plan by what the whole model makes of text; statistics in, plan out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from understudy.activations import ActivationStore
from understudy.budgets import one_of
from understudy.checkpoint import resolve
from understudy.data import Blocks, token_blocks
from understudy.errors import OutputError, PlanError
from understudy.evolution import Counts, Evolution, evolve
from understudy.facts import LayerFacts, ModelFacts, parse_bytes
from understudy.kinds import check_plan, expected_bytes, get_kind
from understudy.methods import Problem, Task, get_method, kind_of
from understudy.plans import Plan, PlanModel
from understudy.protection import layers_named
from understudy.quality import overlap
from understudy.ranking import order_in
from understudy.recipe import Search, Selection, settings_from
from understudy.resuming import Left
from understudy.scores import get_score, score_layers
from understudy.skeleton import Skeleton
from understudy.stats import Stats, file_hash, load_stats, require
from understudy.tokens import load_tokenizer
from understudy.virtual import planned
from understudy.walk import Walk

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
_SIZES = ("ratio", "size", "model_ratio", "layers")
_WAYS = ("generations", "population", "criterion", "dense_tokens")  # settings that some searches use


@dataclass(frozen=True)
class Searched:
    """The plan that a search ended with, its bytes, and what to tell of it.

    Where the numbers of experts evolved, with its fitness and that of equal shares, both 0 to 1, and plans tried.
    """

    plan: Plan
    facts: ModelFacts
    expected_bytes: int
    notes: tuple[str, ...]
    fitness: float | None = None
    start_fitness: float | None = None
    evaluations: int | None = None


def search(
    model: str | os.PathLike[str],
    stats: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    selection: Selection | None = None,
    settings: Search | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Searched:
    """Find a plan by what the model makes of text, the way of its method, and write it to `out`.

    Most methods rank experts; then the number that each layer gives up evolves. The order inside a layer is the
    method's, and the fitness of a candidate the mean over tokens of the probability that the original and the
    compressed model share, sum_v min(p, q) (EvoESAP, arXiv 2603.06003). Finished evaluations are kept in a file beside
    `out` until the end, so that an interrupted search goes on where it stopped. CD-MoE searches as its paper does.

    Raises:
        UnderstudyError: a method that cannot be searched, a kind that needs equal layers, bad model, data or settings.
    """
    mine = {name: value for name, value in options.items() if name in Selection.model_fields}
    theirs = {name: value for name, value in options.items() if name not in mine or name in Search.model_fields}
    selection = settings_from(Selection, selection, mine)
    settings = settings_from(Search, settings, theirs)
    target = Path(out)
    if target.exists():
        raise OutputError(f"{target} exists already; choose another --out or remove it")
    asked = _Asked(model, load_stats(stats), file_hash(stats), selection, settings, target, progress or _silent)
    return _evolved(asked) if get_method(selection.method).search is None else _by_method(asked)


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Asked:
    """What is searched for, with what, and where the plan goes; `parent` is the hash of the statistics."""

    model: str | os.PathLike[str]
    stats: Stats
    parent: str
    selection: Selection
    settings: Search
    target: Path
    report: Progress

    def opened(self) -> tuple[Skeleton, Blocks]:
        """Open the model, and draw the text."""
        s = self.settings
        folder, trust = resolve(self.model), s.trust_remote_code
        source = Skeleton(folder, dtype=s.dtype, device=s.device, trust_remote_code=trust)
        drawn = {"seq_len": s.seq_len, "samples": s.samples, "seed": s.seed}
        return source, token_blocks(s.data, load_tokenizer(folder, trust), **drawn)

    def left(self, blocks: Blocks) -> Left:
        """Take up what an interrupted search of the same settings left; how long it was to go on does not matter."""
        given = self.settings.model_dump(exclude={"generations", "activation_memory"}), self.selection.model_dump()
        found = Left(
            self.target.with_name(f".{self.target.name}.search.json"),
            [self.stats.model.fingerprint, blocks.digest, self.parent, *given],
        )
        if found.values:
            logger.info("going on with an interrupted search, %s", found.file)
        return found


def _evolved(asked: _Asked) -> Searched:
    """Let the number of experts that each layer gives up evolve."""
    facts, settings = asked.stats.model, asked.settings
    start = _Start.of(asked.stats, asked.selection, settings, asked.parent)
    source, blocks = asked.opened()
    left = asked.left(blocks)
    race = _Race(source, blocks, asked.stats, start, settings, left)
    evolution = Evolution(settings.generations, settings.population, seed=settings.seed)
    done = partial(_done, asked.report, settings.generations)
    best = evolve(start.counts, start.most, race.fitness, evolution, done)
    plan = start.plan(best)
    plan.save(asked.target)
    left.end()
    fitness, before, tried = race.known[best], race.known[start.counts], len(race.known)
    note = f"shares {fitness:.4f} of probability with the original, equal layers {before:.4f} ({tried} plans tried)"
    return Searched(plan, facts, expected_bytes(plan, facts), (note,), fitness, before, tried)


def _by_method(asked: _Asked) -> Searched:
    """Let the method search."""
    selection, facts, method = asked.selection, asked.stats.model, get_method(asked.selection.method)
    kind = kind_of(method, selection.kind)
    assert method.search is not None
    _refuse_idle(selection, asked.settings, {*_SIZES, *method.options}, {"criterion", "dense_tokens"})
    sizes = [name for name in _SIZES if name in method.options or name != "layers"]
    if sum(getattr(selection, name) is not None for name in sizes) != 1:
        raise one_of(sizes)
    problem = Problem(asked.stats, _open_layers(asked.stats, selection), selection, kind, None)
    if not problem.layers:
        raise PlanError("there is no layer to search over: each is kept, or saw no token in calibration")
    for key, layer in problem.layers.items():
        if why := kind.refuses(layer):
            raise PlanError(f"layer {key}: {kind.name} is not possible: {why}; name it in --keep-layers")
    source, blocks = asked.opened()
    left = asked.left(blocks)
    choice = method.search(Task(problem, source, blocks, asked.settings, asked.report, left))
    chosen_by = selection.model_dump(include={*_SIZES, *method.options, "keep_layers"}, exclude_none=True)
    plan = Plan(
        method=method.name,
        model=PlanModel.of(facts),
        stats=asked.parent,
        recipe=chosen_by | {"kind": kind.name, "search": asked.settings.criterion},
        how=choice.how,
        layers=choice.layers,
    )
    check_plan(plan, facts)
    plan.save(asked.target)
    left.end()
    return Searched(plan, facts, expected_bytes(plan, facts), choice.notes)


def _open_layers(stats: Stats, selection: Selection) -> dict[str, LayerFacts]:
    """Return the layers that may be touched: those that saw tokens and are not to be kept."""
    layers = {key: layer for key, layer in stats.model.layers.items() if stats.layers[key].tokens > 0}
    kept = layers_named(selection.keep_layers, list(stats.model.layers)) if selection.keep_layers else ()
    return {key: layer for key, layer in layers.items() if key not in kept}


def _refuse_idle(selection: Selection, settings: Search, heeded: set[str], used: set[str]) -> None:
    """Refuse settings that change nothing: of the selection those not heeded, of the search those that others use."""
    always = {"method", "kind", "keep_layers", "seed"}
    idle: list[tuple[Selection | Search, str]] = [
        (selection, name) for name in Selection.model_fields if name not in heeded | always
    ]
    idle += [(settings, name) for name in _WAYS if name not in used]
    for given, name in idle:
        if getattr(given, name) != type(given).model_fields[name].default:
            raise PlanError(
                f"--{name.replace('_', '-')} has no effect on a search with method {selection.method}; leave it out"
            )


def _done(report: Progress, total: int, number: int, best: Counts, fitness: float) -> None:
    report("search", number, total)
    logger.info("generation %d: fitness %.5f", number, fitness)


@dataclass(frozen=True)
class _Start:
    """Where a search starts: the layers, who goes first in each, and equal shares."""

    stats: Stats
    selection: Selection
    parent: str
    order: dict[str, list[int]]
    counts: Counts
    most: Counts

    @classmethod
    def of(cls, stats: Stats, selection: Selection, settings: Search, parent: str) -> _Start:
        method = get_method(selection.method)
        kind = get_kind(selection.kind or "constant")
        if method.score is None:
            raise PlanError(f"{method.name} does not rank single experts; search over one that does: reap, mone, gate")
        if kind.renumbers or not kind.losers:
            raise PlanError(f"{kind.name} needs the same number in every layer; search with --kind constant")
        if selection.ratio is None or not 0 < selection.ratio < 1:
            raise PlanError("give the share of experts to replace with --ratio, more than 0 and less than 1")
        _refuse_idle(selection, settings, {"ratio", "gate"}, {"generations", "population"})
        score = get_score(method.score)
        require(stats, score.needs, f"method {method.name}")
        layers = _open_layers(stats, selection)
        scores = score_layers(score, stats, selection)
        problem = Problem(stats, layers, selection, kind, scores)
        order = {key: order_in(problem, key, scores.layers[key]) for key in layers}
        counts = tuple(round(selection.ratio * layer.experts) for layer in layers.values())
        return cls(stats, selection, parent, order, counts, tuple(kind.most(layer) for layer in layers.values()))

    def plan(self, counts: Counts) -> Plan:
        """Return the plan that gives up these numbers of experts."""
        kind = self.selection.kind or "constant"
        chosen = {key: {kind: tuple(ids[:n])} for (key, ids), n in zip(self.order.items(), counts, strict=True) if n}
        plan = Plan(
            method=self.selection.method,
            model=PlanModel.of(self.stats.model),
            stats=self.parent,
            recipe={"ratio": self.selection.ratio, "kind": kind, "search": "evolution"},
            layers=chosen,
        )
        check_plan(plan, self.stats.model)
        return plan


class _Race:
    """Evaluates candidates against the original, and remembers what they reached."""

    def __init__(
        self, source: Skeleton, blocks: Blocks, stats: Stats, start: _Start, settings: Search, left: Left
    ) -> None:
        self.source, self.blocks, self.stats, self.start, self.settings = source, blocks, stats, start, settings
        self.left = left
        self.known: dict[Counts, float] = {tuple(counts): value for counts, value in left.values.get("known", ())}
        self.original: Walk | None = None

    def fitness(self, counts: Counts) -> float:
        """Walk a candidate and compare it with the original."""
        if counts not in self.known:
            model = planned(self.source, self.start.plan(counts), self.stats)
            self.known[counts] = overlap(self._walked(model), self._reference())
            self.left.keep(known=[[list(counts), value] for counts, value in self.known.items()])
        return self.known[counts]

    def _reference(self) -> Walk:
        if self.original is None:
            self.original = self._walked(self.source)
        return self.original

    def _walked(self, model: Skeleton) -> Walk:
        store = ActivationStore(parse_bytes(self.settings.activation_memory) // 2, device=model.device)
        walk = Walk(model, self.blocks.ids, self.settings.batch_size, store)
        with walk.ready():
            walk.through_layers()
        return walk
