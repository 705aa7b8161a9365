"""What the loss says about the activations of experts (HEAPr): squares of its gradient, on the way back.

It is no collector of the walk forward, which knows no loss: it watches a layer that is run again with gradients.

Letters: E experts, I expert width, N routes sorted by expert; h the activations of an expert, d the gradient of the
loss with respect to h. The gate is in d, as it multiplies the expert's output. H hidden size, T tokens; u the gradient
with respect to what the routed experts put out together for a token, W the matrix of `down_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from understudy.channels import channel_views
from understudy.errors import UnsupportedModelError
from understudy.tap import runs_grouped


class Gradients:
    """Sums of one MoE layer, while a walk back runs through it.

    Args:
        experts: the live experts module.
        num_experts: E.
        grams: also sum up the products of gradients at the output, float64 while they are added up.

    Raises:
        UnsupportedModelError: the module does not show its activations.
    """

    def __init__(self, experts: Any, num_experts: int, grams: bool = False) -> None:
        self.experts, self.num_experts, self.grams = experts, num_experts, grams
        if not runs_grouped(experts):
            raise UnsupportedModelError(
                f"{type(experts).__name__} does not run transformers' grouped experts, and only there the gradients of "
                "its activations are seen; leave --experts at auto, or calibrate without --collect gradients"
            )
        self._sums: torch.Tensor | None = None  # [2, E, I] float64
        self._gram_HH: torch.Tensor | None = None
        self._count_E, self._tokens = np.zeros(num_experts), 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the run of the layer forth and back while the context is open."""
        experts, name = self.experts, "_apply_gate" if self.experts.has_gate else "act_fn"
        own_forward, own_activation = experts.forward, getattr(experts, name)
        routes: list[tuple[torch.Tensor, torch.Tensor]] = []

        def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            ids_N, order_N = torch.sort(top_k_index.reshape(-1))  # as the implementation sorts them
            routes.append((ids_N, top_k_weights.detach().reshape(-1)[order_N] != 0))
            output_TH = own_forward(hidden_states, top_k_index, top_k_weights)
            if self.grams:
                output_TH.register_hook(self._add_output)
            return output_TH

        def activation(projected: torch.Tensor) -> torch.Tensor:
            h_NI = own_activation(projected)
            if not h_NI.requires_grad:  # the last layer on the way back: nothing below asks for a gradient
                h_NI = h_NI.detach().requires_grad_()
            values_NI, (ids_N, routed_N) = h_NI.detach(), routes.pop()
            h_NI.register_hook(lambda d_NI: self._add(values_NI, d_NI, ids_N, routed_N))
            return h_NI

        # Attributes of the object shadow the class's methods, and a registered activation module.
        experts.__dict__.update({"forward": forward, name: activation})
        try:
            yield
        finally:
            del experts.__dict__["forward"], experts.__dict__[name]

    def _add(self, h_NI: torch.Tensor, d_NI: torch.Tensor, ids_N: torch.Tensor, routed_N: torch.Tensor) -> None:
        if self._sums is None:
            shape = (2, self.num_experts, h_NI.shape[1])
            self._sums = torch.zeros(shape, dtype=torch.float64, device=h_NI.device)
        if not routed_N.all():  # some routers fill a token's unused places at gate 0: nobody chose those
            h_NI, d_NI, ids_N = h_NI[routed_N], d_NI[routed_N], ids_N[routed_N]
        start = 0
        for expert, count in enumerate(torch.bincount(ids_N, minlength=self.num_experts).tolist()):
            if count:
                d = d_NI[start : start + count].double()
                effect = d * h_NI[start : start + count].double()
                self._sums[0, expert] += d.square_().sum(0)
                self._sums[1, expert] += effect.square_().sum(0)
                self._count_E[expert] += count
                start += count

    def _add_output(self, u_TH: torch.Tensor) -> None:
        u_TH = u_TH.reshape(-1, u_TH.shape[-1]).float()
        if self._gram_HH is None:
            self._gram_HH = torch.zeros(u_TH.shape[1], u_TH.shape[1], dtype=torch.float64, device=u_TH.device)
        self._gram_HH += u_TH.T @ u_TH
        self._tokens += len(u_TH)

    def sums(self) -> dict[str, Any]:
        """Return sums of squares `[E, I]` and routes `[E]`, float64, and the grams; the layer is still there."""
        assert self._sums is not None, "the layer was never run"
        gradient, effect = self._sums.cpu().numpy()
        found: dict[str, Any] = {"gradient_sq_sum": gradient, "effect_sq_sum": effect, "gradient_count": self._count_E}
        if self._gram_HH is None:
            return found
        gram_HH = self._gram_HH.float()
        down = [w_IH.float() for w_IH in channel_views(self.experts)["down"]]
        found["gradient_tokens"] = np.float64(self._tokens)
        found["gradient_down_gram"] = torch.stack([(w_IH @ gram_HH @ w_IH.T).cpu() for w_IH in down]).numpy()
        return found
