"""LightMoE: experts with little of their layer's gates share a few bases, and each keeps a low-rank part of its own.

Source: arXiv 2603.12645, METHODS 1.2 to 1.4 and 1.7. The choice is made here; `recover` trains what comes out of it,
while the originals fade out.

Letter: E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from understudy.budgets import in_parameters
from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.grouping import Groups, clustered, joined, led, ranked
from understudy.kinds import added_bytes
from understudy.kinds.shared_base import SHARED_BASE, SharedBase
from understudy.methods import Choice, Mass, Method, Problem
from understudy.ranking import Ids, Key, mass_keys, mass_note, order_in, remarks
from understudy.stats import ExpertStats

_CLOSE = 1 - 1e-9  # a ratio that is a whole number of experts but for rounding takes no further one
_MASS = Mass()  # eq. 3 as in all experiments


def choose(problem: Problem, ratio: float) -> Choice:
    """Find the smallest threshold p_hat of the model that frees the share of the bytes, and group in each layer.

    Raises:
        PlanError: the ratio is out of reach, or the rank above the width of the experts.
    """
    return share(problem, ratio, problem.settings.bases)


def most(problem: Problem) -> float:
    """Return the share of the bytes that goes when every layer keeps one expert beside its bases."""
    return reach(problem, problem.settings.bases)


def share(problem: Problem, ratio: float, bases: int) -> Choice:
    """Choose experts and let them share so many bases a layer; with 0 each has its low-rank part alone.

    Experts go in the order of the thresholds at which they do (`ranking.mass_keys`), until enough bytes are free, less
    what bases and low-rank parts take. Layers in which that would free nothing stay as they are. With `--scope layer`
    every layer gives up the same share of its experts.

    Raises:
        PlanError: the ratio is out of reach, or the rank above the width of the experts.
    """
    kind = _kind(problem, bases)
    for key, layer in problem.layers.items():
        kind.check_rank(key, layer)
    problem = replace(problem, kind=kind)
    freed = _freed(problem, bases)
    ids, threshold = _until(problem, ratio, bases, freed)
    gone = {key: x for key, x in ids.items() if freed[key][len(x)]}
    entries: dict[str, dict[str, Entry]] = {}
    for key, x in gone.items():
        assert problem.scores is not None
        groups = group(problem.stats.layers[key], problem.scores.layers[key], x, bases or 1, problem.settings.grouping)
        entries[key] = {kind.name: tuple(sorted((first, *sorted(others)) for first, *others in groups))}
    if not entries:
        return Choice({}, scores=problem.scores, notes=(f"ratio {ratio:g} replaces nothing",))
    how: dict[str, dict[str, bool | int | float | str]] = {kind.name: {"rank": kind.rank}}
    starts: dict[str, str | int] = {"start": kind.start} if kind.start == "residual" else {"seed": kind.seed}
    how[kind.name] |= starts if kind.base else {"base": False}
    lost = [len(gone.get(key, ())) for key in problem.layers]
    by_mass = problem.settings.scope == "mass"
    notes = [mass_note(threshold, lost) if by_mass else f"layers lose {min(lost)} to {max(lost)} experts"]
    if idle := [key for key, x in ids.items() if x and key not in gone]:
        notes.append(f"layers {', '.join(idle)} stay as they are: bases for so few experts would free no bytes")
    counting = in_parameters(problem.stats.model)
    parameters = -added_bytes(entries, counting, how) / counting.nbytes
    notes.append(f"{parameters:.2%} of the parameters of the whole model go, {np.mean(lost):.4g} experts a layer")
    return Choice(entries, how, problem.scores, (*notes, *remarks(problem, gone)))


def reach(problem: Problem, bases: int) -> float:
    """Return the largest ratio that `share` can meet."""
    freed = _freed(replace(problem, kind=_kind(problem, bases)), bases)
    return sum(by_count[-1] for by_count in freed.values()) / _total(problem)


def group(stats: ExpertStats, mass_E: np.ndarray, ids: list[int], bases: int, grouping: str) -> Groups:
    """Group the replaced experts of a layer around those with the largest gates, one for each base.

    The others join the one whose router logits are most like their own: by the cosine of the two series, averaged over
    sequences. With `kmeans` the series are clustered, starting from the same experts. The first of a group is the one
    with the largest gates.
    """
    dominants = ranked(mass_E, ids)[:bases]
    others = sorted(set(ids) - set(dominants))
    if len(dominants) == 1:
        return [[*dominants, *others]]
    if grouping == "kmeans":
        return led(clustered(np.asarray(stats.logit_gram), ids, dominants), mass_E)
    return joined(np.asarray(stats.logit_cos_sum) / float(stats.sequences), dominants, others)


def _kind(problem: Problem, bases: int) -> SharedBase:
    settings = problem.settings
    start = {"start": settings.start} if bases else {}
    return SHARED_BASE.having({"rank": settings.rank, "base": bases > 0, "seed": settings.seed} | start)


def _order(problem: Problem) -> Ids:
    """Return what each layer can give up, the smallest share of its gates first."""
    assert problem.scores is not None
    values = problem.scores.layers
    return {key: order_in(problem, key, values[key])[: problem.kind.most(x)] for key, x in problem.layers.items()}


def _keys(problem: Problem) -> list[Key]:
    """Return the order in which experts of the whole model go."""
    order = _order(problem)
    if problem.settings.scope == "mass":
        return mass_keys(problem, _MASS, order)
    experts = {key: layer.experts for key, layer in problem.layers.items()}
    keys = [((rank + 1) / experts[key], rank, key, i) for key, ids in order.items() for rank, i in enumerate(ids)]
    return sorted(keys, key=lambda k: k[:2])


def _until(problem: Problem, ratio: float, bases: int, freed: dict[str, list[int]]) -> tuple[Ids, float]:
    """Return who goes until the share of the bytes is free, and the threshold at which the last of them does."""
    ids: Ids = {key: [] for key in problem.layers}
    wanted, total, found = ratio * _total(problem) * _CLOSE, _total(problem), 0
    if wanted <= 0:
        return ids, 0.0
    keys, alone = _keys(problem), problem.settings.scope == "mass"
    for number, (at, _, key, i) in enumerate(keys, start=1):
        found -= freed[key][len(ids[key])]
        ids[key].append(i)
        found += freed[key][len(ids[key])]
        together = not alone and number < len(keys) and keys[number][0] == at  # the same share of every layer
        if found >= wanted and not together:
            return ids, at
    flags = ["ratio", "rank", *(["bases"] if bases > 1 else [])]
    best = math.floor(found / total * 1e6) / 1e6  # within reach when it is asked for
    raise PlanError(
        f"ratio {ratio:g} is out of reach: {bases or 'no'} base{'s' * (bases != 1)} a layer and rank "
        f"{problem.settings.rank} leave {best:.6f} of the bytes in routed experts to remove at most; lower "
        f"--{' or --'.join(flags)}"
    )


def _freed(problem: Problem, bases: int) -> dict[str, list[int]]:
    """Return the bytes that each layer saves by how many of its experts go, from 0 on; 0 where it would grow.

    Sizes are linear in groups and experts (eq. 5), so two small entries tell all others.
    """
    freed = {}
    for key, ids in _order(problem).items():
        alone, pair = (problem.kind.added_bytes(problem.layers[key], (members,)) for members in ((0,), (0, 1)))
        of_expert = pair - alone
        of_base = alone - of_expert
        freed[key] = [max(0, -of_base * min(n, bases or 1) - of_expert * n) for n in range(len(ids) + 1)]
    return freed


def _total(problem: Problem) -> int:
    return sum(layer.experts * layer.expert_bytes for layer in problem.layers.values())


def direct(name: str, bases: int, paper: str) -> Method:
    """Return the method that chooses experts as LightMoE does and replaces them at once, with these bases a layer."""
    return Method(
        name=name,
        score="lightmoe",
        kind="shared_base",
        kinds=("shared_base",),
        scopes=("mass", "layer"),
        choose=partial(share, bases=bases),
        needs=("count",),
        options=("rank", "start") if bases else ("rank",),
        most=partial(reach, bases=bases),
        paper=paper,
    )


LIGHTMOE = Method(
    name="lightmoe",
    fades=True,
    score="lightmoe",
    kind="shared_base",
    kinds=("shared_base",),
    scopes=("mass", "layer"),
    choose=choose,
    needs=("count", "sequences", "logit_cos_sum", "logit_gram"),
    options=("bases", "rank", "start", "grouping"),
    most=most,
    mass=_MASS,
    paper="LightMoE: replaced experts share bases and add low-rank parts, arXiv 2603.12645",
)
