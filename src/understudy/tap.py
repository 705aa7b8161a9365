"""Observe experts at the seam while a layer runs: one forward gives every statistic, and only routed experts run.

Letters: T tokens, k routes of a token, N = T k routes, E experts, H hidden size.

transformers' grouped implementation calls an optional norm on the outputs of the experts, sorted by expert and before
the gates: reading there costs no copy and changes no bit. Where a module runs otherwise (a family's own loop, or no
decorated class at all), routes are sent through it one by one with gate 1 to be read, and the walk goes on with what
the module itself puts out: gates and sums of our own would differ from it in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from understudy.stats import ExpertStats, Probe

PROBE_TOKENS = 16


@dataclass(frozen=True)
class Routes:
    """What one call of the experts showed: its arguments, then every route that was chosen, sorted by expert."""

    hidden_TH: torch.Tensor
    index_Tk: torch.Tensor
    weights_Tk: torch.Tensor
    ids_N: torch.Tensor  # expert of each route, ascending
    token_N: torch.Tensor  # row of hidden_TH that was routed
    gates_N: torch.Tensor  # never 0: places that the router filled and nobody chose are left out
    output_NH: torch.Tensor  # before the gates
    norm_N: torch.Tensor  # float32, of each output


class Tap:
    """Accumulates the statistics of one MoE layer; `hearing` are told of every call, in its middle."""

    def __init__(self, experts: Any, num_experts: int, hearing: Sequence[Callable[[Routes], None]] = ()) -> None:
        self.experts, self.num_experts, self.hearing = experts, num_experts, hearing
        self.stats: ExpertStats | None = None
        self.probe: Probe | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe every call of the experts module while the context is open."""
        experts = self.experts
        own_forward = experts.forward
        grouped = runs_grouped(experts)

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
            self._add(output_NH, ids_N, order_N, hidden_TH, index_Tk, weights_Tk)
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
        k = index_Tk.shape[1]
        ids_N, order_N = torch.sort(index_Tk.reshape(-1), stable=True)
        ones = torch.ones_like(weights_Tk.reshape(-1))[:, None]
        output_NH = forward(hidden_TH[order_N // k], ids_N[:, None], ones)
        self._add(output_NH, ids_N, order_N, hidden_TH, index_Tk, weights_Tk)
        return forward(hidden_TH, index_Tk, weights_Tk)

    def _add(self, output_NH: Any, ids_N: Any, order_N: Any, hidden_TH: Any, index_Tk: Any, weights_Tk: Any) -> None:
        gates_N, token_N = weights_Tk.reshape(-1)[order_N], order_N // index_Tk.shape[1]
        routed_N = gates_N != 0
        if not routed_N.all():  # some routers fill a token's unused places with expert 0 at gate 0: nobody chose it
            output_NH, gates_N, ids_N, token_N = (x[routed_N] for x in (output_NH, gates_N, ids_N, token_N))
        norm_N = torch.empty(len(ids_N), device=output_NH.device)
        batch = batch_stats(output_NH, gates_N, ids_N, self.num_experts, len(hidden_TH), norm_N)
        self.stats = batch if self.stats is None else self.stats + batch
        for hear in self.hearing:
            hear(Routes(hidden_TH, index_Tk, weights_Tk, ids_N, token_N, gates_N, output_NH, norm_N))


def batch_stats(
    output_NH: torch.Tensor,
    gates_N: torch.Tensor,
    ids_N: torch.Tensor,
    num_experts: int,
    tokens: int,
    norm_N: torch.Tensor | None = None,
) -> ExpertStats:
    """Sums of one batch: outputs `[N, H]` before their gates, gates `[N]`, ids `[N]` ascending; fills `norm_N`.

    One expert's rows lie together and fit a cache, so its few passes over them cost little; moments are centred.
    """
    counts_E = torch.bincount(ids_N, minlength=num_experts)
    H, device = output_NH.shape[1], output_NH.device
    norm_N = torch.empty(len(ids_N), device=device) if norm_N is None else norm_N
    near_EH = torch.zeros(num_experts, H, device=device)
    rest_2EH = torch.zeros(2, num_experts, H, device=device)  # sums of what is left of outputs, plain and by gate^2
    # smallest and largest element, scatter, weighted scatter
    sums_E4 = torch.zeros(num_experts, 4, dtype=torch.float64, device=device)
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if not count:
            continue
        y = output_NH[start : start + count].float()
        g2 = gates_N[start : start + count].float().square()
        torch.linalg.vector_norm(y, dim=1, out=norm_N[start : start + count])
        start += count
        low, high = torch.aminmax(y)
        # Moments are taken about a vector near the mean, then put right: outputs may be far larger than their spread.
        near_EH[expert] = y[:16].mean(0)
        y = y - near_EH[expert]
        rest_2EH[:, expert] = torch.stack((torch.ones_like(g2), g2)) @ y
        deviation = torch.linalg.vector_norm(y, dim=1).double().square()
        torch.stack(
            (low.double(), high.double(), deviation.sum(), torch.dot(g2.double(), deviation)), out=sums_E4[expert]
        )
    low_E, high_E, *second_2E = sums_E4.cpu().numpy().T
    gate_sum, gate_sq_sum, norm_sum, gated_norm_sum, norm_sq_sum = _gate_sums(gates_N, norm_N, counts_E)
    weights_2E = np.stack((counts_E.cpu().numpy().astype(np.float64), gate_sq_sum))
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
        norm_sq_sum=norm_sq_sum,
        output_max=np.maximum(-low_E, high_E),
    )


def _gate_sums(gates_N: torch.Tensor, norm_N: torch.Tensor, counts_E: torch.Tensor) -> np.ndarray:
    """Sums over the routes of each expert of g, g^2, |y|, g |y|, |y|^2, float64 `[5, E]`."""
    g_N, n_N = gates_N.double(), norm_N.double()
    return by_expert(torch.stack((g_N, g_N * g_N, n_N, g_N * n_N, n_N * n_N), dim=1), counts_E).T


def by_expert(terms: torch.Tensor, counts_E: torch.Tensor) -> np.ndarray:
    """Sum terms `[N, ...]` of routes that are sorted by expert, `[E, ...]`; the same bits on every run and device."""
    if not len(terms):
        return np.zeros((len(counts_E), *terms.shape[1:]))
    return torch.segment_reduce(terms, "sum", lengths=counts_E, axis=0, initial=0).cpu().numpy()


def runs_grouped(experts: Any) -> bool:
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
