"""Search: how many experts each layer gives up, by what the whole model makes of text; statistics in, plan out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from understudy._version import __version__
from understudy.activations import ActivationStore
from understudy.checkpoint import resolve
from understudy.data import Blocks, token_blocks
from understudy.errors import OutputError, PlanError, reason
from understudy.evolution import Counts, Evolution, evolve
from understudy.facts import ModelFacts, parse_bytes
from understudy.kinds import check_plan, expected_bytes, get_kind
from understudy.methods import Problem, get_method
from understudy.plans import Plan, PlanModel
from understudy.protection import layers_named
from understudy.quality import overlap
from understudy.ranking import order_in
from understudy.recipe import Search, Selection, settings_from
from understudy.scores import get_score, score_layers
from understudy.skeleton import Skeleton
from understudy.stats import Stats, file_hash, load_stats, require
from understudy.tokens import load_tokenizer
from understudy.virtual import planned
from understudy.walk import Walk

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Searched:
    """The plan that a search ended with, its fitness and that of equal shares, both 0 to 1, and its bytes."""

    plan: Plan
    facts: ModelFacts
    fitness: float
    start_fitness: float
    expected_bytes: int
    evaluations: int


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
    """Let the number of experts that each layer gives up evolve, and write the best plan to `out`.

    The order inside a layer is the method's. The fitness of a candidate is the mean over tokens of the probability that
    the original and the compressed model share, sum_v min(p, q) (EvoESAP, arXiv 2603.06003). Finished evaluations are
    kept in a file beside `out` until the end, so that an interrupted search goes on where it stopped.

    Raises:
        UnderstudyError: a method that does not rank single experts, a kind that needs equal layers, bad model or data.
    """
    mine = {name: value for name, value in options.items() if name in Selection.model_fields}
    theirs = {name: value for name, value in options.items() if name not in mine or name in Search.model_fields}
    selection = settings_from(Selection, selection, mine)
    settings = settings_from(Search, settings, theirs)
    target = Path(out)
    if target.exists():
        raise OutputError(f"{target} exists already; choose another --out or remove it")
    known = load_stats(stats)
    start = _Start.of(known, selection, file_hash(stats))
    race = _Race(model, known, start, settings)
    state = target.with_name(f".{target.name}.search.json")
    report = progress or (lambda what, done, total: None)
    with race.remembering(state):
        evolution = Evolution(settings.generations, settings.population, seed=settings.seed)
        best = evolve(start.counts, start.most, race.fitness, evolution, partial(_done, report, settings.generations))
    plan = start.plan(best)
    plan.save(target)
    state.unlink(missing_ok=True)
    found = race.known
    return Searched(plan, known.model, found[best], found[start.counts], expected_bytes(plan, known.model), len(found))


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
    def of(cls, stats: Stats, selection: Selection, parent: str) -> _Start:
        method = get_method(selection.method)
        kind = get_kind(selection.kind or "constant")
        if method.score is None:
            raise PlanError(f"{method.name} does not rank single experts; search over one that does: reap, mone, gate")
        if kind.renumbers or not kind.losers:
            raise PlanError(f"{kind.name} needs the same number in every layer; search with --kind constant")
        if selection.ratio is None or not 0 < selection.ratio < 1:
            raise PlanError("give the share of experts to replace with --ratio, more than 0 and less than 1")
        for name in ("scope", "size", "keep_super", "width_classes"):
            if getattr(selection, name) != Selection.model_fields[name].default:
                raise PlanError(f"--{name.replace('_', '-')} has no effect on a search; leave it out")
        score = get_score(method.score)
        require(stats, score.needs, f"method {method.name}")
        layers = {key: layer for key, layer in stats.model.layers.items() if stats.layers[key].tokens > 0}
        if selection.keep_layers:
            kept = layers_named(selection.keep_layers, list(stats.model.layers))
            layers = {key: layer for key, layer in layers.items() if key not in kept}
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

    def __init__(self, model: str | os.PathLike[str], stats: Stats, start: _Start, settings: Search) -> None:
        folder = resolve(model)
        self.source = Skeleton(
            folder, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
        )
        self.stats, self.start, self.settings = stats, start, settings
        self.blocks: Blocks = token_blocks(
            settings.data,
            load_tokenizer(folder, settings.trust_remote_code),
            seq_len=settings.seq_len,
            samples=settings.samples,
            seed=settings.seed,
        )
        self.known: dict[Counts, float] = {}
        self.original: Walk | None = None
        self._file: Path | None = None

    @contextmanager
    def remembering(self, file: Path) -> Iterator[None]:
        """Take up what an interrupted search of the same settings left, and leave the same."""
        self._file = file
        if file.exists():
            try:
                left = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                left = {}
            if left.get("run") == self._identity():
                self.known = {tuple(counts): value for counts, value in left["known"]}
                logger.info("going on with %d evaluations of an interrupted search", len(self.known))
        yield

    def fitness(self, counts: Counts) -> float:
        """Walk a candidate and compare it with the original."""
        if counts not in self.known:
            model = planned(self.source, self.start.plan(counts), self.stats)
            self.known[counts] = overlap(self._walked(model), self._reference())
            self._save()
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

    def _identity(self) -> str:
        settings = self.settings.model_dump(exclude={"generations", "activation_memory"})
        selection = self.start.selection.model_dump()
        parts = [__version__, self.stats.model.fingerprint, self.blocks.digest, self.start.parent, settings, selection]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _save(self) -> None:
        assert self._file is not None
        partial_file = self._file.with_name(self._file.name + ".tmp")
        known = [[list(counts), value] for counts, value in self.known.items()]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial_file.write_text(json.dumps({"run": self._identity(), "known": known}), encoding="utf-8")
            os.replace(partial_file, self._file)
        except OSError as error:
            raise OutputError(f"{self._file}: cannot be written ({reason(error)})") from None
