"""Condensed layers on the live model: how one runs, and how far what it puts out is from the original (CD-MoE).

Letters: E experts, T tokens of a call, N tokens of a sample, n of a chunk, H hidden size, M sets, s experts of a set; y
what an expert puts out before its gate, r what the routed experts put out together, h what the decoder layer does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from understudy.collectors.candidates import Sample, outputs_of
from understudy.errors import UnsupportedModelError

EPS = 1e-10  # inside the logarithms, as in the authors' code
_ROOM = 128 << 20  # bytes of the outputs of all experts that are looked at together


@contextmanager
def condensed(experts: Any, weights: Mapping[int, float]) -> Iterator[None]:
    """Let a live experts module send every token through the same experts with constant weights, for a while.

    Its router still runs and is not listened to.
    """
    own_forward = experts.forward
    ids, gates = torch.tensor(list(weights), dtype=torch.int64), torch.tensor(list(weights.values()))

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        if not len(ids):
            return torch.zeros_like(hidden_states)
        index_Ts = ids.to(top_k_index).expand(len(hidden_states), -1)
        return own_forward(hidden_states, index_Ts, gates.to(top_k_weights).expand(len(hidden_states), -1))

    before = vars(experts).get("forward")
    experts.forward = forward  # an attribute of the object shadows the class's method
    try:
        yield
    finally:
        if before is None:
            del experts.forward
        else:
            experts.forward = before


def hidden_js(one_NH: torch.Tensor, other_NH: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence between hidden states that a softmax makes distributions of, `[N]` float32.

    As the authors' code has it: 0.5 (KL(p || m) + KL(q || m)), p and q softmax over the hidden dimension, m their mean.
    """
    p_NH, q_NH = one_NH.float().softmax(-1), other_NH.float().softmax(-1)
    log_m_NH = ((p_NH + q_NH) / 2 + EPS).log_()
    return ((p_NH + EPS).log_().sub_(log_m_NH).mul_(p_NH) + (q_NH + EPS).log_().sub_(log_m_NH).mul_(q_NH)).sum(-1) / 2


class Outputs:
    """What every expert puts out on a sample, held so that each round of a search reads it again.

    In memory up to a limit, past it in a file that is memory-mapped. The layer adds what its experts put out to the
    rest of the stream, h = rest + c r, so that what it would put out with other experts is known without running it.
    """

    def __init__(self, sample: Sample, experts: Any, E: int, limit: int) -> None:
        if sample.after_NH is None or sample.reach is None:
            raise UnsupportedModelError(
                f"{type(experts).__name__} of this model are followed by more than a sum, so that what the layer would "
                "put out is not known from theirs; search with --criterion l2"
            )
        self.after_NH, self.reach = sample.after_NH, sample.reach
        self.rest_NH = sample.after_NH - sample.reach * sample.routed_NH
        N, H = sample.routed_NH.shape
        self._folder = None
        if limit >= 4 * E * N * H:
            self.y_ENH = torch.empty(E, N, H)
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="understudy-")  # goes with the object
            file = str(Path(self._folder.name) / "outputs")
            self.y_ENH = torch.from_file(file, shared=True, size=E * N * H).reshape(E, N, H)
        for start, y_EnH in outputs_of(sample.hidden_NH, experts, E, H):
            self.y_ENH[:, start : start + y_EnH.shape[1]] = y_EnH.cpu()
        self._size = max(1, _ROOM // (4 * E * H))

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the outputs of all experts, some tokens at a time: the first of them, float32 `[E, n, H]`."""
        for start in range(0, len(self.rest_NH), self._size):
            yield start, self.y_ENH[:, start : start + self._size].to(self.rest_NH.device)

    def js(self, sets_Ms: np.ndarray, weights_Ms: np.ndarray) -> np.ndarray:
        """Return the mean divergence of the layer's output with each set from the original's, `[M]`."""
        sums_M = np.zeros(len(sets_Ms))
        for start, y_EnH in self.chunks():
            part = slice(start, start + y_EnH.shape[1])
            for m, (ids, weights) in enumerate(zip(sets_Ms.tolist(), weights_Ms.tolist(), strict=True)):
                mixed_nH = self.rest_NH[part].clone()
                for expert, weight in zip(ids, weights, strict=True):
                    mixed_nH.add_(y_EnH[expert], alpha=self.reach * weight)
                sums_M[m] += float(hidden_js(self.after_NH[part], mixed_nH).sum(dtype=torch.float64))
        return sums_M / max(1, len(self.rest_NH))
