"""Fading the originals out: how much of them is left at each step of recovery.

LightMoE (arXiv 2603.12645), eq. 6 and 7: expert n is `beta(t) W_n + (1 - beta(t)) W_share + B_n A_n`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from understudy.bases import SharedExperts
from understudy.errors import UnderstudyError

_STEEPNESS = 3.0  # g of the exponential schedule; the paper tried 1, 3 and 5 and found no consistent difference


@dataclass(frozen=True)
class Fade:
    """The share beta of the originals falls from 1 at step 0 to 0 at step `end_ratio * steps`; 0 = never there.

    Raises:
        UnderstudyError: the end ratio is outside 0 to 1.
    """

    end_ratio: float
    steps: int
    schedule: Literal["linear", "exp"] = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.end_ratio <= 1:  # nor NaN
            raise UnderstudyError(f"--end-ratio {self.end_ratio:g}: give a share of the steps, from 0 to 1")

    def beta(self, step: int) -> float:
        """Return the share of the originals at a step, counted from 0 (eq. 7; for `exp`, the paper's alternative)."""
        length = self.end_ratio * self.steps
        if step >= length:
            return 0.0
        passed = step / length
        if self.schedule == "linear":
            return 1.0 - passed
        end = math.exp(-_STEEPNESS)
        return max((math.exp(-_STEEPNESS * passed) - end) / (1 - end), 0.0)


def set_beta(model: nn.Module, beta: float) -> bool:
    """Set the share of the originals wherever there are some; at 0 they are dropped. Say whether any were dropped."""
    fading = [m for m in model.modules() if isinstance(m, SharedExperts) and m.originals is not None]
    for module in fading:
        module.beta = beta
        if beta == 0:
            module.originals = None
    return beta == 0 and bool(fading)
