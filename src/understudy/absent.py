"""A MoE sublayer that is not there: it answers zero, and what surrounds it goes on as before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class AbsentBlock(nn.Module):
    """Stands in the place of a MoE sublayer; holds its router's matrix `[0, H]`, so that the name stays taken."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return zeros of the shape of the input."""
        return torch.zeros_like(hidden_states)


def install_absent(model: nn.Module, block: str, guard: str) -> None:
    """Put an absent block into a model, on the meta device or a real one; `guard` names the matrix that is left empty.

    Raises:
        AttributeError: the model has no such block or matrix.
    """
    matrix = model.get_parameter(guard)
    absent = AbsentBlock()
    *path, leaf = guard[len(block) + 1 :].split(".")
    place: nn.Module = absent
    for part in path:
        place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    place.register_parameter(leaf, nn.Parameter(matrix.detach()[:0], requires_grad=False))
    model.set_submodule(block, absent)
