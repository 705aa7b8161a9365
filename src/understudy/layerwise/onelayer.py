"""One decoder layer on its text: what the student's puts out, what it should, and how far these are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from understudy.activations import ActivationStore


class OneLayer:
    """A resident layer of the student, the batches that come to it, and what the teacher's puts out.

    Args:
        index: which layer it is.
        run: gives what the student's layer puts out for a batch, with gradients of what asks for them.
        before: gives what the layers before put out for a batch, the teacher's.
        targets: what the teacher's layer puts out.
        masks: where a batch `[B, S]` is no padding.
        training: how many batches are to train on; the others are held out.
    """

    def __init__(
        self, index: int, run: Callable[[int], Any], before: Callable[[int], Any], targets: ActivationStore,
        masks: list[np.ndarray], training: int,
    ) -> None:  # fmt: skip
        self.index, self.run, self.before, self.targets = index, run, before, targets
        self.masks, self.training = masks, training

    def output(self, number: int) -> Tensor:
        """Return what the student's layer puts out for a batch, `[B, S, H]` float32."""
        return hidden(self.run(number)).float()

    def target(self, number: int) -> Tensor:
        """Return what it should put out, `[B, S, H]` float32."""
        return hidden(self.targets.get(number)).float()

    def mask(self, number: int) -> Tensor:
        """Say where a batch is no padding, bool `[B, S]`."""
        return torch.from_numpy(self.masks[number]).to(self.targets.device)

    def squares(self, number: int) -> Tensor:
        """Return the squared distance of a batch, of what the layer puts out from what it should."""
        return self._distance(self.output(number), self.target(number), number)

    def adds(self, numbers: Iterable[int]) -> float:
        """Return the square of what the teacher's layer adds; before the first layer there is nothing."""
        total = 0.0
        for number in numbers:
            after = self.target(number)
            came = hidden(self.before(number)).float() if self.index else torch.zeros_like(after)
            total += float(self._distance(after, came, number))
        return max(total, 1e-30)

    @torch.no_grad()
    def missed(self) -> float:
        """Return the share of what the teacher's layer adds that the student's misses, on held-out text."""
        held = range(self.training, len(self.masks))
        return sum(float(self.squares(number)) for number in held) / self.adds(held)

    def _distance(self, a: Tensor, b: Tensor, number: int) -> Tensor:
        return (a - b).flatten(2).square().sum(-1)[self.mask(number)].sum()


def hidden(output: Any) -> Tensor:
    """Return the hidden states among what a decoder layer puts out, the first of its tensors."""
    leaves = pytree.tree_leaves(output)
    return next(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
