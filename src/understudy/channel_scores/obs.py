"""OBS: what is lost for good when a neuron goes and the others take over what they can of it."""

from __future__ import annotations

import weakref

import numpy as np

from understudy.channel_scores import ChannelScore, column
from understudy.channel_scores.heapr import UNSEEN
from understudy.refit import order_of_loss
from understudy.scores import Context
from understudy.stats import ExpertStats

_NEEDS = ("count", "gate_sq_sum", "gated_activation_sum", "activation_gram")
# by place in memory of the sums: a plan, its stand-ins and their check ask for the same scores of a layer
_FOUND: dict[tuple[int, str], np.ndarray] = {}


def obs(stats: ExpertStats, context: Context) -> np.ndarray:
    """Count the loss by its gradients' second moment at the output of the routed experts, as a mean over tokens."""
    return _ordered(stats, "gradient_down_gram") / max(float(stats.gradient_tokens), 1.0)


def obs_plain(stats: ExpertStats, context: Context) -> np.ndarray:
    """Count the square of the error of the layer's output, which needs no walk back, as a mean over tokens."""
    return _ordered(stats, "down_gram") / max(float(stats.tokens), 1.0)


def _ordered(stats: ExpertStats, metric: str) -> np.ndarray:
    key = id(stats), metric
    if key not in _FOUND:
        total, weight = stats.gated_activation_sum, stats.gate_sq_sum
        score = order_of_loss(stats.activation_gram, total, weight, getattr(stats, metric))
        _FOUND[key] = np.where(column(stats.count) > 0, score, UNSEEN)
        weakref.finalize(stats, _FOUND.pop, key, None).atexit = False
    return _FOUND[key]


OBS = ChannelScore(
    name="obs",
    source="ours, after optimal brain surgeon (Hassibi and Stork 1992): error left after a refit, metric of the loss",
    needs=(*_NEEDS, "gradient_down_gram", "gradient_tokens"),
    compute=obs,
)
OBS_PLAIN = ChannelScore(
    name="obs_plain",
    source="ours, after optimal brain surgeon (Hassibi and Stork 1992): squared error left after a refit",
    needs=(*_NEEDS, "down_gram", "tokens"),
    compute=obs_plain,
)
