"""Scores of channels: one number for each neuron of each expert, higher = keep; a file each, found by looking here.

A channel, or neuron, is one place of an expert's inner width: its rows of gate and up and its column of down.

Letters: E experts, I expert width; h the activations of an expert, d the gradient of the loss with respect to h, g the
gate, y the output of the expert before its gate, w a column of down; n the tokens that were routed to the expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from understudy.errors import NumericError, StatsError
from understudy.facts import LayerFacts
from understudy.recipe import Selection
from understudy.registry import discover, lookup
from understudy.scores import Context
from understudy.stats import ExpertStats, Stats, require


@dataclass(frozen=True)
class ChannelScore:
    """A criterion: `compute` turns the sums of one layer into float64 [E, I], higher = keep."""

    name: str
    source: str  # paper and formula
    needs: tuple[str, ...]  # fields of ExpertStats that it reads
    compute: Callable[[ExpertStats, Context], np.ndarray]


@functools.cache
def all_channel_scores() -> dict[str, ChannelScore]:
    """Return every channel score by name."""
    return discover(__name__, ChannelScore)


def get_channel_score(name: str) -> ChannelScore:
    """Return a channel score by name.

    Raises:
        PlanError: there is none; the nearest name is suggested.
    """
    return lookup(all_channel_scores(), name, "channel score")


def score_channels(
    score: ChannelScore, stats: Stats, layers: Mapping[str, LayerFacts], settings: Selection
) -> dict[str, np.ndarray]:
    """Score every channel of the given layers: float64 [E, I] by layer key.

    Raises:
        StatsError: the statistics lack what the score reads, or are of another number of experts or neurons.
        NumericError: a score is NaN or infinite.
    """
    require(stats, score.needs, f"channel score {score.name}")
    position = {key: at for at, key in enumerate(stats.model.layers)}
    found = {}
    for key, layer in layers.items():
        values = np.asarray(score.compute(stats.layers[key], Context(layer, position[key], settings)), np.float64)
        if values.shape != (layer.experts, layer.width):
            raise StatsError(
                f"layer {key}: statistics of {values.shape} experts and neurons, the model has "
                f"{(layer.experts, layer.width)}; calibrate again"
            )
        if not (finite := np.isfinite(values)).all():
            expert, neuron = np.argwhere(~finite)[0]
            where = f"neuron {neuron} of expert {expert}"
            raise NumericError(f"layer {key}: the {score.name} score of {where} is NaN or infinite")
        found[key] = values
    return found


def column(values: np.ndarray) -> np.ndarray:
    """Return numbers of experts `[E]` so that they go with numbers of channels `[E, I]`."""
    return np.asarray(values, np.float64)[:, None]
