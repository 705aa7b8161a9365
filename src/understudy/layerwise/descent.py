"""Train one decoder layer by gradient descent (AdamW) toward what the teacher's puts out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from understudy.errors import NumericError
from understudy.layerwise.onelayer import OneLayer
from understudy.recipe import Recovery


def descend(
    layer: OneLayer, parameters: dict[str, Tensor], settings: Recovery, accumulate: int
) -> list[dict[str, float]]:
    """Make the steps of one layer and return their losses: the share of what the teacher's adds that is missed.

    Args:
        layer: on its text.
        parameters: what is trained, by name; changed in place.
        settings: of the run.
        accumulate: batches in a step.

    Raises:
        NumericError: an error or gradient that is not finite; says in which layer, and at which step.
    """
    s = settings
    optimiser = torch.optim.AdamW(parameters.values(), lr=s.lr, weight_decay=s.weight_decay)
    kind = s.lr_schedule if s.lr_schedule != "constant" else "constant_with_warmup"
    falling = get_scheduler(kind, optimiser, round(s.warmup * s.steps), s.steps)
    losses: list[dict[str, float]] = []
    order = _order(layer, s.seed)
    for step in range(s.steps):
        begun, numbers = time.perf_counter(), [next(order) for _ in range(accumulate)]
        error, scale = 0.0, layer.adds(numbers)
        for number in numbers:
            loss = layer.squares(number) / scale
            loss.backward()
            error += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if not math.isfinite(error) or not bool(norm.isfinite()):
            raise NumericError(
                f"decoder layer {layer.index}: the error or its gradient is not finite at step {step + 1} of "
                f"{s.steps}; try a lower --lr than {s.lr:g}, or a --warmup"
            )
        rate = falling.get_last_lr()[0]
        optimiser.step()
        optimiser.zero_grad()
        falling.step()
        losses.append({"loss": error, "lr": rate, "seconds": time.perf_counter() - begun})
    return losses


def _order(layer: OneLayer, seed: int) -> Iterator[int]:
    """Give batches to train on: all in a random order, then again in another."""
    generator = np.random.default_rng([seed, 3, layer.index])
    while True:
        yield from generator.permutation(layer.training).tolist()
