"""Fewer full experts for a token: the strongest routes run, and vectors of the others rescale what these are given.

Source: Compressed Experts (arXiv 2503.00634), METHODS 2.3. Of the routes of a token the `main_k` with the largest gates
are main, the others auxiliary: y = sum over main of alpha_i E_i(h * theta), where theta is the mean of the auxiliary
experts' vectors theta_i, weighted by their gates. What is kept is theta_i - 1, so that nothing is rescaled at the start
to the last bit, and vectors close to 1 survive in 16 bits.

A route to an expert without weights of its own (a constant, or nothing at all) is nearly free: it stays as it is and is
neither main nor auxiliary. Routes of a token to experts that were merged are one, with the sum of their gates.

Letters: T tokens, k routes of a token, m of them main, E experts of the router, H hidden size, I width of an expert, N
routes that lead to some row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from understudy.adapters import Adapters, roles
from understudy.channels import channel_width, projections
from understudy.grouped import Picks, is_transposed, product, rows_of, thin

HIDDEN = "hidden"


class Modulation(nn.Module):
    """The vectors of a layer and the rule by which routes are main or auxiliary.

    Attributes:
        main_k: routes of a token that run.
        vectors: of each expert: 1, on the hidden state; or 3, on what the gate, up and down projections are given (2
            where the family has no gate), as (IA)3 has them.
        renormalise: the gates of the main routes are scaled up to the sum of main and auxiliary ones.
    """

    def __init__(self, experts: Any, num_experts: int, main_k: int, vectors: int, renormalise: bool) -> None:
        """Make vectors that change nothing, in the sizes, dtype and device of a family's experts module."""
        super().__init__()
        self.num_experts, self.main_k, self.vectors, self.renormalise = num_experts, main_k, vectors, renormalise
        down = experts.down_proj
        for role, size in sizes_of(experts, vectors).items():
            zeros = torch.zeros(num_experts, size, dtype=down.dtype, device=down.device)
            self.register_parameter(role, nn.Parameter(zeros, requires_grad=down.requires_grad))

    def forward(
        self, hidden_TH: Tensor, index_Tk: Tensor, gate_Tk: Tensor, key_E: Tensor, joined: bool
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Split the routes of a layer.

        Args:
            hidden_TH: what the experts are given.
            index_Tk: original ids.
            gate_Tk: their gates.
            key_E: what weights an expert has, equal for those that share all of them; -1 for none.
            joined: whether any share them.

        Returns:
            What the main experts are given `[T, H]`; their ids `[T, m]` in the router's order, E where there are none;
            their gates; and by projection what else is to be rescaled, theta - 1 of each token.
        """
        id_Tm, gate_Tm, share_TE = self.split(index_Tk, gate_Tk, key_E, joined)
        more = {role: (share_TE @ weight.float()).to(hidden_TH.dtype) for role, weight in self.named_parameters()}
        hidden = more.pop(HIDDEN, None)
        return hidden_TH if hidden is None else scaled(hidden_TH, hidden), id_Tm, gate_Tm, more

    def split(
        self, index_Tk: Tensor, gate_Tk: Tensor, key_E: Tensor, joined: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids `[T, m]` and gates `[T, m]` of the main routes, and alpha' of the auxiliary experts `[T, E]`.

        Of equal gates the earlier route is the stronger; alpha' is float32 and adds up to 1, or to 0 where there is
        none.
        """
        key_Tk, exact_Tk = key_E[index_Tk], gate_Tk.float()
        full_Tk = key_Tk >= 0
        first_Tk, sum_Tk = full_Tk, exact_Tk
        if joined:
            same_Tkk = key_Tk[:, :, None] == key_Tk[:, None, :]
            first_Tk = full_Tk & ~same_Tkk.tril(-1).any(-1)
            sum_Tk = (same_Tkk * exact_Tk[:, None, :]).sum(-1)
        strength_Tk = sum_Tk.masked_fill(~first_Tk, -torch.inf)
        slot_Tm = strength_Tk.sort(dim=1, descending=True, stable=True).indices[:, : self.main_k].sort(dim=1).values
        main_Tk = torch.zeros_like(full_Tk).scatter(1, slot_Tm, True) & first_Tk
        there_Tm = main_Tk.gather(1, slot_Tm)
        id_Tm = index_Tk.gather(1, slot_Tm).masked_fill(~there_Tm, self.num_experts)
        gate_Tm = (sum_Tk if joined else gate_Tk).gather(1, slot_Tm).masked_fill(~there_Tm, 0)
        if joined:
            main_Tk = (same_Tkk & main_Tk[:, None, :]).any(-1)
        share_Tk = exact_Tk.masked_fill(main_Tk | ~full_Tk, 0)
        total_T1 = share_Tk.sum(1, keepdim=True)
        if self.renormalise:
            main_T1 = gate_Tm.float().sum(1, keepdim=True)
            gate_Tm = gate_Tm * torch.where(main_T1 > 0, (main_T1 + total_T1) / main_T1, torch.ones_like(main_T1))
        share_Tk = share_Tk / torch.where(total_T1 > 0, total_T1, torch.ones_like(total_T1))
        share_TE = share_Tk.new_zeros(len(index_Tk), self.num_experts).scatter_add(1, index_Tk, share_Tk)
        return id_Tm, gate_Tm.to(gate_Tk.dtype), share_TE

    def with_free(self, id_Tm: Tensor, main_Tm: Tensor, index_Tk: Tensor, gate_Tk: Tensor, key_E: Tensor) -> Any:
        """Return ids and gates `[T, m + k]` of main routes and of those that are nearly free; E where there are none.

        Args:
            id_Tm: main routes, as `split` returns them, with their gates `main_Tm`.
            index_Tk: all routes, with their gates `gate_Tk`.
            key_E: as in `forward`.
        """
        free_Tk = index_Tk.masked_fill(key_E[index_Tk] >= 0, self.num_experts)
        return torch.cat([id_Tm, free_Tk], dim=1), torch.cat([main_Tm, gate_Tk], dim=1)


def sizes_of(experts: Any, vectors: int) -> dict[str, int]:
    """Return the vectors of an expert of a family's module, by what they rescale: how long each is."""
    down = experts.down_proj
    hidden = down.shape[2] if is_transposed(experts) else down.shape[1]
    if vectors == 1:
        return {HIDDEN: hidden}
    return {role: channel_width(experts) if role == "down" else hidden for role in roles(experts)}


def scaled(x_TH: Tensor, more_TH: Tensor) -> Tensor:
    """Multiply by 1 + more; by zeros nothing changes, to the last bit."""
    return torch.addcmul(x_TH, x_TH, more_TH)


def scaled_answers(
    experts: Any, hidden_TH: Tensor, more: dict[str, Tensor], adapters: Adapters | None, picks: Picks
) -> Tensor:
    """Return what experts answer before their gates, `[N, H]`, each projection given something else.

    Args:
        experts: a family's module, whose stacked weights are run.
        hidden_TH: the tokens.
        more: theta - 1 of each token by projection: gate and up `[T, H]`, down `[T, I]`.
        adapters: low-rank parts of the rows, or None.
        picks: routes to the rows.
    """
    token_N = picks.token_N
    x_NH = rows_of(hidden_TH, token_N)
    found = {}
    for role, (weight_GIH, bias_GI) in _first(experts).items():
        given_NH = scaled(x_NH, rows_of(more[role], token_N))
        found[role] = product(given_NH, weight_GIH.transpose(1, 2), picks)
        if bias_GI is not None:
            found[role] = found[role] + bias_GI[picks.row_N]
        if adapters is not None:
            found[role] = found[role] + thin(given_NH, *adapters.of(role), picks)
    if "gate" in found:
        inner_NP = found["up"].new_zeros(len(token_N), 2 * found["up"].shape[1])
        for role, part in found.items():  # views made before the first write would not carry gradients
            projections(experts, inner_NP)[role].copy_(part)
        h_NI = experts._apply_gate(inner_NP)
    else:
        h_NI = experts.act_fn(found["up"])
    h_NI = scaled(h_NI, rows_of(more["down"], token_N).to(h_NI.dtype))
    weight = experts.down_proj if is_transposed(experts) else experts.down_proj.transpose(1, 2)
    out_NH = product(h_NI, weight, picks)
    if (bias := getattr(experts, "down_proj_bias", None)) is not None:
        out_NH = out_NH + bias[picks.row_N]
    if adapters is not None:
        out_NH = adapters.out_of(out_NH, h_NI, picks)
    answer: Tensor = experts.post_expert_norm(out_NH) if getattr(experts, "has_post_expert_norm", False) else out_NH
    return answer


def _first(experts: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the first matrices `[G, I, H]` and biases `[G, I]` by role, views into the parameters."""
    fused = "gate_up_proj" in experts._parameters
    weight = experts.gate_up_proj if fused else experts.up_proj
    weight = weight.transpose(1, 2) if is_transposed(experts) else weight
    bias = getattr(experts, "gate_up_proj_bias" if fused else "up_proj_bias", None)
    biases = {} if bias is None else projections(experts, bias)
    return {role: (part, biases.get(role)) for role, part in projections(experts, weight).items()}
