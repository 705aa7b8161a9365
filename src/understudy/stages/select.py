"""Selection: statistics in, plan out. It reads no weights and imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

from understudy.errors import PlanError, StatsError
from understudy.facts import LayerFacts, ModelFacts, format_bytes, parse_bytes
from understudy.kinds import Kind, added_bytes, check_plan, expected_bytes, get_kind
from understudy.methods import Choice, Method, Problem, get_method
from understudy.plans import Plan, PlanModel
from understudy.protection import layers_named, refuse_touched, super_experts, super_note
from understudy.ranking import choose_lowest, planning_needs
from understudy.recipe import Selection, settings_from
from understudy.scores import Score, Scores, get_score, score_layers
from understudy.stats import ExpertStats, Stats, file_hash, load_stats, require
from understudy.sums import group_of

Layers = dict[str, LayerFacts]


@dataclass(frozen=True)
class PlanResult:
    """A plan with what a person wants to know beside it; bytes are those of all tensors after applying."""

    plan: Plan
    facts: ModelFacts
    expected_bytes: int
    notes: tuple[str, ...]
    scores: Scores | None  # None where a method does not rank single experts
    ratio: float | None = None  # that was asked for, or that a method that chooses for itself met the size with

    @property
    def load_bytes(self) -> int:
        """Bytes to load: without tensors that the model has no place for."""
        return self.expected_bytes - self.facts.unloaded_bytes


def plan(
    stats: Stats | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    settings: Selection | None = None,
    **options: Any,
) -> PlanResult:
    """Choose the experts to replace; settings as an object or by name (`method`, `ratio`, ... of `recipe.Selection`).

    Raises:
        UnderstudyError: as `make_plan`, and for unknown options.
    """
    return make_plan(stats, settings_from(Selection, settings, options), out)


def make_plan(
    stats: Stats | str | os.PathLike[str], settings: Selection, out: str | os.PathLike[str] | None = None
) -> PlanResult:
    """Choose the experts to replace, and write the plan where `out` says so.

    Raises:
        PlanError: settings that contradict each other, or that no plan can meet.
        StatsError: the statistics cannot be read, or no layer saw a token.
        NumericError: the statistics hold NaN or infinity.
        OutputError: `out` cannot be written.
    """
    parent = None
    method, kind, score = check_settings(settings)
    needs = planning_needs(method, settings)
    if not isinstance(stats, Stats):
        path, stats = stats, load_stats(stats, only={"tokens", "count", *needs})
        parent = file_hash(path)
    if stats.data.get("weights_only"):
        stats, needs = _of_weights(stats), {*needs, *kind.needs}
    require(stats, sorted(needs), f"method {method.name}")
    facts = stats.model
    layers, notes = _reached(stats)
    scores = score_layers(score, stats, settings) if score else None
    layers, protected, more = _protect(layers, stats, settings, kind)
    for key, layer in layers.items():
        if reason := kind.refuses(layer):
            raise PlanError(f"layer {key}: {kind.name} is not possible: {reason}; use --kind constant")
    choice = _chosen(method, Problem(stats, layers, settings, kind, scores, protected))
    refuse_touched(choice.layers, layers, protected, f"method {method.name}")
    plan = Plan(
        method=method.name,
        model=PlanModel.of(facts),
        stats=parent,
        recipe=settings.model_copy(update={"kind": kind.name}).model_dump(exclude={"method"}, exclude_none=True),
        how=choice.how,
        layers=choice.layers,
    )
    check_plan(plan, facts)
    if out is not None:
        plan.save(out)
    ratio = settings.ratio if settings.ratio is not None else choice.ratio
    return PlanResult(plan, facts, expected_bytes(plan, facts), (*notes, *more, *choice.notes), choice.scores, ratio)


def _chosen(method: Method, problem: Problem) -> Choice:
    """Let a method choose at the ratio, or at the smallest ratio that meets the size."""
    facts, settings = problem.stats.model, problem.settings
    size = parse_bytes(settings.size) if settings.size is not None else None
    if size is not None and facts.nbytes <= size:
        note = f"nothing to replace: the model's {format_bytes(facts.nbytes)} are within {format_bytes(size)}"
        return Choice({}, scores=problem.scores, notes=(note,))
    if not problem.layers:
        if size is not None:
            raise PlanError(f"{settings.size} is out of reach: every MoE layer is to stay as it is")
        return Choice({}, scores=problem.scores, notes=("every MoE layer stays as it is; nothing is replaced",))
    if method.choose is None:
        return choose_lowest(problem, method.mass)
    return method.choose(problem, settings.ratio or 0.0) if size is None else _smallest(method, problem, size)


def _smallest(method: Method, problem: Problem, size: int) -> Choice:
    """Bisect for the smallest ratio that brings a model down to a size."""
    assert method.choose is not None
    facts, low, high = problem.stats.model, 0.0, method.most(problem)
    best = method.choose(problem, high)
    if (least := facts.nbytes + added_bytes(best.layers, facts, best.how)) > size:
        raise PlanError(
            f"{format_bytes(size)} is out of reach: {method.name} brings {facts.source} from "
            f"{format_bytes(facts.nbytes)} down to {format_bytes(least)} ({least} bytes) at best, at ratio {high:.6g}"
        )
    while high - low > 1e-7:
        middle = (low + high) / 2
        choice = method.choose(problem, middle)
        if facts.nbytes + added_bytes(choice.layers, facts, choice.how) <= size:
            high, best = middle, choice
        else:
            low = middle
    return replace(best, ratio=high)


def check_settings(settings: Selection) -> tuple[Method, Kind, Score | None]:
    """Look up what the settings name, and refuse what contradicts itself whatever the model.

    Raises:
        PlanError: an unknown name, a value out of range, or settings that do not go together.
    """
    method = get_method(settings.method)
    kind, score = get_kind(settings.kind or method.kind), get_score(method.score) if method.score else None
    if (settings.ratio is None) == (settings.size is None):
        raise PlanError("give one of --ratio and --size")
    if settings.ratio is not None and not 0 <= settings.ratio < 1:
        raise PlanError(f"ratio {settings.ratio:g} is not a share of the experts; give 0 or more and less than 1")
    if kind.name not in method.kinds:
        raise PlanError(f"{method.name} cannot make {kind.name}; use --kind {' or '.join(method.kinds)}")
    if settings.scope not in method.scopes:
        raise PlanError(f"{method.name} does not select by {settings.scope}; use --scope {' or '.join(method.scopes)}")
    if settings.scope != "layer" and kind.renumbers:
        raise PlanError(
            f"--scope {settings.scope} takes more experts from some layers than from others, and {kind.name} needs the "
            "same number in every layer for stock loaders; use --scope layer or --kind constant"
        )
    # the seed is not checked: a sweep over seeds may hold methods that do not draw
    if settings.gate != Selection.model_fields["gate"].default and "gate" not in (score.options if score else ()):
        raise PlanError(f"--gate {settings.gate} has no effect on method {method.name}; leave it out")
    if settings.width_classes and "slim" not in method.kinds:
        raise PlanError(f"--width-classes has no effect on method {method.name}; leave it out")
    return method, kind, score


def _of_weights(stats: Stats) -> Stats:
    """Take away all sums over routes: where no text was read, zeros stand for what is not known."""
    known = [f.name for f in fields(ExpertStats) if group_of(f.name) in ("weights", "base")]
    layers = {key: ExpertStats(**_only(layer, known)) for key, layer in stats.layers.items()}
    return replace(stats, layers=layers)


def _only(layer: ExpertStats, names: list[str]) -> dict[str, Any]:
    return {f.name: getattr(layer, f.name) if f.name in names else None for f in fields(ExpertStats)}


def _reached(stats: Stats) -> tuple[Layers, list[str]]:
    """Set aside layers that saw no token: nothing is known of them, so nothing in them is touched."""
    if stats.data.get("weights_only"):
        return dict(stats.model.layers), []
    layers = {k: layer for k, layer in stats.model.layers.items() if k in stats.layers and stats.layers[k].tokens > 0}
    if not layers:
        raise StatsError("the statistics hold no token; calibrate on more data")
    if idle := [key for key in stats.model.layers if key not in layers]:
        return layers, [f"layers {', '.join(idle)} saw no token in calibration and are left untouched"]
    return layers, []


def _protect(
    layers: Layers, stats: Stats, settings: Selection, kind: Kind
) -> tuple[Layers, dict[str, frozenset[int]], list[str]]:
    """Return the layers that may be touched, the experts in them that stay, and what to tell of it."""
    protected: dict[str, frozenset[int]] = {}
    notes = []
    if settings.keep_super:
        protected = super_experts({key: stats.layers[key] for key in layers})
        notes.append(super_note(protected))
    if settings.keep_layers is not None:
        kept = layers_named(settings.keep_layers, stats.model.layers)
        rest = {key: layer for key, layer in layers.items() if key not in kept}
        sizes = {stats.model.layers[key].experts: key for key in reversed(kept)}
        if kind.renumbers and settings.ratio != 0 and (uneven := [k for k, x in rest.items() if x.experts in sizes]):
            raise PlanError(
                f"--keep-layers would leave layer {sizes[rest[uneven[0]].experts]} with more experts than layer "
                f"{uneven[0]}, and {kind.name} needs the same number in every layer for stock loaders; leave it out or "
                "use --kind constant"
            )
        layers = rest
        notes.append(f"layers that stay as they are: {', '.join(kept)}; a ratio is of the experts in the others")
    return layers, {key: ids for key, ids in protected.items() if key in layers}, notes
