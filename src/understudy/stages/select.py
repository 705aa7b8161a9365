"""Selection: statistics in, plan out. It reads no weights and imports no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from understudy.entries import Entry
from understudy.errors import PlanError, StatsError
from understudy.facts import LayerFacts, ModelFacts, format_bytes, parse_bytes
from understudy.kinds import Kind, added_bytes, check_plan, expected_bytes, get_kind
from understudy.methods import Choice, Method, Problem, get_method
from understudy.plans import Plan, PlanModel
from understudy.recipe import Selection, settings_from
from understudy.scores import Score, Scores, get_score, score_layers
from understudy.stats import Stats, file_hash, load_stats, require

Layers = dict[str, LayerFacts]
Ids = dict[str, list[int]]  # by layer, the experts to replace


@dataclass(frozen=True)
class PlanResult:
    """A plan with what a person wants to know beside it; bytes are those of all tensors after applying."""

    plan: Plan
    facts: ModelFacts
    expected_bytes: int
    notes: tuple[str, ...]
    scores: Scores | None  # None where a method does not rank single experts

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
    method = get_method(settings.method)
    kind, score = get_kind(settings.kind or method.kind), get_score(method.score) if method.score else None
    _check_settings(settings, method, kind, score)
    needs = {*method.needs, *(score.needs if score else ())}
    if not isinstance(stats, Stats):
        path, stats = stats, load_stats(stats, only={"tokens", "count", *needs})
        parent = file_hash(path)
    require(stats, needs, f"method {method.name}")
    facts = stats.model
    layers, notes = _reached(stats)
    for key, layer in layers.items():
        if reason := kind.refuses(layer):
            raise PlanError(f"layer {key}: {kind.name} is not possible: {reason}; use --kind constant")
    scores = score_layers(score, stats, settings) if score else None
    if method.choose is not None:
        choice = _chosen(method, Problem(stats, layers, settings, kind, scores))
    else:
        assert scores is not None, "a method has a score or chooses by itself"
        order = {key: _order(kind, layer, scores.layers[key]) for key, layer in layers.items()}
        by = _by_size if settings.size is not None else _by_ratio
        ids, more = by(kind, facts, layers, order, scores, settings)
        entries: dict[str, dict[str, Entry]] = {
            key: {kind.name: tuple(sorted(chosen))} for key, chosen in ids.items() if chosen
        }
        choice = Choice(entries, scores=scores, notes=(*more, *_unseen(kind, layers, stats, ids)))
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
    return PlanResult(plan, facts, expected_bytes(plan, facts), (*notes, *choice.notes), choice.scores)


def _chosen(method: Method, problem: Problem) -> Choice:
    """Let a method choose at the ratio, or at the smallest ratio that meets the size."""
    assert method.choose is not None
    facts, settings = problem.stats.model, problem.settings
    if settings.size is None:
        return method.choose(problem, settings.ratio or 0.0)
    size = parse_bytes(settings.size)
    if facts.nbytes <= size:
        note = f"nothing to replace: the model's {format_bytes(facts.nbytes)} are within {format_bytes(size)}"
        return Choice({}, notes=(note,))

    def bytes_at(ratio: float) -> int:
        chosen = method.choose(problem, ratio)  # type: ignore[misc]  # checked above
        return facts.nbytes + added_bytes(chosen.layers, facts)

    low, high = 0.0, method.most(problem)
    if (least := bytes_at(high)) > size:
        raise PlanError(
            f"{format_bytes(size)} is out of reach: {method.name} brings {facts.source} from "
            f"{format_bytes(facts.nbytes)} down to {format_bytes(least)} ({least} bytes) at best, at ratio {high:.6g}"
        )
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (low, middle) if bytes_at(middle) <= size else (middle, high)
    return method.choose(problem, high)


def _check_settings(settings: Selection, method: Method, kind: Kind, score: Score | None) -> None:
    if (settings.ratio is None) == (settings.size is None):
        raise PlanError("give one of --ratio and --size")
    if settings.ratio is not None and not 0 <= settings.ratio < 1:
        raise PlanError(f"ratio {settings.ratio:g} is not a share of the experts; give 0 or more and less than 1")
    if kind.name not in method.kinds:
        raise PlanError(f"{method.name} cannot make {kind.name}; use --kind {' or '.join(method.kinds)}")
    if settings.scope not in method.scopes:
        raise PlanError(f"{method.name} does not select by {settings.scope}; use --scope {' or '.join(method.scopes)}")
    if settings.scope == "model" and kind.renumbers:
        raise PlanError(
            f"--scope model takes more experts from some layers than from others, and {kind.name} needs the same "
            "number in every layer for stock loaders; use --scope layer or --kind constant"
        )
    # the seed is not checked: a sweep over seeds may hold methods that do not draw
    if settings.gate != Selection.model_fields["gate"].default and "gate" not in (score.options if score else ()):
        raise PlanError(f"--gate {settings.gate} has no effect on method {method.name}; leave it out")


def _reached(stats: Stats) -> tuple[Layers, list[str]]:
    """Set aside layers that saw no token: nothing is known of them, so nothing in them is touched."""
    layers = {k: layer for k, layer in stats.model.layers.items() if k in stats.layers and stats.layers[k].tokens > 0}
    if not layers:
        raise StatsError("the statistics hold no token; calibrate on more data")
    if idle := [key for key in stats.model.layers if key not in layers]:
        return layers, [f"layers {', '.join(idle)} saw no token in calibration and are left untouched"]
    return layers, []


def _order(kind: Kind, layer: LayerFacts, values: np.ndarray) -> list[int]:
    """Return the ids of a layer as they are to be replaced: lowest score first, of equals the lower id.

    Where the kind needs equal counts in the groups of the router, the groups take turns.
    """
    groups = layer.groups if kind.renumbers else 1
    size = layer.experts // groups
    inside = np.argsort(values.reshape(groups, size), axis=1, kind="stable")  # [groups, size]
    return (inside + np.arange(groups)[:, None] * size).T.ravel().tolist()


def _model_order(kind: Kind, layers: Layers, order: Ids, scores: Scores) -> list[tuple[str, int]]:
    """Return (layer, id) of the whole model, lowest score first, without those that must stay in their layer."""
    pairs = [(key, i) for key, ids in order.items() for i in ids[: kind.most(layers[key])]]
    values = np.array([scores.layers[key][i] for key, i in pairs])
    return [pairs[at] for at in np.argsort(values, kind="stable")]


def _by_ratio(
    kind: Kind, facts: ModelFacts, layers: Layers, order: Ids, scores: Scores, settings: Selection
) -> tuple[Ids, list[str]]:
    ratio, total = settings.ratio or 0.0, sum(layer.experts for layer in layers.values())
    if settings.scope == "model":
        count, candidates = round(ratio * total), _model_order(kind, layers, order, scores)
        if count > len(candidates):
            raise PlanError(
                f"ratio {ratio:g} would leave a layer without an expert; {kind.name} can replace {len(candidates)} of "
                f"{total} at most (ratio {len(candidates) / total:.6g})"
            )
        ids = _gather(candidates[:count])
    else:
        ids = {key: order[key][: _share(kind, key, layer, ratio)] for key, layer in layers.items()}
    if any(ids.values()):
        return ids, []
    if settings.scope == "model":
        return ids, [f"ratio {ratio:g} replaces nothing; one expert is ratio {1 / total:.6g}"]
    widest = max(layer.experts for layer in layers.values())
    return ids, [f"ratio {ratio:g} replaces nothing; one expert in each layer is ratio {1 / widest:.6g}"]


def _share(kind: Kind, key: str, layer: LayerFacts, ratio: float) -> int:
    """Round the ratio to experts of one layer, refusing what the groups of a router cannot share."""
    count = round(ratio * layer.experts)
    if kind.renumbers and count % layer.groups:
        below = count // layer.groups * layer.groups
        works = {min(n, kind.most(layer)) for n in (below, below + layer.groups)}
        near = " or ".join(f"{n / layer.experts:.6g}" for n in sorted(works - {0} or {0}))
        raise PlanError(
            f"layer {key}: ratio {ratio:g} takes {count} experts, and {kind.name} must take the same number from each "
            f"of the {layer.groups} groups of the router; the nearest ratio that works is {near}"
        )
    return count


def _by_size(
    kind: Kind, facts: ModelFacts, layers: Layers, order: Ids, scores: Scores, settings: Selection
) -> tuple[Ids, list[str]]:
    """Find the smallest number of experts whose replacement brings the model down to the size."""
    size = parse_bytes(settings.size or "")
    if facts.nbytes <= size:
        return {}, [f"nothing to replace: the model's {format_bytes(facts.nbytes)} are within {format_bytes(size)}"]
    if settings.scope == "model":
        candidates = _model_order(kind, layers, order, scores)
        sizes = _sizes_of_model(kind, facts, layers, candidates)
    else:
        sizes = _sizes_by_layer(kind, facts, layers)
    if fitting := [count for count, nbytes in sizes.items() if nbytes <= size]:
        count = fitting[0]
        return _gather(candidates[:count]) if settings.scope == "model" else {k: order[k][:count] for k in layers}, []
    least = min(sizes, key=lambda count: sizes[count])
    ratio = least * (1 if settings.scope == "model" else len(layers)) / sum(x.experts for x in layers.values())
    raise PlanError(
        f"{format_bytes(size)} is out of reach: {kind.name} brings {facts.source} from {format_bytes(facts.nbytes)} "
        f"down to {format_bytes(sizes[least])} ({sizes[least]} bytes) at best, at ratio {ratio:.6g}"
    )


def _sizes_by_layer(kind: Kind, facts: ModelFacts, layers: Layers) -> dict[int, int]:
    """Return the bytes of the model by the number of experts replaced in every layer, ascending."""
    most = min(kind.most(layer) for layer in layers.values())
    step = math.lcm(*(layer.groups for layer in layers.values())) if kind.renumbers else 1
    added = {
        n: sum(kind.added_bytes(layer, tuple(range(n))) for layer in layers.values()) for n in range(0, most + 1, step)
    }
    return {n: facts.nbytes + more for n, more in added.items()}


def _sizes_of_model(kind: Kind, facts: ModelFacts, layers: Layers, candidates: list[tuple[str, int]]) -> dict[int, int]:
    """Return the bytes of the model by the number of candidates replaced, ascending."""
    counts, sizes = dict.fromkeys(layers, 0), {0: facts.nbytes}
    for n, (key, _) in enumerate(candidates, start=1):
        before = kind.added_bytes(layers[key], tuple(range(counts[key])))
        counts[key] += 1
        sizes[n] = sizes[n - 1] + kind.added_bytes(layers[key], tuple(range(counts[key]))) - before
    return sizes


def _gather(chosen: list[tuple[str, int]]) -> Ids:
    ids: Ids = {}
    for key, i in chosen:
        ids.setdefault(key, []).append(i)
    return ids


def _unseen(kind: Kind, layers: Layers, stats: Stats, ids: Ids) -> list[str]:
    """Say how many experts saw no token and what is done with them."""
    silent = {key: np.flatnonzero(np.asarray(stats.layers[key].count) == 0) for key in layers}
    number = sum(len(s) for s in silent.values())
    replaced = sum(len(np.intersect1d(s, ids.get(key, []))) for key, s in silent.items())
    fate = f"{replaced} of them {kind.unseen}, {number - replaced} stay as they are"
    return [f"{number} of {stats.model.experts} experts saw no token in calibration; {fate}"] if number else []
