"""Every expert on the same few tokens, as if routing were off (REAM, HC-SMoE, grouping by CKA).

Letters: E experts, n tokens of a chunk, H hidden size, I expert width, N tokens of which activations are kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from understudy.collectors import Collector, Resident
from understudy.collectors.channels import activations, shown_width
from understudy.collectors.spread import Spread
from understudy.sums import FEW
from understudy.tap import Routes

_CHUNK = 256  # tokens that outputs are centred over
_ROOM = 256 << 20  # bytes of the outputs of all experts over one chunk


class Dense(Collector):
    """Sums over the outputs of every expert for tokens spread evenly over the text, and activations on a few of them.

    Chunks are of 256 tokens or fewer, as they fit in 256 MiB; which chunk a token falls into does not depend on the
    batch size, but it does on the number of processes, and `dense_hsic` with it. The tokens of which activations are
    kept are spread evenly over all of these, whichever process has them.
    """

    group = "dense"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        self._spread = Spread(resident, resident.settings.dense_tokens)
        wanted = len(self._spread.here)
        few = np.zeros(wanted, bool)
        few[np.linspace(0, wanted - 1, min(FEW, wanted)).round().astype(np.int64)] = True
        self._few = np.flatnonzero(few[self._spread.here])  # of the tokens that are kept here
        self._heard = 0
        self._kept: list[torch.Tensor] = []

    def hear(self, routes: Routes) -> None:
        """Keep the tokens that are wanted."""
        count = len(routes.hidden_TH)
        self._kept.append(routes.hidden_TH[self._spread.rows(self._heard, count, routes.hidden_TH.device)])
        self._heard += count

    def sums(self) -> dict[str, Any]:
        """Send the tokens through every expert, with gate 1."""
        if self._heard != self._spread.expected:
            return {}  # the experts do not see every token once
        hidden_TH = torch.cat(self._kept)
        T, E, H = len(hidden_TH), self.resident.layer.num_experts, self.resident.layer.hidden_size
        size = max(2, min(_CHUNK, _ROOM // (4 * E * H)))
        device = hidden_TH.device
        sum_EH = torch.zeros(E, H, dtype=torch.float64, device=device)
        cos_EE, hsic_EE = (torch.zeros(E, E, dtype=torch.float64, device=device) for _ in range(2))
        for chunk_nH in torch.tensor_split(hidden_TH, max(1, math.ceil(T / size))):
            y_EnH = self._outputs(chunk_nH)
            sum_EH += y_EnH.sum(1, dtype=torch.float64)
            kernel_Enn = torch.stack([_kernel(y_nH) for y_nH in y_EnH])
            hsic_EE += _gram(kernel_Enn)
            norm_En1 = torch.linalg.vector_norm(y_EnH, dim=2, keepdim=True)
            y_EnH /= torch.where(norm_En1 > 0, norm_En1, 1)
            cos_EE += _gram(y_EnH)
        found = {"dense_tokens": torch.tensor(T), "dense_sum": sum_EH, "dense_cos_sum": cos_EE, "dense_hsic": hsic_EE}
        kept = self._activations(hidden_TH[torch.from_numpy(self._few).to(device)])
        return {name: value.cpu().numpy().astype(np.float64) for name, value in found.items()} | kept

    def _outputs(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Outputs of all experts, float32 `[E, n, H]`."""
        n, H, E = len(hidden_nH), self.resident.layer.hidden_size, self.resident.layer.num_experts
        y_EnH = torch.empty(E, n, H, device=hidden_nH.device)
        ones = torch.ones(n, 1, dtype=hidden_nH.dtype, device=hidden_nH.device)
        for expert in range(E):
            y_EnH[expert] = self.resident.experts(hidden_nH, torch.full_like(ones, expert, dtype=torch.int64), ones)
        return y_EnH

    def _activations(self, hidden_NH: torch.Tensor) -> dict[str, np.ndarray]:
        """Activations of all experts, float32 `[E, I, N]`, where the family shows them; computed a second time."""
        experts, E = self.resident.experts, self.resident.layer.num_experts
        if (width := shown_width(experts)) is None:
            return {}
        h_EIN = np.empty((E, width, len(hidden_NH)), np.float32)
        for expert in range(E):
            h_EIN[expert] = activations(experts, expert, hidden_NH)[1].float().T.cpu().numpy()
        return {"dense_activations": h_EIN}


def _kernel(y_nH: torch.Tensor) -> torch.Tensor:
    """Linear kernel of centred outputs, `[n, n]`: the product of two of these is |Yc_i^T Yc_j|_F^2."""
    centred_nH = y_nH - y_nH.mean(0)
    return centred_nH @ centred_nH.T


def _gram(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.reshape(len(rows), -1)
    return (flat @ flat.T).double()
