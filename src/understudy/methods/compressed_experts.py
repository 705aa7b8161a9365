"""Compressed Experts: fewer experts run for a token, and vectors of the others rescale what these are given."""

from __future__ import annotations

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.kinds.modulate import MODULATE, Modulate
from understudy.methods import Choice, Method, Problem
from understudy.standins import main_k_of


def choose(problem: Problem, ratio: float) -> Choice:
    """Name all experts of all layers that may be touched: who runs is decided for each token by its gates.

    Raises:
        PlanError: `--main-k` is not fewer than a token chooses, or vectors are to be fitted where there will be none.
        StatsError: vectors were fitted for other settings.
    """
    settings, kind = problem.settings, problem.kind
    main_k = main_k_of(settings.main_k, (layer.top_k for layer in problem.layers.values()))
    if settings.plain and settings.fit:
        raise PlanError("--fit has no effect with --plain, which writes no vectors; leave one of them out")
    how: dict[str, bool | int | float | str] = {"main_k": main_k}
    how |= {"plain": True} if settings.plain else {"vectors": settings.vectors, "renormalise": settings.renormalise}
    how |= {"fit": True} if settings.fit else {}
    modulate = MODULATE.having(how)
    entries: dict[str, dict[str, Entry]] = {
        key: {kind.name: tuple(range(layer.experts))} for key, layer in problem.layers.items()
    }
    active = sum(main_k * layer.expert_params for layer in problem.layers.values())
    before = sum(layer.top_k * layer.expert_params for layer in problem.layers.values())
    note = f"a token passes through {main_k} experts of each layer, {active / before:.1%} of the parameters that it did"
    notes = [note]
    if settings.fit:
        notes.append(_gain(problem, modulate))
    elif not settings.plain:
        notes.append("vectors change nothing until `recover` trains them")
    return Choice(entries, {kind.name: how}, notes=tuple(notes))


def _gain(problem: Problem, kind: Modulate) -> str:
    """Say what fitted vectors are worth.

    Raises:
        StatsError: they were fitted for other settings.
    """
    gains = []
    for key in problem.layers:
        stats = problem.stats.layers[key]
        if not problem.stats.data.get("made_up"):
            kind.check_fitted(key, stats)
        plain, fitted = float(stats.modulation_plain), float(stats.modulation_fitted)
        gains.append(1 - fitted / plain if plain else 0.0)
    return (
        f"fitted vectors lower the squared error of the layers' outputs, next to that of ones, by {min(gains):.1%} to "
        f"{max(gains):.1%} on tokens that were held out"
    )


COMPRESSED_EXPERTS = Method(
    name="compressed_experts",
    kind="modulate",
    kinds=("modulate",),
    choose=choose,
    options=("main_k", "vectors", "renormalise", "fit", "plain"),
    shrinks=False,
    paper="Compressed Experts: vectors in the place of the weaker experts of a token, arXiv 2503.00634",
)
