"""Affine maps of low rank, fitted to what each expert answers to the tokens that are routed to it.

What enters the experts is kept until the layer is through, 2 or 4 bytes x hidden size a token; then one expert after
the other is run once more and fitted. Every process fits maps to its own tokens of the sample, and so does every run:
maps do not add, and of merged statistics each expert has the map of the part that weighs more (`ExpertStats`).

Letters: T tokens of a call, N routes, n routes of one expert, E experts, H hidden size, R rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from understudy.affine_fit import fit
from understudy.collectors import Collector, Resident
from understudy.collectors.channels import slices
from understudy.sums import RANKS
from understudy.tap import Routes

_CHUNK = 4096  # routes at a time


class LowRank(Collector):
    """Maps of rank R = 32, or H where that is less; zeros for an expert that saw fewer than two routes."""

    group = "low_rank"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        self._tokens = 0
        self._hidden: list[torch.Tensor] = []
        self._routes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # expert, token, gate

    def hear(self, routes: Routes) -> None:
        """Keep what entered and where it was sent."""
        self._hidden.append(routes.hidden_TH.clone())  # some families change it in place afterwards
        self._routes.append((routes.ids_N, routes.token_N + self._tokens, routes.gates_N))
        self._tokens += len(routes.hidden_TH)

    @torch.no_grad()
    def sums(self) -> dict[str, Any]:
        """Fit the maps."""
        hidden_TH = torch.cat(self._hidden)
        ids_N, token_N, gates_N = (torch.cat(parts) for parts in zip(*self._routes, strict=True))
        ids_N, order_N = torch.sort(ids_N, stable=True)
        token_N, gates_N = token_N[order_N], gates_N[order_N]
        E, H = self.resident.layer.num_experts, hidden_TH.shape[1]
        R = min(RANKS, H)
        found: dict[str, Any] = {
            "affine_in": np.zeros((E, H, R), np.float32),
            "affine_out": np.zeros((E, R, H), np.float32),
            "affine_mean": np.zeros((E, H)),
            "affine_gain": np.zeros((E, R)),
            "affine_error": np.zeros(E),
        }
        for expert, mine in slices(ids_N):
            x_nH = hidden_TH[token_N[mine]]
            fitted = fit(x_nH, self._answers(expert, x_nH), gates_N[mine], R)
            values = (fitted.into_HR, fitted.out_RH, fitted.mean_H, fitted.gain_R)
            for name, value in zip(found, values, strict=False):
                found[name][expert] = value.cpu().numpy()
            found["affine_error"][expert] = fitted.error
        return found

    def _answers(self, expert: int, x_nH: torch.Tensor) -> torch.Tensor:
        """What an expert answers with gate 1, float32."""
        found = []
        for x in x_nH.split(_CHUNK):
            ones = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
            found.append(self.resident.experts(x, torch.full_like(ones, expert, dtype=torch.int64), ones).float())
        return torch.cat(found)
