"""Regroup neurons: those of dropped experts go to the kept expert that holds the most similar one, which is clustered.

Source: DERN (arXiv 2509.10377), as METHODS 10.7 has it. Letters: I width of an expert, D numbers that make one of its
neurons (`channels.neurons`), n those of them that are no biases, P neurons of one expert and what it receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from understudy.channels import channel_views, neurons, num_experts, set_neurons
from understudy.experts import copied

_CHUNK = 1 << 26  # similarities that are held at a time
_LEAST = 1e-9  # of the largest weight: an expert that saw nothing still has directions


def regrouped(experts: Any, dropped: Sequence[int], importance: Sequence[float], threshold: float, rounds: int) -> Any:
    """Return a copy of an experts module, still with all experts, whose kept ones took in neurons of the dropped.

    A kept expert to which nothing new is sent has its own weights, bit for bit.

    Args:
        experts: the live module that holds the experts of a layer; it is left as it is.
        dropped: rows whose neurons are sent elsewhere, or lost.
        importance: of each expert, not negative; only ratios matter.
        threshold: cosine that a neuron must exceed with the nearest of the kept experts.
        rounds: at most so many rounds of k-means.
    """
    made = copied(experts)
    with torch.no_grad():
        sent = destinations(experts, dropped, threshold)
        if sent:
            for name, weight in experts._parameters.items():
                if weight is not None:
                    made._parameters[name] = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        for row, received in sent.items():
            pool, weights = _pool(experts, row, received, importance)
            if len(pool) > len(neurons(experts, row)):
                set_neurons(made, row, clustered(pool, weights, *_lengths(experts), rounds=rounds))
    return made


def destinations(experts: Any, dropped: Sequence[int], threshold: float) -> dict[int, list[tuple[int, Tensor, Tensor]]]:
    """Say where the neurons of dropped experts go: by kept expert, (dropped expert, its neurons, the nearest of each).

    Neurons are compared by the cosine of up row and down column, without the gate row, which is slightly better; of
    equally near ones the first counts. A neuron whose nearest is not nearer than the threshold goes nowhere.
    """
    sent: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
    kept = [row for row in range(num_experts(experts)) if row not in set(dropped)]
    for source in dropped:
        own = _directions(experts, source)
        best = torch.full((len(own),), threshold, dtype=own.dtype, device=own.device)
        where, nearest = torch.full((2, len(own)), -1, dtype=torch.long, device=own.device)
        for row in kept:
            cosine, place = _nearest(own, _directions(experts, row))
            cosine = cosine.clamp(max=1)  # two copies are equally near, however the sums are rounded
            better = cosine > best
            best[better], nearest[better] = cosine[better], place[better]
            where[better] = row
        for row in kept:
            mine = (where == row).nonzero().flatten()
            if len(mine):
                sent.setdefault(row, []).append((source, mine, nearest[mine]))
    return sent


def clustered(pool: Tensor, weights: Tensor, first: int, vectors: int, count: int, *, rounds: int) -> Tensor:
    """Cluster neurons `[P, D]` by weighted spherical k-means into as many as an expert has: `[count, D]`.

    Only directions count, those of all weights of a neuron together; norms are made equal for that, and a cluster gets
    the weighted mean of its members' norms and biases in the end. A neuron that is alone in its cluster stays as it is.
    A cluster without any member takes the neuron that is least like the centre of its own.

    Args:
        pool: neurons, those of the expert itself first.
        weights: positive, of each neuron.
        first: length of the gate row (of the up row where there is no gate), which comes first in a neuron; the largest
            of those, by their norm, are the seeds, of equals the first.
        vectors: n, what a neuron holds before its biases.
        count: clusters.
        rounds: at most so many, fewer where nothing changes any more.
    """
    norms = pool[:, :vectors].norm(dim=1)
    unit = normalize(pool[:, :vectors], dim=1)
    seeds = pool[:, :first].norm(dim=1).argsort(descending=True, stable=True)[:count].sort().values
    centres, place = unit[seeds], torch.full((len(pool),), -1, dtype=torch.long, device=pool.device)
    for _ in range(rounds):
        cosine, found = _nearest(unit, centres)
        found = _without_gaps(cosine, found, count)
        if torch.equal(found, place):
            break
        place = found
        centres = normalize(_sums(weights[:, None] * unit, place, count), dim=1)
    numbers = torch.stack((norms * weights, weights), 1)
    biases = weights[:, None] * pool[:, vectors:]
    sums = _sums(torch.cat((numbers, biases), 1), place, count)
    total = sums[:, 1:2].clamp_min(torch.finfo(sums.dtype).tiny)
    made = torch.cat((centres * (sums[:, :1] / total), sums[:, 2:] / total), 1)
    alone = torch.bincount(place, minlength=count)[place] == 1
    made[place[alone]] = pool[alone]
    return made


def _pool(
    experts: Any, row: int, received: Sequence[tuple[int, Tensor, Tensor]], importance: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Neurons of a kept expert and those that it receives, and what each weighs; the same one twice becomes one."""
    own = neurons(experts, row)
    exact = torch.promote_types(own.dtype, torch.float32)
    most = max(importance)
    share = [max(float(x) / most, _LEAST) if most > 0 else 1.0 for x in importance]
    weights = torch.full((len(own),), share[row], dtype=exact, device=own.device)
    pool, weighing = [own.to(exact)], [weights]
    for source, places, nearest in received:
        given = neurons(experts, source)[places]
        same = (given == own[nearest]).all(1)
        weights += torch.bincount(nearest[same], minlength=len(own)).to(exact) * share[source]
        new = given[~same].to(exact)
        pool.append(new)
        weighing.append(new.new_full((len(new),), share[source]))
    return torch.cat(pool), torch.cat(weighing)


def _without_gaps(cosine: Tensor, place: Tensor, count: int) -> Tensor:
    """Move the neurons that are farthest from their centres, the farthest first, to clusters that have none."""
    empty = (torch.bincount(place, minlength=count) == 0).nonzero().flatten()
    if len(empty):
        place = place.clone()
        place[cosine.argsort(stable=True)[: len(empty)]] = empty
    return place


def _sums(values: Tensor, place: Tensor, count: int) -> Tensor:
    """Add up rows of values by cluster, in their order on any device: `[count, ...]`."""
    lengths = torch.bincount(place, minlength=count)
    ordered = values[place.argsort(stable=True)]
    return torch.segment_reduce(ordered, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)


def _nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the largest inner product with another, and which that is; of equals the first."""
    step = max(1, _CHUNK // len(others))
    found = [(part @ others.T).max(1) for part in rows.split(step)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _directions(experts: Any, row: int) -> Tensor:
    """Up row and down column of every neuron of an expert, as unit vectors; zeros stay zeros."""
    views = channel_views(experts)
    both = torch.cat((views["up"][row], views["down"][row]), 1)
    return normalize(both.to(torch.promote_types(both.dtype, torch.float32)), dim=1)


def _lengths(experts: Any) -> tuple[int, int, int]:
    """Length of the first part of a neuron, of all its parts but the biases, and how many neurons an expert has."""
    views = channel_views(experts)
    sizes = {role: view.shape[2] for role, view in views.items()}
    vectors = sum(size for role, size in sizes.items() if not role.endswith("bias"))
    return next(iter(sizes.values())), vectors, next(iter(views.values())).shape[1]
