"""Group the experts of a layer that are to become one: what the methods that merge have in common.

Letters: E experts of a layer, r groups. Groups list original ids, the dominant first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.methods import Problem
from understudy.stats import ExpertStats

Groups = list[list[int]]
_ROUNDS = 100  # of k-means at most


def cosines(gram: np.ndarray) -> np.ndarray:
    """Turn inner products `[E, E]` into cosines; 0 where one of the two is the zero vector."""
    length = np.sqrt(np.maximum(np.diagonal(gram), 0))
    scale = np.outer(length, length)
    return np.divide(gram, scale, out=np.zeros(gram.shape), where=scale > 0)


def linked(distance: np.ndarray, ids: Sequence[int], groups: int) -> Groups:
    """Cluster by average linkage (UPGMA): join the two clusters whose members are nearest on average, until r are left.

    `distance` is symmetric, `[E, E]`; only `ids` are clustered. Exactly r clusters come out, also where distances are
    equal.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    n = len(ids)
    clusters = {at: [i] for at, i in enumerate(ids)}
    if groups < n:
        joins = linkage(squareform(distance[np.ix_(ids, ids)], checks=False), "average")
        for number, (a, b) in enumerate(joins[: n - groups, :2].astype(int)):  # scipy numbers new clusters from n on
            clusters[n + number] = clusters.pop(a) + clusters.pop(b)
    return list(clusters.values())


def ranked(values: np.ndarray, ids: Iterable[int] | None = None) -> list[int]:
    """Return ids by value, largest first, of equals the lower id first."""
    chosen = range(len(values)) if ids is None else ids
    return sorted(chosen, key=lambda i: (-float(values[i]), i))


def joined(similarity: np.ndarray, dominants: Sequence[int], others: Iterable[int]) -> Groups:
    """Let each of the others join the dominant that it is most similar to, of equals the one listed first."""
    groups: dict[int, list[int]] = {i: [i] for i in dominants}
    for i in others:
        groups[max(dominants, key=lambda d: float(similarity[d, i]))].append(i)
    return list(groups.values())


def led(groups: Groups, count: np.ndarray) -> Groups:
    """Put the most frequent member of each group first."""
    return [ranked(count, members) for members in groups]


def clustered(gram: np.ndarray, ids: Sequence[int], centres: Sequence[int]) -> Groups:
    """Cluster vectors by k-means (Lloyd) of which inner products `[E, E]` are known; only `ids`, starting at `centres`.

    As many clusters come out as there are centres: one that loses its last member gets the vector that is farthest from
    the centre of its own.
    """
    inner, clusters = gram[np.ix_(ids, ids)], len(centres)
    members = np.zeros((len(ids), clusters))  # of a cluster: a column of 0 and 1
    members[[list(ids).index(i) for i in centres], range(clusters)] = 1
    for _ in range(_ROUNDS):
        mean = members / members.sum(0)
        along = inner @ mean
        distance = np.diagonal(inner)[:, None] - 2 * along + (mean * along).sum(0)  # squared, to every centre
        nearest = distance.argmin(1)
        for empty in sorted(set(range(clusters)) - set(nearest.tolist())):
            with_others = np.bincount(nearest, minlength=clusters)[nearest] > 1
            nearest[np.where(with_others, distance[range(len(ids)), nearest], -np.inf).argmax()] = empty
        if (members[range(len(ids)), nearest] == 1).all():
            break
        members = np.eye(clusters)[nearest]
    return [[ids[at] for at in np.flatnonzero(column).tolist()] for column in members.T]


def merge_entry(groups: Groups) -> Entry:
    """Write groups as a plan lists them under `merge`: without the experts that are alone."""
    return tuple(sorted((first, *sorted(others)) for first, *others in groups if others))


def free_ids(problem: Problem, key: str) -> list[int]:
    """Return the experts of a layer that may be merged: all but the protected ones."""
    protected = problem.protected.get(key, frozenset())
    return [i for i in range(problem.layers[key].experts) if i not in protected]


def most_by_layer(problem: Problem) -> float:
    """Return the largest ratio at which every layer still has an expert beside the protected ones."""
    return min(max(len(free_ids(problem, key)) - 1, 0) / layer.experts for key, layer in problem.layers.items())


def by_layer(
    problem: Problem, ratio: float, group: Callable[[str, ExpertStats, list[int], int], Groups]
) -> tuple[dict[str, dict[str, Entry]], tuple[str, ...]]:
    """Merge the same share of the experts of every layer; return entries of a plan, and notes for people.

    `group` gets the key of a layer, its sums, the ids that may be merged and r, and returns r groups of these ids.

    Raises:
        PlanError: the ratio would leave no expert of a layer.
    """
    found = {}
    for key, layer in problem.layers.items():
        ids, away = free_ids(problem, key), round(ratio * layer.experts)
        if not away:
            continue
        if away >= len(ids):
            most, beside = max(len(ids) - 1, 0), " beside the protected ones" if len(ids) < layer.experts else ""
            raise PlanError(
                f"layer {key}: ratio {ratio:g} would leave no expert{beside}; at most {most} of {layer.experts} can be "
                f"merged away (ratio {most / layer.experts:.6g})"
            )
        found[key] = group(key, problem.stats.layers[key], ids, len(ids) - away)
        assert len(found[key]) == len(ids) - away and sorted(i for g in found[key] for i in g) == ids
    widest = max(layer.experts for layer in problem.layers.values())
    nothing = f"ratio {ratio:g} merges nothing; one expert in each layer is ratio {1 / widest:.6g}"
    return {key: {"merge": merge_entry(groups)} for key, groups in found.items()}, notes(problem, found, nothing)


def notes(problem: Problem, found: dict[str, Groups], nothing: str) -> tuple[str, ...]:
    """Say that nothing is merged, in these words, and how many experts saw no token and are merged all the same."""
    if not found:
        return (nothing,)
    silent = {key: set(np.flatnonzero(np.asarray(problem.stats.layers[key].count) == 0)) for key in problem.layers}
    number = sum(map(len, silent.values()))
    grouped = {key: {i for members in groups if len(members) > 1 for i in members} for key, groups in found.items()}
    merged = sum(len(silent[key] & ids) for key, ids in grouped.items())
    if not number:
        return ()
    total = sum(layer.experts for layer in problem.layers.values())
    said = f"{number} of {total} experts saw no token in calibration; {merged} of them are merged with others"
    return (f"{said}, {number - merged} stay as they are",)
