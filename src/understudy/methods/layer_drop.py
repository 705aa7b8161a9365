"""Layer drop and block drop: leave out the layers that change the residual stream least."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from understudy.entries import Entry
from understudy.methods import Choice, Method, Problem


def choose(problem: Problem, ratio: float, field: str) -> Choice:
    """Remove the layers with the highest mean cosine between the stream before and after (METHODS 6).

    `field` is the sum of those cosines over tokens. Layers with a protected expert stay.
    """
    free = [key for key in problem.layers if not problem.protected.get(key)]
    cosine = {key: float(getattr(problem.stats.layers[key], field) / problem.stats.layers[key].tokens) for key in free}
    order = sorted(free, key=lambda key: -cosine[key])  # of equals the first
    gone = order[: min(round(ratio * len(problem.stats.model.layers)), len(problem.stats.model.layers) - 1)]
    layers: dict[str, dict[str, Entry]] = {
        key: {problem.kind.name: tuple(range(layer.experts))} for key, layer in problem.layers.items() if key in gone
    }
    told = ", ".join(f"{key} ({cosine[key]:.4f})" for key in order)
    return Choice(layers, notes=(f"layers by cosine of the stream before and after, most alike first: {told}",))


def most(problem: Problem) -> float:
    """Return the share of layers that may go."""
    total = len(problem.stats.model.layers)
    return min(len(problem.layers), total - 1) / total


def _method(name: str, field: str, what: str) -> Method:
    chosen: Callable[[Problem, float], Choice] = partial(choose, field=field)
    return Method(
        name=name,
        kind=name,
        kinds=(name,),
        choose=chosen,
        needs=("tokens", field),
        most=most,
        paper=f"{what}, Towards Efficient Mixture of Experts, arXiv 2406.02500",
    )


LAYER_DROP = _method("layer_drop", "moe_cos_sum", "layer drop")
BLOCK_DROP = _method("block_drop", "block_cos_sum", "block drop")
