"""Ranking: which experts go where a method scores each of them; in each layer, over the model, or by mass.

Letter: E experts.
"""

from __future__ import annotations

import math

import numpy as np

from understudy.budgets import Target, target_of
from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.kinds.modulate import FIT_NEEDS
from understudy.kinds.slim import REFIT_NEEDS
from understudy.methods import Choice, Mass, Method, Problem, scope_of
from understudy.protection import SUPER_NEEDS
from understudy.recipe import Selection
from understudy.scores import get_score, per

Ids = dict[str, list[int]]  # by layer, experts as they are to be replaced, the first first
Pairs = list[tuple[str, int]]  # the same over the whole model
Key = tuple[float, int, str, int]  # one of an order of the whole model: rank by, then by, layer, id
MASS_NEEDS = ("tokens", "logit_norm_sum")
_LEAST, _MOST = 0.8, 1.2  # bounds of a layer's threshold over that of the model, LightMoE eq. 3


def planning_needs(method: Method, settings: Selection) -> set[str]:
    """Return the fields of `ExpertStats` that a plan is made from; what its kinds need is not among them."""
    needs = {*method.needs, *(get_score(method.score).needs if method.score else ())}
    if scope_of(method, settings) == "mass" and _alpha(method.mass, settings):
        needs |= set(MASS_NEEDS)
    asked = ((settings.keep_super, SUPER_NEEDS), (settings.fit, FIT_NEEDS), (settings.refit, REFIT_NEEDS))
    return needs.union(*(more for wanted, more in asked if wanted))


def choose_lowest(problem: Problem, mass: Mass) -> Choice:
    """Replace the experts that score lowest, as many as the ratio or the size asks for.

    Raises:
        PlanError: no choice meets the ratio or the size.
    """
    assert problem.scores is not None
    kind, values = problem.kind, problem.scores.layers
    order = {key: order_in(problem, key, values[key]) for key in problem.layers}
    keys, pairs = [], None
    if problem.settings.scope != "layer":
        order = {key: ids[: kind.most(problem.layers[key])] for key, ids in order.items()}
        by_mass = problem.settings.scope == "mass"
        keys = mass_keys(problem, mass, order) if by_mass else _own_keys(order, values)
        pairs = [(key, i) for _, _, key, i in keys]
    target = target_of(problem.settings, problem.stats.model)
    ids, notes = _by_size(problem, target, order, pairs) if target else _by_ratio(problem, order, pairs)
    if problem.settings.scope == "mass" and any(ids.values()):
        lost = [len(ids.get(key, ())) for key in order]
        notes.append(mass_note(keys[sum(lost) - 1][0], lost))
    entries: dict[str, dict[str, Entry]] = {key: {kind.name: tuple(sorted(x))} for key, x in ids.items() if x}
    return Choice(entries, scores=problem.scores, notes=(*notes, *remarks(problem, ids)))


def mass_note(threshold: float, lost: list[int]) -> str:
    """Say what threshold of the model was found, and what it means for the layers."""
    return f"by mass: the threshold is {threshold:.4g}; layers lose {min(lost)} to {max(lost)} experts"


def remarks(problem: Problem, ids: Ids) -> list[str]:
    """Say where scores tell nothing, and how many experts saw no token and what is done with them."""
    assert problem.scores is not None
    notes, values = [], problem.scores.layers
    if alike := [key for key, x in ids.items() if x and np.ptp(values[key]) == 0]:
        notes.append(f"layers {', '.join(alike)}: every expert scores the same, so that the lowest ids go")
    return notes + _unseen(problem, ids)


def order_in(problem: Problem, key: str, values_E: np.ndarray) -> list[int]:
    """Return the ids of a layer that may be replaced: lowest score first, of equals the lower id.

    Where the kind needs equal counts in the groups of the router, the groups take turns.
    """
    layer, protected = problem.layers[key], sorted(problem.protected.get(key, ()))
    groups = layer.groups if problem.kind.renumbers else 1
    size = layer.experts // groups
    values_E = values_E.copy()
    values_E[protected] = np.inf
    inside = np.argsort(values_E.reshape(groups, size), axis=1, kind="stable")  # [groups, size]
    free = size - max(sum(i // size == group for i in protected) for group in range(groups))
    return (inside[:, :free] + np.arange(groups)[:, None] * size).T.ravel().tolist()


# --- orders of the whole model ---


def _own_keys(order: Ids, values: dict[str, np.ndarray]) -> list[Key]:
    """Rank by the score; of equals the first of the model."""
    return _sorted([(float(values[key][i]), 0, key, i) for key, ids in order.items() for i in ids])


def mass_keys(problem: Problem, mass: Mass, order: Ids) -> list[Key]:
    """Rank by the threshold of the model at which an expert goes (LightMoE, arXiv 2603.12645, 2.2).

    A layer gives up its lowest experts until their share of its mass exceeds p_j, which is the model's threshold times
    a factor of the layer. So the threshold at which an expert goes is the share of those below it (or of those and its
    own, where the expert that crosses stays) over that factor, and no search is needed. Of equals, such as experts
    without any mass, layers take turns.

    Raises:
        PlanError: a score is negative.
    """
    assert problem.scores is not None
    factors, keys = _factors(problem, mass), []
    for key, ids in order.items():
        values = problem.scores.layers[key]
        if (negative := values < 0).any():
            name = problem.scores.name
            raise PlanError(
                f"layer {key}: the {name} score of expert {negative.argmax()} is negative, so it is no mass"
            )
        shares = np.cumsum(per(values[ids], values.sum()))
        at = np.concatenate(([0.0], shares[:-1])) if mass.crossing else shares
        keys += [(float(at[rank]) / factors[key], rank, key, i) for rank, i in enumerate(ids)]
    return _sorted(keys)


def _sorted(keys: list[Key]) -> list[Key]:
    return sorted(keys, key=lambda k: k[:2])


def _factors(problem: Problem, mass: Mass) -> dict[str, float]:
    """Return by layer what the threshold of the model is multiplied with, for the norm of the router's logits."""
    if not (alpha := _alpha(mass, problem.settings)):
        return dict.fromkeys(problem.layers, 1.0)
    seen = {key: layer for key, layer in problem.stats.layers.items() if layer.tokens > 0}  # kept layers among them
    norms = {key: float(layer.logit_norm_sum / layer.tokens) for key, layer in seen.items()}
    mean = sum(norms.values()) / len(norms) or 1.0
    return {key: min(max(math.exp(-alpha * (norms[key] / mean - 1)), _LEAST), _MOST) for key in problem.layers}


def _alpha(mass: Mass, settings: Selection) -> float:
    return mass.alpha if settings.alpha is None else settings.alpha


# --- budgets ---


def _by_ratio(problem: Problem, order: Ids, pairs: Pairs | None) -> tuple[Ids, list[str]]:
    kind, layers, ratio = problem.kind, problem.layers, problem.settings.ratio or 0.0
    if pairs is None:
        ids = {key: order[key][: _share(problem, key, len(order[key]))] for key in layers}
        least = max(layer.experts for layer in layers.values())
        nothing = f"ratio {ratio:g} replaces nothing; one expert in each layer is ratio {1 / least:.6g}"
    else:
        total = sum(layer.experts for layer in layers.values())
        count = round(ratio * total)
        if count > len(pairs):
            why = (
                "replace an expert that is to stay"
                if any(problem.protected.values())
                else "leave a layer without an expert"
            )
            raise PlanError(
                f"ratio {ratio:g} would {why}; {kind.name} can replace {len(pairs)} of {total} at most "
                f"(ratio {len(pairs) / total:.6g})"
            )
        ids = _gather(pairs[:count])
        nothing = f"ratio {ratio:g} replaces nothing; one expert is ratio {1 / total:.6g}"
    return ids, [] if any(ids.values()) else [nothing]


def _share(problem: Problem, key: str, free: int) -> int:
    """Round the ratio to experts of one layer, refusing what is protected or what groups of a router cannot share."""
    kind, layer, ratio = problem.kind, problem.layers[key], problem.settings.ratio or 0.0
    count = round(ratio * layer.experts)
    if kind.renumbers and count % layer.groups:
        below = count // layer.groups * layer.groups
        works = {min(n, kind.most(layer), free) for n in (below, below + layer.groups)}
        near = " or ".join(f"{n / layer.experts:.6g}" for n in sorted(works - {0} or {0}))
        raise PlanError(
            f"layer {key}: ratio {ratio:g} takes {count} experts, and {kind.name} must take the same number from each "
            f"of the {layer.groups} groups of the router; the nearest ratio that works is {near}"
        )
    if count > free and problem.protected.get(key):
        raise PlanError(
            f"layer {key}: ratio {ratio:g} takes {count} experts, and {len(problem.protected[key])} super experts are "
            f"to stay; {free} can go at most (ratio {free / layer.experts:.6g}), or leave out --keep-super"
        )
    return count


def _by_size(problem: Problem, target: Target, order: Ids, pairs: Pairs | None) -> tuple[Ids, list[str]]:
    """Find the smallest number of experts whose replacement brings the model down to a size."""
    layers = problem.layers
    sizes = _sizes_by_layer(problem, target, order) if pairs is None else _sizes_of_model(problem, target, pairs)
    if fitting := [count for count, size in sizes.items() if size <= target.most]:
        count = fitting[0]
        return ({key: order[key][:count] for key in layers} if pairs is None else _gather(pairs[:count])), []
    least = min(sizes, key=lambda count: sizes[count])
    ratio = least * (len(layers) if pairs is None else 1) / sum(layer.experts for layer in layers.values())
    raise target.out_of_reach(problem.kind.name, sizes[least], ratio)


def _sizes_by_layer(problem: Problem, target: Target, order: Ids) -> dict[int, int]:
    """Return the size of the model by the number of experts replaced in every layer, ascending."""
    kind, nbytes = problem.kind, target.facts.nbytes
    layers = {key: target.facts.layers[key] for key in problem.layers}
    most = min(min(kind.most(layer), len(order[key])) for key, layer in layers.items())
    step = math.lcm(*(layer.groups for layer in layers.values())) if kind.renumbers else 1
    return {n: nbytes + sum(_added(kind, x, n) for x in layers.values()) for n in range(0, most + 1, step)}


def _sizes_of_model(problem: Problem, target: Target, pairs: Pairs) -> dict[int, int]:
    """Return the size of the model by the number of experts replaced, ascending."""
    kind, layers, counts = problem.kind, target.facts.layers, dict.fromkeys(problem.layers, 0)
    sizes = {0: target.facts.nbytes}
    for n, (key, _) in enumerate(pairs, start=1):
        counts[key] += 1
        more = _added(kind, layers[key], counts[key]) - _added(kind, layers[key], counts[key] - 1)
        sizes[n] = sizes[n - 1] + more
    return sizes


def _added(kind: Kind, layer: LayerFacts, count: int) -> int:
    return kind.added_bytes(layer, tuple(range(count)))


def _gather(pairs: Pairs) -> Ids:
    ids: Ids = {}
    for key, i in pairs:
        ids.setdefault(key, []).append(i)
    return ids


def _unseen(problem: Problem, ids: Ids) -> list[str]:
    """Say how many experts saw no token and what is done with them."""
    if problem.stats.data.get("weights_only"):
        return []
    silent = {key: np.flatnonzero(np.asarray(problem.stats.layers[key].count) == 0) for key in problem.layers}
    number = sum(len(s) for s in silent.values())
    replaced = sum(len(np.intersect1d(s, ids.get(key, []))) for key, s in silent.items())
    fate = f"{replaced} of them {problem.kind.unseen}, {number - replaced} stay as they are"
    total = problem.stats.model.experts
    return [f"{number} of {total} experts saw no token in calibration; {fate}"] if number else []
