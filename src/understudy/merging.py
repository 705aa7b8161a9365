"""Merge experts in weight space: line up their neurons, then average; and run what comes out, slowly.

Letters: I width of an expert, D numbers that make one of its neurons (`channels.neurons`), n tokens, H hidden size,
N tokens of which activations are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from understudy.channels import channel_width, neurons, rest, run_first, set_neurons, set_rest, sliced


def merged(
    experts: Any, group: Sequence[int], shares: Sequence[float], align: str, activations: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average experts, each lined up with the first: neurons `[I, D]`, and what belongs to no neuron, as a vector.

    Sums are taken in float32, or in the dtype of the weights where that is wider.

    Args:
        experts: the live module that holds the experts of a layer.
        group: rows of the module, the dominant first.
        shares: what each of them is multiplied by.
        align: how the neurons of the others are matched with the dominant's, see `matching`.
        activations: of each in the group on the same tokens, `[len(group), I, N]`; for `align="activations"`.
    """
    exact = torch.promote_types(experts.down_proj.dtype, torch.float32)
    lead = neurons(experts, group[0]).to(exact)
    of_neurons, of_rest = shares[0] * lead, shares[0] * rest(experts, group[0]).to(exact)
    for place, (row, share) in enumerate(zip(group[1:], shares[1:], strict=True), start=1):
        own = neurons(experts, row).to(exact)
        pair = None if activations is None else activations[[0, place]]
        of_neurons += share * own[matching(lead, own, align, pair)]
        of_rest += share * rest(experts, row).to(exact)
    return of_neurons, of_rest


def matching(lead: Tensor, own: Tensor, align: str, activations: Tensor | None = None) -> Tensor:
    """Return which neuron of `own` goes with each of `lead`, both `[I, D]`, as an index `[I]`.

    `activations` are those of the two experts on the same tokens, `[2, I, N]`.

    The order of an expert's neurons means nothing, so two experts are best averaged after a permutation, which is found
    as an assignment (Hungarian method):

    * `none`: as they stand.
    * `weights`: the largest sum of inner products of gate row, up row and down column (MC-SMoE, arXiv 2310.01334).
    * `directions`: the smallest sum of distances between those vectors brought to unit length: the half of REAM's cost
      (arXiv 2604.04356) that is of weights.
    * `activations`: both halves of it, with equal weight: those distances, and the distances between the activations
      of the neurons over the tokens, these too brought to unit length.

    REAM's published code measures weights in 64 principal dimensions, those of the neurons of all experts of the layer,
    and draws tokens for each expert apart. Here weights are measured in all dimensions, so that no more than two
    experts are in float32 at once and a group does not depend on the others, and the tokens are the same.
    """
    from scipy.optimize import linear_sum_assignment

    if align == "none":
        return torch.arange(len(lead), device=own.device)
    if align == "weights":
        _, columns = linear_sum_assignment((lead @ own.T).cpu().numpy(), maximize=True)
    else:
        distance = _turned(lead, own)
        if align == "activations":
            assert activations is not None
            distance = distance + _turned(*activations.to(own))
        else:
            assert align == "directions"
        _, columns = linear_sum_assignment(distance.cpu().numpy())
    return torch.from_numpy(columns).to(own.device)


def _turned(a: Tensor, b: Tensor) -> Tensor:
    """Distances between the rows of two matrices, brought to unit length; a row of zeros stays one."""
    return torch.cdist(torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1))


def run_merged(
    experts: Any,
    group: Sequence[int],
    shares: Sequence[float],
    align: str,
    hidden: Tensor,
    activations: Tensor | None = None,
) -> Tensor:
    """Return what the merged expert answers tokens `[n, H]`, before any gate: `[n, H]` float32."""
    return run_first(merged_alone(experts, group, shares, align, activations), hidden)


@torch.no_grad()
def merged_alone(
    experts: Any, group: Sequence[int], shares: Sequence[float], align: str, activations: Tensor | None = None
) -> Any:
    """Return the family's own module, cut to the dominant, its weights overwritten in the dtype they are stored in."""
    everything = torch.arange(channel_width(experts))[None]
    alone = sliced(experts, [group[0]], everything)
    of_neurons, of_rest = merged(experts, group, shares, align, activations)
    set_neurons(alone, 0, of_neurons)
    set_rest(alone, 0, of_rest)
    return alone
