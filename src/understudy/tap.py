"""Observe experts at the seam while a layer runs: one forward gives every statistic, and only routed experts run.

Letters: T tokens, k routes of a token, N = T k routes, E experts, H hidden size.

transformers' grouped implementation calls an optional norm on the outputs of the experts, sorted by expert and before
the gates: reading there costs no copy and changes no bit. Where a module runs otherwise (a family's own loop, or no
decorated class at all), routes are sent through it one by one with gate 1 to be read, and the walk goes on with what
the module itself puts out: gates and sums of our own would differ from it in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from understudy.stats import ExpertStats, Probe

PROBE_TOKENS = 16


class Tap:
    """Accumulates the statistics of one MoE layer."""

    def __init__(self, experts: Any, num_experts: int) -> None:
        self.experts, self.num_experts = experts, num_experts
        self.stats: ExpertStats | None = None
        self.probe: Probe | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe every call of the experts module while the context is open."""
        experts = self.experts
        own_forward = experts.forward
        grouped = _runs_grouped(experts)

        def observed(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            if self.probe is None:
                self.probe = _probe(hidden_states, top_k_index, top_k_weights)
            run = self._grouped if grouped else self._expanded
            return run(own_forward, hidden_states, top_k_index, top_k_weights)

        experts.forward = observed  # an attribute of the object shadows the class's method
        try:
            yield
        finally:
            del experts.forward

    def _grouped(self, forward: Any, hidden_TH: Any, index_Tk: Any, weights_Tk: Any) -> Any:
        """Read the outputs where the grouped implementation would apply its norm."""
        experts = self.experts
        own_flag, own_norm = experts.has_post_expert_norm, getattr(experts, "post_expert_norm", None)

        def read(output_NH: torch.Tensor) -> torch.Tensor:
            if own_flag and own_norm is not None:
                output_NH = own_norm(output_NH)
            ids_N, order_N = torch.sort(index_Tk.reshape(-1))  # as the implementation sorts them
            self._add(output_NH, weights_Tk.reshape(-1)[order_N], ids_N, tokens=len(hidden_TH))
            return output_NH

        # Set past nn.Module's own bookkeeping, which would refuse to hide a registered norm.
        experts.__dict__.update(has_post_expert_norm=True, post_expert_norm=read)
        try:
            return forward(hidden_TH, index_Tk, weights_Tk)
        finally:
            experts.__dict__["has_post_expert_norm"] = own_flag
            del experts.__dict__["post_expert_norm"]

    def _expanded(self, forward: Any, hidden_TH: Any, index_Tk: Any, weights_Tk: Any) -> Any:
        """Send every route through the module as a token of its own, sorted by expert, to read its output."""
        tokens, k = index_Tk.shape
        ids_N, order_N = torch.sort(index_Tk.reshape(-1), stable=True)
        gates_N = weights_Tk.reshape(-1)[order_N]
        ones = torch.ones_like(gates_N)[:, None]
        output_NH = forward(hidden_TH[order_N // k], ids_N[:, None], ones)
        self._add(output_NH, gates_N, ids_N, tokens=tokens)
        return forward(hidden_TH, index_Tk, weights_Tk)

    def _add(self, output_NH: torch.Tensor, gates_N: torch.Tensor, ids_N: torch.Tensor, tokens: int) -> None:
        routed_N = gates_N != 0
        if not routed_N.all():  # some routers fill a token's unused places with expert 0 at gate 0: nobody chose it
            output_NH, gates_N, ids_N = output_NH[routed_N], gates_N[routed_N], ids_N[routed_N]
        batch = batch_stats(output_NH, gates_N, ids_N, self.num_experts, tokens)
        self.stats = batch if self.stats is None else self.stats + batch


def batch_stats(
    output_NH: torch.Tensor, gates_N: torch.Tensor, ids_N: torch.Tensor, num_experts: int, tokens: int
) -> ExpertStats:
    """Sums of one batch: outputs `[N, H]` before their gates, gates `[N]`, ids `[N]` ascending.

    One expert's rows lie together and fit a cache, so its few passes over them cost little; moments are centred.
    """
    counts = torch.bincount(ids_N, minlength=num_experts).tolist()
    H, device = output_NH.shape[1], output_NH.device
    near_EH = torch.zeros(num_experts, H, device=device)
    rest_2EH = torch.zeros(2, num_experts, H, device=device)  # sums of what is left of outputs, plain and by gate^2
    # gate sum, squared gate sum, norm sum, gated norm sum, scatter, weighted scatter
    sums_E6 = torch.zeros(num_experts, 6, dtype=torch.float64, device=device)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        y = output_NH[start : start + count].float()
        g = gates_N[start : start + count].float()
        start += count
        g2 = g * g
        norm = torch.linalg.vector_norm(y, dim=1)
        # Moments are taken about a vector near the mean, then put right: outputs may be far larger than their spread.
        near_EH[expert] = y[:16].mean(0)
        y = y - near_EH[expert]
        rest_2EH[:, expert] = torch.stack((torch.ones_like(g2), g2)) @ y
        deviation = torch.linalg.vector_norm(y, dim=1).double().square()
        terms = (
            g.sum(dtype=torch.float64),
            g2.sum(dtype=torch.float64),
            norm.sum(dtype=torch.float64),
            torch.dot(g, norm).double(),
            deviation.sum(),
            torch.dot(g2.double(), deviation),
        )
        torch.stack(terms, out=sums_E6[expert])
    gate_sum, gate_sq_sum, norm_sum, gated_norm_sum, *second_2E = sums_E6.cpu().numpy().T
    weights_2E = np.stack((np.asarray(counts, np.float64), gate_sq_sum))
    rest = rest_2EH.cpu().numpy().astype(np.float64) / np.maximum(weights_2E, np.finfo(np.float64).tiny)[..., None]
    mean, weighted_mean = near_EH.cpu().numpy() + rest
    scatter, weighted_scatter = np.maximum(second_2E - weights_2E * (rest**2).sum(-1), 0)
    return ExpertStats(
        tokens=np.float64(tokens),
        count=weights_2E[0],
        gate_sum=gate_sum,
        gate_sq_sum=gate_sq_sum,
        norm_sum=norm_sum,
        gated_norm_sum=gated_norm_sum,
        mean=mean,
        scatter=scatter,
        weighted_mean=weighted_mean,
        weighted_scatter=weighted_scatter,
    )


def _runs_grouped(experts: Any) -> bool:
    """Whether the module is decorated and its model runs transformers' own grouped implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    if not hasattr(type(experts), "_apply_gate") or not hasattr(experts, "has_post_expert_norm"):
        return False
    implementation = getattr(experts.config, "_experts_implementation", None)
    return implementation == "grouped_mm" and ALL_EXPERTS_FUNCTIONS.get("grouped_mm") is grouped_mm_experts_forward


def _probe(hidden_TH: torch.Tensor, index_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> Probe:
    """Keep a few tokens, spread over the batch."""
    rows = torch.linspace(0, len(hidden_TH) - 1, min(PROBE_TOKENS, len(hidden_TH))).long().to(hidden_TH.device)
    return Probe(
        hidden=hidden_TH[rows].float().cpu().numpy(),
        index=index_Tk[rows].long().cpu().numpy(),
        weights=weights_Tk[rows].float().cpu().numpy(),
    )
