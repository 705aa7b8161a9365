"""Vectors of Compressed Experts, fitted to what the layer answers with all routes: where training could start.

Every process fits vectors to its own tokens of the sample, and so does every run; what is added up is the vectors
weighted by how much each expert was auxiliary, so that merged statistics hold their mean. The squared errors are over
tokens that were held out of the fit, of the vectors before they were averaged. `understudy.fitting` has the equation.

Letters: E experts, S numbers of an expert's vectors together (hidden, or gate | up | down), N tokens, k routes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from understudy.collectors import Collector, Resident
from understudy.collectors.channels import shown_width
from understudy.collectors.spread import Spread
from understudy.fitting import fit, modulated_copy, sample_of
from understudy.standins import main_k_of
from understudy.tap import Routes


class Modulation(Collector):
    """Vectors fitted on `fit_tokens` tokens spread evenly over the text; none where a token chooses one expert."""

    group = "modulation"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        self._spread = Spread(resident, resident.settings.fit_tokens)
        self._heard = 0
        self._kept: list[tuple[torch.Tensor, ...]] = []

    def hear(self, routes: Routes) -> None:
        """Keep what is wanted of the tokens and their routes."""
        rows = self._spread.rows(self._heard, len(routes.hidden_TH), routes.hidden_TH.device)
        self._heard += len(routes.hidden_TH)
        self._kept.append((routes.hidden_TH[rows], routes.index_Tk[rows], routes.weights_Tk[rows]))

    def sums(self) -> dict[str, Any]:
        """Fit the vectors."""
        settings, layer, experts = self.resident.settings, self.resident.layer, self.resident.experts
        if layer.top_k < 2 or self._heard != self._spread.expected:
            return {}  # nothing to make fewer, or the experts do not see every token once
        if settings.vectors == 3 and shown_width(experts) is None:
            return {}
        main_k = main_k_of(settings.main_k, (x.top_k for x in self.resident.skeleton.layers))
        hidden_NH, index_Nk, gates_Nk = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        made = modulated_copy(experts, layer.num_experts, main_k, settings.vectors, settings.renormalise)
        found = fit(made, sample_of(experts, hidden_NH, index_Nk, gates_Nk))
        sum_ES = found.weight_E[:, None] * found.more_ES.double()
        scalars = {"square": found.square, "plain": found.plain, "fitted": found.fitted}
        scalars |= {"main_k": main_k, "vectors": settings.vectors, "renormalise": settings.renormalise}
        return {
            "modulation_sum": sum_ES.cpu().numpy(),
            "modulation_weight": found.weight_E.cpu().numpy(),
            **{f"modulation_{name}": np.float64(value) for name, value in scalars.items()},
        }
