"""CD-MoE: a few experts of a layer run for all tokens with constant weights; the other experts and the router go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from understudy.budgets import target_of
from understudy.condensed.choosing import SUM_NEEDS, Chosen, Products, fewest, from_sums, removed
from understudy.entries import Entry
from understudy.facts import LayerFacts
from understudy.methods import Choice, Method, Problem, Task

Entries = dict[str, dict[str, Entry]]


def choose(problem: Problem, ratio: float) -> Choice:
    """Choose from sums alone: experts by their distance from the routed output, layers by the error that is left.

    The paper searches both on the model, as `search` does; the error of a single layer is a cheap stand-in for what
    several of them do to the model. Layers with a protected expert stay.

    Raises:
        PlanError: all layers together do not reach what is asked.
    """
    chosen, error = _from_sums(problem)
    taken = fewest(_open(problem, error), _so_much(problem, chosen, ratio), _wanted(problem, ratio))
    told = ", ".join(f"{key} ({value:.4f})" for key, value in error.items())
    notes = (f"layers by the relative error of what they put out condensed, least first: {told}",)
    return Choice(_entries(problem, chosen, taken), notes=(*notes, *_remarks(problem, chosen, taken)))


def most(problem: Problem) -> float:
    """Return the share of the experts' bytes that can go."""
    chosen, error = _from_sums(problem)
    return sum(removed(problem.layers[key], chosen[key]) for key in _open(problem, error)) / _routed(problem)


def search(task: Task) -> Choice:
    """Choose as the paper does, by what the model puts out: experts in each layer by itself, then layers in turn.

    Mean gates are those of the statistics; all else is of the text that is searched on.

    Raises:
        PlanError: all layers together do not reach what is asked.
        UnsupportedModelError: the family does not allow the criterion.
    """
    from understudy.condensed.searching import search_model

    problem, ratio = task.problem, task.problem.settings.ratio or 0.0
    chosen: dict[str, Chosen] = {}
    enough, limit = _enough(problem, chosen, ratio), len(problem.stats.model.layers) - 1
    found, notes = search_model(task, chosen, lambda taken: len(taken) >= limit or enough(taken))
    taken = fewest(_open(problem, found.layers), enough, _wanted(problem, ratio))
    return Choice(_entries(problem, chosen, taken), notes=(*notes, *_remarks(problem, chosen, taken)))


def _from_sums(problem: Problem) -> tuple[dict[str, Chosen], dict[str, float]]:
    """Choose the experts of each layer; with the relative error that is left, least first, of equals the first."""
    settings, layers = problem.settings, problem.stats.layers
    free = [key for key in problem.layers if not problem.protected.get(key)]
    chosen = {key: from_sums(layers[key], settings.keep_experts, settings.weights, settings.beam) for key in free}
    error = {key: Products.of(layers[key]).relative(found) for key, found in chosen.items()}
    return chosen, dict(sorted(error.items(), key=lambda item: item[1]))


def _open(problem: Problem, order: Iterable[str]) -> list[str]:
    """Return the layers that can be taken: a model keeps one with a router."""
    return list(order)[: len(problem.stats.model.layers) - 1]


def _enough(problem: Problem, chosen: Mapping[str, Chosen], ratio: float) -> Callable[[list[str]], bool]:
    """Return what tells whether these layers, condensed, are what the settings ask for."""
    target = target_of(problem.settings, problem.stats.model)
    if target is None:
        return _so_much(problem, chosen, ratio)
    return lambda taken: target.size(_entries(problem, chosen, taken), {}) <= target.most


def _so_much(problem: Problem, chosen: Mapping[str, Chosen], ratio: float) -> Callable[[list[str]], bool]:
    """The same, where a number of layers is asked for or a share of the experts."""
    number, layers = problem.settings.layers, problem.layers
    if number is not None:
        return lambda taken: len(taken) >= number
    least = ratio * _routed(problem) * (1 - 1e-9)  # a share that was computed from bytes is met by them
    return lambda taken: sum(removed(layers[key], chosen[key]) for key in taken) >= least


def _routed(problem: Problem) -> int:
    """Return the bytes of the experts that a ratio is of: those in layers that may be touched."""
    return sum(layer.experts * layer.expert_bytes for layer in problem.layers.values())


def _wanted(problem: Problem, ratio: float) -> str:
    settings = problem.settings
    if settings.layers is not None:
        return f"--layers {settings.layers}"
    target = target_of(settings, problem.stats.model)
    return target.said if target else f"ratio {ratio:g}"


def _entries(problem: Problem, chosen: Mapping[str, Chosen], taken: Iterable[str]) -> Entries:
    facts = problem.stats.model.layers
    return {key: {problem.kind.name: chosen[key].entry(facts[key].experts)} for key in facts if key in taken}


def _remarks(problem: Problem, chosen: Mapping[str, Chosen], taken: list[str]) -> list[str]:
    """Say where layers keep fewer experts than asked for, and where nothing else is in them, unlike in the paper."""
    wanted, facts, notes = problem.settings.keep_experts, problem.stats.model.layers, []
    if short := [key for key in taken if len(chosen[key].ids) < wanted]:
        few = min(len(chosen[key].ids) for key in short)
        notes.append(f"layers {', '.join(short)} keep fewer than {wanted} experts, {few} at least: no more are of use")
    if alone := [key for key in taken if not _shared_bytes(facts[key])]:
        what = "what they keep is all that they put out" if wanted else "nothing is left in them"
        notes.append(f"layers {', '.join(alone)} have no shared experts, which the paper relies on: {what}")
    return notes


def _shared_bytes(layer: LayerFacts) -> int:
    return layer.block_bytes - layer.experts * layer.expert_bytes - layer.router_bytes


CD_MOE = Method(
    name="cd_moe",
    kind="condense",
    kinds=("condense",),
    choose=choose,
    needs=("tokens", *SUM_NEEDS),
    options=("keep_experts", "layers", "weights", "beam"),
    most=most,
    search=search,
    paper="Condense, Don't Just Prune (CD-MoE), arXiv 2412.00069",
)
