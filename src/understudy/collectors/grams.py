"""Second moments of the neurons of each expert, of which their answers together are made (OBS, refits).

Letters: E experts, I expert width, n routes of one expert; h the activations of an expert, g the gate, W the matrix of
`down_proj`.

The sums over text are as large as the experts' weights, or nearly so; they are added up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from understudy.channels import channel_views
from understudy.collectors import Collector, Resident
from understudy.collectors.channels import Activations, shown_width, slices
from understudy.tap import Routes


class Grams(Collector):
    """Products of the activations of every two neurons of an expert, weighted by g^2, and of their down columns."""

    group = "grams"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        self._width = shown_width(resident.experts)
        self._watched = Activations(resident.experts)
        self._gram_EII: torch.Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the gating function, where all routes pass through one call of it."""
        with self._watched.attached():
            yield

    def hear(self, routes: Routes) -> None:
        """Add up the products."""
        if self._width is None:
            return
        watched = self._watched.of(routes)
        if self._gram_EII is None:
            shape = (self.resident.layer.num_experts, self._width, self._width)
            self._gram_EII = torch.zeros(shape, device=routes.gates_N.device)
        for expert, mine in slices(routes.ids_N):
            gated_nI = watched(expert, mine)[1].float() * routes.gates_N[mine].float()[:, None]
            self._gram_EII[expert].addmm_(gated_nI.T, gated_nI)

    def sums(self) -> dict[str, Any]:
        """Return both, float32 `[E, I, I]`, where the family shows its neurons."""
        if self._gram_EII is None:
            return {}
        down = channel_views(self.resident.experts)["down"]
        down_gram = torch.stack([(w_IH.float() @ w_IH.float().T).cpu() for w_IH in down])
        return {"activation_gram": self._gram_EII.cpu().numpy(), "down_gram": down_gram.numpy()}
