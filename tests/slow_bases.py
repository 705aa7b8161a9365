"""Experts that share bases, run the slow way: the weights of each expert written out, one expert after the other.

    W_n = beta W_original + (1 - beta) W_base + B_n A_n          (LightMoE, arXiv 2603.12645, eq. 6; biases without B A)

Everything is differentiable in the parameters of the module with stand-ins.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import zoo
from understudy.adapters import Adapters
from understudy.channels import channel_width, sliced
from understudy.experts import install
from understudy.moe import find_moe_layers
from understudy.standins import StandIn

OWN_LOOPS = ["openai_privacy_filter", "step3p7"]  # the second has no choice of implementations at all
FAMILIES = [*zoo.DISTINCT, *OWN_LOOPS]
# Where gate and up do not lie as `[2I, H]` with the gate's rows first:
TRANSPOSED = ("gpt_oss", "openai_privacy_filter")  # [H, 2I]
INTERLEAVED = ("gpt_oss",)  # gate and up take turns


def shared(into: int | None, rank: int = 3) -> StandIn:
    """An expert that shares a base."""
    return StandIn("shared-v1", into=into, rank=rank)


# Two groups, named by ids that are not in the order of their members.
GROUPS = {7: shared(7), 0: shared(3), 3: shared(3), 4: shared(3), 1: shared(7)}
# Every form of stand-in at once; 7 stays as it was.
MIXED = {
    0: StandIn("constant-v1"),
    1: StandIn("merged-v1", into=6),
    2: StandIn("slim-v1", width=10, constant=True),
    3: shared(3),
    4: shared(3),
    5: shared(5),
    6: StandIn("merged-v1", into=6),
}


class Layer:
    """The experts of one layer of a tiny model: whole, and cut by `cut`."""

    def __init__(self, model_type: str, implementation: str | None = None, **changes: Any) -> None:
        self.model_type, self.model = model_type, zoo.tiny_model(model_type, **changes)
        if implementation is not None:
            self.model.set_experts_implementation(implementation)
        found = find_moe_layers(self.model)[-1]
        self.whole: Any = self.model.get_submodule(found.name)
        self.hidden_size, self.num_experts = found.hidden_size, found.num_experts

    def cut(self, stand_ins: dict[int, StandIn], beta: float | None = None, kept_rank: int = 0) -> Any:
        """A copy with stand-ins, random numbers wherever there was nothing before."""
        made = copy.deepcopy(self.whole)
        install(made, stand_ins, self.num_experts)
        if beta is not None:
            made.bases.keep_originals(self.whole)
            made.bases.beta = beta
        made.adapters = Adapters(made, len(made.kept), kept_rank) if kept_rank else None
        randomise(made)
        return made

    def routes(self, count: int = 24, top_k: int = 4, open_to: list[int] | None = None) -> list[Tensor]:
        """Hidden states, original ids and gates."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor(open_to or list(range(self.num_experts)))
        picks = torch.rand(count, len(ids), generator=generator).argsort(1)[:, :top_k]
        hidden = torch.randn(count, self.hidden_size, generator=generator)
        return [hidden, ids[picks], torch.rand(picks.shape, generator=generator)]

    def slow(self, cut: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """What the experts answer: every expert sees every token, times the sum of the gates that lead there."""
        answers = [self.answer(cut, hidden, expert) for expert in range(self.num_experts)]
        summed = [(gates * (index == expert)).sum(1, keepdim=True) for expert in range(self.num_experts)]
        return sum(gate * answer for gate, answer in zip(summed, answers, strict=True))

    def answer(self, cut: Any, hidden: Tensor, expert: int) -> Tensor:
        """What one expert answers tokens `[T, H]`, by what it has become."""
        stand_in = cut.stand_ins.get(expert)
        out = torch.zeros_like(hidden)
        if stand_in is not None and stand_in.constant:
            out = out + cut.constants[cut.constant_row(expert)]
        if stand_in is not None and stand_in.format == "affine-v1":
            maps, row = cut.thin_place(expert)
            out = out + (hidden @ maps.a[row].T) @ maps.b[row].T
        elif stand_in is None or not stand_in.constant or stand_in.width is not None:
            weights = {name: weight[None] for name, weight in self.weights(cut, expert).items()}
            width = channel_width(self.whole) if stand_in is None or stand_in.width is None else stand_in.width
            alone = sliced(self.whole, [0], torch.arange(width)[None])
            if hasattr(cut, "post_expert_norm"):
                alone.__dict__["post_expert_norm"] = cut.post_expert_norm
            first = torch.zeros(len(hidden), 1, dtype=torch.long)
            out = out + functional_call(alone, weights, (hidden, first, torch.ones_like(first, dtype=hidden.dtype)))
        return out

    def weights(self, cut: Any, expert: int) -> dict[str, Tensor]:
        """The weights of one expert by name, adapters and what is left of the original included."""
        stand_in, names = cut.stand_ins.get(expert), [name for name, _ in self.whole.named_parameters(recurse=False)]
        if stand_in is not None and stand_in.width is not None:
            child, row = cut.slim_place(expert)
            return {name: getattr(child, name)[row] for name in names}
        if expert in cut.rows:
            row = cut.rows[expert]
            return self._plus({name: getattr(cut, name)[row] for name in names}, cut.adapters, row)
        bases = cut.bases
        row, beta = bases.replaced.index(expert), 0.0 if bases.originals is None else bases.beta
        weights = {name: torch.zeros_like(getattr(self.whole, name)[0]) for name in names}
        if stand_in.into is not None:
            base = bases.base_row(stand_in.into)
            weights = {name: (1 - beta) * getattr(bases, name)[base] for name in names}
        if bases.originals is not None:
            weights = {name: beta * getattr(bases.originals, name)[row] + w for name, w in weights.items()}
        return self._plus(weights, bases.adapters, row)

    def _plus(self, weights: dict[str, Tensor], adapters: Any, row: int) -> dict[str, Tensor]:
        if adapters is None:
            return weights
        more = {role: b[row] @ a[row] for role in adapters.roles for a, b in [adapters.of(role)]}
        first = more["up"]
        if "gate" in more:
            pair = (more["gate"], first)
            first = torch.stack(pair, 1).flatten(0, 1) if self.model_type in INTERLEAVED else torch.cat(pair)
        last = more["down"]
        if self.model_type in TRANSPOSED:
            first, last = first.T, last.T
        name = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
        return weights | {name: weights[name] + first, "down_proj": weights["down_proj"] + last}


@torch.no_grad()
def randomise(cut: Any) -> None:
    """Give low-rank parts, constants and bases numbers of their own."""
    generator = torch.Generator().manual_seed(3)
    bases = cut.bases
    for part in (cut.adapters, None if bases is None else bases.adapters, *cut.thin):
        for parameter in () if part is None else part.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if cut.constants is not None:
        cut.constants.normal_(generator=generator)
    for parameter in () if bases is None else bases.parameters(recurse=False):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradients(answer: Tensor, leaves: list[Tensor], unused: bool = False) -> list[Tensor]:
    """What some direction sends back to each leaf; with `unused`, zeros for those that had no part in the answer."""
    direction = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(answer, leaves, direction.to(answer.dtype), allow_unused=unused)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
