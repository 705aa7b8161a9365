"""Search over how many experts each layer gives up: evolution at a fixed total.

Source: EvoESAP (arXiv 2603.06003): the order inside a layer is left as a score has it, the counts evolve, and a
mutation moves a part of the budget from one layer to another; crossover and the use of a fitness are EEP's (arXiv
2407.00945).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Evolution:
    """How long and how widely to search.

    Attributes:
        generations: rounds after the first.
        population: candidates in a round.
        parents: how many of the best live on and have children.
        stride: the most experts that one mutation moves.
        seed: of everything random.
    """

    generations: int = 10
    population: int = 16
    parents: int = 4
    stride: int = 4
    seed: int = 0


def evolve(
    start: Counts,
    most: Sequence[int],
    fitness: Callable[[Counts], float],
    settings: Evolution,
    done: Callable[[int, Counts, float], None] | None = None,
) -> Counts:
    """Return the counts of the highest fitness that the search met, `start` among them; equal seeds give equal ends.

    Args:
        start: experts replaced in each layer; the total stays as it is.
        most: how many a layer can give up at most.
        fitness: of counts, higher is better; asked once for each.
        settings: of the search.
        done: called after each generation with its number, the best so far and its fitness.
    """
    rng = np.random.default_rng(settings.seed)
    known: dict[Counts, float] = {}

    def rank(candidates: list[Counts]) -> list[Counts]:
        for counts in candidates:
            if counts not in known:
                known[counts] = fitness(counts)
        return sorted(set(candidates), key=lambda counts: (-known[counts], counts))

    pool = rank(_fill([start], most, settings, rng))
    for generation in range(settings.generations + 1):
        if done:
            done(generation, pool[0], known[pool[0]])
        if generation < settings.generations:
            pool = rank(_fill(pool[: settings.parents], most, settings, rng))
    return pool[0]


def _fill(parents: list[Counts], most: Sequence[int], settings: Evolution, rng: np.random.Generator) -> list[Counts]:
    """Add children until the round is full; small spaces may not have that many different ones."""
    found = list(parents)
    for _ in range(20 * settings.population):
        if len(found) >= settings.population:
            break
        first, second = (parents[int(i)] for i in rng.integers(len(parents), size=2))
        child = _mutated(_crossed(first, second, most, rng), most, settings.stride, rng)
        if child not in found:
            found.append(child)
    return found


def _crossed(a: Counts, b: Counts, most: Sequence[int], rng: np.random.Generator) -> Counts:
    """Take each layer's count from either parent, then put the total right in layers drawn at random."""
    child = np.where(rng.random(len(a)) < 0.5, a, b)
    while (short := sum(a) - int(child.sum())) != 0:
        open_layers = np.flatnonzero(child < most) if short > 0 else np.flatnonzero(child > 0)
        child[rng.choice(open_layers)] += 1 if short > 0 else -1
    return tuple(int(n) for n in child)


def _mutated(counts: Counts, most: Sequence[int], stride: int, rng: np.random.Generator) -> Counts:
    """Move up to `stride` experts of the budget from one layer to another."""
    if len(counts) < 2:
        return counts
    giver, taker = (int(i) for i in rng.choice(len(counts), size=2, replace=False))
    room = min(counts[giver], most[taker] - counts[taker], stride)
    moved = int(rng.integers(1, room + 1)) if room > 0 else 0
    child = list(counts)
    child[giver] -= moved
    child[taker] += moved
    return tuple(child)
