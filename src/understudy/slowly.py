"""Layers that run fewer experts for a token, the slow way, one token after the other: what is written must answer so.

Letters: T tokens, k routes of a token, E experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.channels import channel_views, channel_width, sliced
from understudy.kinds.modulate import Modulate
from understudy.standins import MERGED, StandIn


def slow_split(
    stand_ins: Mapping[int, StandIn], kind: Modulate, index: Tensor, gates: Tensor
) -> tuple[Tensor, list[dict[int, float]]]:
    """Split routes `[T, k]` token by token: gates with zeros for auxiliary routes, and alpha' by id for each token."""
    gates, shares = gates.clone(), []
    for t, (ids, weights) in enumerate(zip(index.tolist(), gates.tolist(), strict=True)):
        together: dict[int, float] = {}  # experts that share all weights are one
        for e, weight in zip(ids, weights, strict=True):
            if e not in stand_ins or not stand_ins[e].free:
                together[_weights_of(e, stand_ins)] = together.get(_weights_of(e, stand_ins), 0.0) + weight
        main = sorted(together, key=lambda group: -together[group])[: kind.main_k]
        free = [e in stand_ins and stand_ins[e].free for e in ids]
        runs = [_weights_of(e, stand_ins) in main for e in ids]
        aux = [s for s in range(len(ids)) if not free[s] and not runs[s]]
        total = sum(weights[s] for s in aux)
        shares.append({ids[s]: weights[s] / total for s in aux} if total else {})
        kept = sum(weights[s] for s in range(len(ids)) if runs[s] and not free[s])
        for s in range(len(ids)):
            if not free[s]:
                factor = (kept + total) / kept if kind.renormalise and kept else 1.0
                gates[t, s] = gates[t, s] * factor if runs[s] else torch.zeros(())
    return gates, shares


def slow_means(vectors: Mapping[str, np.ndarray], shares: list[dict[int, float]]) -> dict[str, Tensor]:
    """Return the mean vector of each token's auxiliary experts minus one, float32 `[T, n]` by what it rescales."""
    means = {}
    for role, more_En in vectors.items():
        rows = [sum((a * more_En[e] for e, a in share.items()), np.zeros(more_En.shape[1])) for share in shares]
        means[role] = torch.from_numpy(np.stack(rows)).float()
    return means


def slow_answers(experts: Any, hidden: Tensor, index: Tensor, means: Mapping[str, Tensor]) -> Tensor:
    """Return what each route answers before its gate, float32 `[T, k, H]`, where projections are not given the same.

    One route at a time by the family's own forward: what a projection is given is rescaled in its weights.

    Args:
        experts: the family's module.
        hidden: `[T, H]`.
        index: ids `[T, k]`.
        means: by projection, `[T, n]`.
    """
    everything = torch.arange(channel_width(experts))[None]
    first, one = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=hidden.dtype)
    answers = []
    for t, ids in enumerate(index.tolist()):
        for e in ids:
            alone = sliced(experts, [e], everything)
            for role, view_1In in channel_views(alone).items():
                if role in means:
                    theta = (1 + means[role][t]).to(view_1In.dtype)
                    view_1In.mul_(theta[:, None] if role == "down" else theta)
            answers.append(alone(hidden[t : t + 1], first, one)[0].float())
    return torch.stack(answers).view(*index.shape, -1)


def _weights_of(expert: int, stand_ins: Mapping[int, StandIn]) -> int:
    stand_in = stand_ins.get(expert)
    return stand_in.into if stand_in is not None and stand_in.format == MERGED and stand_in.into is not None else expert
