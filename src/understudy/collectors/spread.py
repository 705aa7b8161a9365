"""Which tokens of a run make up a sample: so many of those of all processes, spread evenly."""

from __future__ import annotations

import numpy as np
import torch

from understudy.collectors import Resident


class Spread:
    """Places of a sample among the tokens that this process runs.

    Attributes:
        here: of the tokens of the sample, whether this process has them.
        expected: tokens that this process runs.
    """

    def __init__(self, resident: Resident, wanted: int) -> None:
        places = np.linspace(0, resident.total - 1, min(wanted, resident.total)).round().astype(np.int64)
        self.expected = sum(batch.size for batch in resident.batches)
        self.here = (places >= resident.first) & (places < resident.first + self.expected)
        self._places = places[self.here] - resident.first

    def rows(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        """Return which tokens of a call are of the sample: `count` tokens, `start` were before them."""
        rows = self._places[(self._places >= start) & (self._places < start + count)] - start
        return torch.from_numpy(rows).to(device)
