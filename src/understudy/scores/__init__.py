"""Scores: one number for each expert from its statistics, higher = keep; a file each, found by looking in this folder.

A score is a function of the sums of one layer; it names the fields that it reads and obeys few settings, if any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from understudy.errors import NumericError, StatsError
from understudy.facts import LayerFacts
from understudy.recipe import Selection
from understudy.registry import discover, lookup
from understudy.stats import ExpertStats, Stats


@dataclass(frozen=True)
class Context:
    """What a score may know beside the sums of a layer."""

    layer: LayerFacts
    position: int  # of the layer among the MoE layers, from 0
    settings: Selection


@dataclass(frozen=True)
class Score:
    """A criterion: `compute` turns the sums of one layer into float64 [E], higher = keep."""

    name: str
    source: str  # paper and formula
    needs: tuple[str, ...]  # fields of ExpertStats that it reads
    compute: Callable[[ExpertStats, Context], np.ndarray]
    options: tuple[str, ...] = ()  # fields of Selection that it obeys


@dataclass(frozen=True)
class Scores:
    """The numbers of one criterion for a whole model, float64 [E] by layer key, and where they come from."""

    name: str
    source: str
    layers: dict[str, np.ndarray]


@functools.cache
def all_scores() -> dict[str, Score]:
    """Return every score by name."""
    return discover(__name__, Score)


def get_score(name: str) -> Score:
    """Return a score by name.

    Raises:
        PlanError: there is none; the nearest name is suggested.
    """
    return lookup(all_scores(), name, "score")


def score_layers(score: Score, stats: Stats, settings: Selection) -> Scores:
    """Score every expert of a model.

    Raises:
        StatsError: a layer is missing or has another number of experts.
        NumericError: a score is NaN or infinite.
    """
    layers = {}
    for position, (key, layer) in enumerate(stats.model.layers.items()):
        if key not in stats.layers:
            raise StatsError(f"layer {key}: the statistics lack this layer; calibrate again")
        values = np.array(score.compute(stats.layers[key], Context(layer, position, settings)), np.float64)
        if values.shape != (layer.experts,):
            raise StatsError(f"layer {key}: statistics of {values.size} experts, the model has {layer.experts}")
        if not (finite := np.isfinite(values)).all():
            raise NumericError(f"layer {key}: the {score.name} score of expert {finite.argmin()} is NaN or infinite")
        layers[key] = values
    return Scores(score.name, score.source, layers)


def per(total: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Divide, giving 0 where there is nothing to divide by: an expert that saw no token scores lowest."""
    return np.divide(total, number, out=np.zeros(np.broadcast(total, number).shape), where=np.asarray(number) > 0)
