"""Selection: statistics in, plan out. It reads no weights and imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

from understudy.budgets import Target, one_of, target_of
from understudy.errors import PlanError, StatsError
from understudy.facts import LayerFacts, ModelFacts
from understudy.kinds import Kind, check_plan, expected_bytes
from understudy.methods import OPTIONAL, Choice, Method, Problem, get_method, kind_of, scope_of
from understudy.overlay import SETTINGS as OVERLAID
from understudy.overlay import laid_over, lies_over, refuse_unfit
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
    ratio: float | None = None  # that was asked for, or with which a method that chooses for itself met the size

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
    settings = settings.model_copy(update={"kind": kind.name, "scope": scope_of(method, settings)})
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
    problem = Problem(stats, layers, settings, kind, scores, protected)
    choice = _chosen(method, problem)
    choice = replace(choice, notes=(*choice.notes, *method.judge(problem, choice)))
    refuse_touched(choice.layers, layers, protected, f"method {method.name}")
    if layers and lies_over(settings, method):
        choice = laid_over(choice, layers, settings)
    plan = Plan(
        method=method.name,
        model=PlanModel.of(facts),
        stats=parent,
        recipe=settings.model_dump(exclude={"method", *OPTIONAL} - _obeyed(settings, method), exclude_none=True),
        how=choice.how,
        layers=choice.layers,
    )
    check_plan(plan, facts)
    if out is not None:
        plan.save(out)
    ratio = settings.ratio if settings.ratio is not None else choice.ratio
    return PlanResult(plan, facts, expected_bytes(plan, facts), (*notes, *more, *choice.notes), choice.scores, ratio)


def _chosen(method: Method, problem: Problem) -> Choice:
    """Let a method choose at the ratio, or at the smallest ratio that brings the whole model down to what is asked."""
    target = target_of(problem.settings, problem.stats.model)
    if target and target.met:
        return Choice({}, scores=problem.scores, notes=(target.met,))
    if not problem.layers:
        if target:
            raise PlanError(f"{target.said} is out of reach: every MoE layer is to stay as it is")
        return Choice({}, scores=problem.scores, notes=("every MoE layer stays as it is; nothing is replaced",))
    if method.choose is None:
        return choose_lowest(problem, method.mass)
    return _smallest(method, problem, target) if target else method.choose(problem, problem.settings.ratio or 0.0)


def _smallest(method: Method, problem: Problem, target: Target) -> Choice:
    """Bisect for the smallest ratio that meets a target."""
    assert method.choose is not None
    low, high = 0.0, method.most(problem)
    best = method.choose(problem, high)
    if (least := target.size(best.layers, best.how)) > target.most:
        raise target.out_of_reach(method.name, least, high)
    while high - low > 1e-7:
        middle = (low + high) / 2
        choice = method.choose(problem, middle)
        if target.size(choice.layers, choice.how) <= target.most:
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
    kind, score = kind_of(method, settings.kind), get_score(method.score) if method.score else None
    budgets = ["ratio", "size", "model_ratio", *(["layers"] if "layers" in method.options else [])]
    given = [name for name in budgets if getattr(settings, name) is not None]
    if given and not method.shrinks:
        flag = given[0].replace("_", "-")
        raise PlanError(f"--{flag} has no effect on method {method.name}, which removes nothing; leave it out")
    if len(given) != 1 and method.shrinks:
        raise one_of(budgets)
    if settings.ratio is not None and not 0 <= settings.ratio < 1:
        raise PlanError(f"ratio {settings.ratio:g} is not a share of the experts; give 0 or more and less than 1")
    if settings.model_ratio is not None and not 0 <= settings.model_ratio < 1:
        raise PlanError(
            f"model ratio {settings.model_ratio:g} is not a share of the parameters; give 0 or more and less than 1"
        )
    scope = scope_of(method, settings)
    if scope not in method.scopes:
        raise PlanError(f"{method.name} does not select by {scope}; use --scope {' or '.join(method.scopes)}")
    if scope != "layer" and kind.renumbers:
        raise PlanError(
            f"--scope {scope} takes more experts from some layers than from others, and {kind.name} needs the "
            "same number in every layer for stock loaders; use --scope layer or --kind constant"
        )
    _refuse_idle(settings, method, score)
    refuse_unfit(settings, method, kind)
    return method, kind, score


def _refuse_idle(settings: Selection, method: Method, score: Score | None) -> None:
    """Refuse settings that change nothing; but a sweep over seeds may hold methods that do not draw."""
    if settings.gate != Selection.model_fields["gate"].default and "gate" not in (score.options if score else ()):
        raise PlanError(f"--gate {settings.gate} has no effect on method {method.name}; leave it out")
    for name in ("width_classes", "refit"):
        if getattr(settings, name) not in (None, False) and "slim" not in method.kinds:
            raise PlanError(f"--{name.replace('_', '-')} has no effect on method {method.name}; leave it out")
    if settings.alpha is not None and scope_of(method, settings) != "mass":
        how = "give --scope mass, too" if "mass" in method.scopes else "leave it out"
        raise PlanError(f"--alpha has no effect where method {method.name} does not select by mass; {how}")
    obeyed = _obeyed(settings, method)
    for name in OPTIONAL:
        if getattr(settings, name) != Selection.model_fields[name].default and name not in obeyed:
            raise PlanError(f"--{name.replace('_', '-')} has no effect on method {method.name}; leave it out")


def _obeyed(settings: Selection, method: Method) -> set[str]:
    """Return which of the settings that only some methods obey have an effect here."""
    return {*method.options, *(OVERLAID if lies_over(settings, method) else ())}


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
