"""Compressed Experts: fewer experts run for a token, and vectors of the others rescale what these are given."""

from __future__ import annotations

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.methods import Choice, Method, Problem


def choose(problem: Problem, ratio: float) -> Choice:
    """Name all experts of all layers that may be touched: who runs is decided for each token by its gates.

    Raises:
        PlanError: `--main-k` is not fewer than a token chooses.
    """
    settings, kind = problem.settings, problem.kind
    fewest = min(layer.top_k for layer in problem.layers.values())
    main_k = settings.main_k or fewest // 2
    if main_k >= fewest:
        raise PlanError(
            f"--main-k {main_k} is not fewer than the {fewest} experts that a token chooses; give 1 to {fewest - 1}"
        )
    how: dict[str, bool | int | float | str] = {"main_k": main_k}
    how |= {"plain": True} if settings.plain else {"vectors": settings.vectors, "renormalise": settings.renormalise}
    kind.having(how)
    entries: dict[str, dict[str, Entry]] = {
        key: {kind.name: tuple(range(layer.experts))} for key, layer in problem.layers.items()
    }
    active = sum(main_k * layer.expert_params for layer in problem.layers.values())
    before = sum(layer.top_k * layer.expert_params for layer in problem.layers.values())
    note = f"a token passes through {main_k} experts of each layer, {active / before:.1%} of the parameters that it did"
    return Choice(
        entries,
        {kind.name: how},
        notes=(note, "vectors change nothing until `recover` trains them")[: 1 + (not settings.plain)],
    )


COMPRESSED_EXPERTS = Method(
    name="compressed_experts",
    kind="modulate",
    kinds=("modulate",),
    choose=choose,
    options=("main_k", "vectors", "renormalise", "plain"),
    shrinks=False,
    paper="Compressed Experts: vectors in the place of the weaker experts of a token, arXiv 2503.00634",
)
