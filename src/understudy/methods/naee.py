"""NAEE: try every subset of a layer's experts, and keep the one that changes the layer's output least."""

from __future__ import annotations

import numpy as np

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.methods import Choice, Method, Problem


def choose(problem: Problem, ratio: float) -> Choice:
    """Keep the subset of the least loss among those of the wanted number, in each layer by itself (METHODS 5).

    Raises:
        PlanError: fewer experts would stay than a token needs, or the layers would differ in number.
    """
    layers: dict[str, dict[str, Entry]] = {}
    for key, layer in problem.layers.items():
        count = round(ratio * layer.experts)
        if layer.experts - count < layer.top_k:
            raise PlanError(
                f"layer {key}: naee cannot leave {layer.experts - count} of {layer.experts} experts where a token uses "
                f"{layer.top_k}; at most {layer.experts - layer.top_k} can go"
            )
        loss = np.asarray(problem.stats.layers[key].subset_loss)
        if not loss.size:
            raise PlanError(
                f"layer {key}: naee tries every subset of experts, and {layer.experts} have too many; use reap"
            )
        masks = np.arange(1 << layer.experts)
        allowed = sum((masks >> e) & 1 for e in range(layer.experts)) == layer.experts - count
        for expert in problem.protected.get(key, ()):
            allowed &= (masks >> expert & 1).astype(bool)
        best = int(np.where(allowed, loss, np.inf).argmin())
        gone = tuple(e for e in range(layer.experts) if not best >> e & 1)
        if gone:
            layers[key] = {problem.kind.name: gone}
    return Choice(layers)


def most(problem: Problem) -> float:
    """Return the share that leaves every token its top-k."""
    return min((layer.experts - layer.top_k) / layer.experts for layer in problem.layers.values())


NAEE = Method(
    name="naee",
    kind="drop",
    kinds=("drop",),
    choose=choose,
    needs=("subset_loss",),
    most=most,
    paper="Not All Experts are Equal, arXiv 2402.14800",
)
