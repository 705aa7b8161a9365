"""Every expert on the same tokens, beside what the routed experts did there: which few of them could stand for all.

With y_e the output of expert e for a token and r what the routed experts put out together, a layer that runs a fixed
set S of experts with constant weights w is off by |r - sum_S w_e y_e|^2, summed over tokens

    sum |r|^2 - 2 sum_S w_e <y_e, r> + sum_S sum_S w_e w_f <y_e, y_f>

so three sums give this error for every set and all weights (CD-MoE, arXiv 2412.00069, asks for thousands of runs).

Letters: T tokens of a call, n of a chunk, N of the sample, E experts, H hidden size; h what the decoder layer puts out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from understudy.collectors import Resident
from understudy.collectors.spread import Spread
from understudy.collectors.stream import Stream, _first

_CHUNK = 256  # tokens at a time
_ROOM = 256 << 20  # bytes that the outputs of all experts over a chunk may take


@dataclass(frozen=True)
class Sample:
    """Tokens of one layer, spread evenly over the text, and what became of them.

    Where `reach` is a number c, the decoder layer puts out h = rest + c r, and `after` holds h; else both are None.
    """

    hidden_NH: torch.Tensor  # what enters the experts, in the dtype of the model
    routed_NH: torch.Tensor  # r, float32
    after_NH: torch.Tensor | None  # h, float32
    reach: float | None


class Candidates(Stream):
    """Inner products of the outputs of every expert, and with that of the routed ones, on `dense_tokens` tokens."""

    group = "candidates"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        self._spread = Spread(resident, resident.settings.dense_tokens)
        self._called_with, self._left_with = 0, 0
        self._hidden: list[torch.Tensor] = []
        self._routed: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the experts, and what `Stream` hooks."""
        with super().attached():
            handle = self.resident.experts.register_forward_hook(self._called, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def _called(self, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        hidden = _first((*args, *kwargs.values()))
        assert hidden is not None
        rows = self._spread.rows(self._called_with, len(hidden), hidden.device)
        self._called_with += len(hidden)
        self._hidden.append(hidden[rows])
        self._routed.append(output[rows].float())

    def _through(self, h_TH: torch.Tensor, r_TH: torch.Tensor) -> None:
        self._after.append(h_TH[self._spread.rows(self._left_with, len(h_TH), h_TH.device)])
        self._left_with += len(h_TH)

    def sample(self) -> Sample | None:
        """Return the sample once the run is through; None where the experts do not see every token once."""
        if self._called_with != self._spread.expected:
            return None
        shown = self._reach is not None and self._left_with == self._spread.expected
        after = torch.cat(self._after) if shown else None
        return Sample(torch.cat(self._hidden), torch.cat(self._routed), after, self._reach if shown else None)

    def sums(self) -> dict[str, Any]:
        """Send the sample through every expert, and return the inner products in float64."""
        if (sample := self.sample()) is None:
            return {}
        E, H = self.resident.layer.num_experts, self.resident.layer.hidden_size
        return gram_of(sample, outputs_of(sample.hidden_NH, self.resident.experts, E, H), E)


def gram_of(sample: Sample, chunks: Iterable[tuple[int, torch.Tensor]], E: int) -> dict[str, np.ndarray]:
    """Return the fields of the group `candidates`, from what all experts put out, as `outputs_of` yields it."""
    device = sample.routed_NH.device
    gram_EE = torch.zeros(E, E, dtype=torch.float64, device=device)
    dot_E = torch.zeros(E, dtype=torch.float64, device=device)
    for start, y_EnH in chunks:
        flat = y_EnH.double().reshape(E, -1)
        gram_EE += flat @ flat.T
        dot_E += flat @ sample.routed_NH[start : start + y_EnH.shape[1]].double().reshape(-1)
    square = _square(sample.routed_NH)
    # where the layer does not simply add r to the stream, r itself is the measure
    scale = square if sample.after_NH is None or not sample.reach else _square(sample.after_NH) / sample.reach**2
    return {
        "candidate_gram": gram_EE.cpu().numpy(),
        "candidate_dot": dot_E.cpu().numpy(),
        "candidate_sq": np.float64(square),
        "candidate_scale": np.float64(scale),
    }


def outputs_of(hidden_NH: torch.Tensor, experts: Any, E: int, H: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the outputs of all experts with gate 1, a chunk of tokens at a time: its start, float32 `[E, n, H]`."""
    size = max(1, min(_CHUNK, _ROOM // (12 * E * H)))  # in float32, and once more in float64
    for start in range(0, len(hidden_NH), size):
        chunk_nH = hidden_NH[start : start + size]
        y_EnH = torch.empty(E, len(chunk_nH), H, device=hidden_NH.device)
        ones = torch.ones(len(chunk_nH), 1, dtype=chunk_nH.dtype, device=hidden_NH.device)
        for expert in range(E):
            y_EnH[expert] = experts(chunk_nH, torch.full_like(ones, expert, dtype=torch.int64), ones)
        yield start, y_EnH


def _square(x_NH: torch.Tensor) -> float:
    return math.fsum(torch.linalg.vector_norm(x_NH, dim=1).double().square().tolist())
