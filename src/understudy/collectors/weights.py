"""Norms of the weights themselves: what needs no text (AIMER's ratio, router rows)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from understudy.collectors import Collector
from understudy.moe import MoELayer
from understudy.skeleton import Skeleton


class Weights(Collector):
    """Sums of |w| and w^2 over the matrices of every expert, biases left out, and the norm of its router's row."""

    group = "weights"
    reads_text = False

    def sums(self) -> dict[str, Any]:
        """Return the sums, taken now."""
        experts, E = self.resident.experts, self.resident.layer.num_experts
        matrices = [w for w in (*experts._parameters.values(), *experts._buffers.values()) if w is not None]
        matrices = [w for w in matrices if w.ndim == 3 and w.shape[0] == E]
        if not matrices:
            return {}
        abs_E, sq_E = (torch.zeros(E, dtype=torch.float64, device=matrices[0].device) for _ in range(2))
        for w in matrices:
            for expert in range(E):
                rows = w[expert].float()  # by rows, then in float64: a float32 sum over a matrix is off too far
                abs_E[expert] += rows.abs().sum(dim=1).sum(dtype=torch.float64)
                sq_E[expert] += torch.linalg.vector_norm(rows, dim=1).double().square().sum()
        found = {
            "weight_abs_sum": abs_E.cpu().numpy(),
            "weight_sq_sum": sq_E.cpu().numpy(),
            "weight_numel": np.float64(sum(w[0].numel() for w in matrices)),
        }
        if name := router_weight(self.resident.skeleton, self.resident.layer):
            found["router_norm"] = row_norms(self.resident.skeleton.get(name))
        return found


def router_weight(skeleton: Skeleton, layer: MoELayer) -> str | None:
    """Name the router's matrix `[E, D]`, one row an expert; None where the family has none."""
    matrices = (name for name in layer.router if skeleton.get(name).ndim == 2)
    return next((name for name in matrices if skeleton.get(name).shape[0] == layer.num_experts), None)


def row_norms(weight: torch.Tensor) -> np.ndarray:
    """Norm of each row, in float64."""
    return torch.linalg.vector_norm(weight.double(), dim=1).cpu().numpy()
