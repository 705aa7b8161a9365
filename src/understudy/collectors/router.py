"""The router's logits: how experts are asked for together (LightMoE's and REAM's similarity, MC-SMoE's done right).

They are read where the router computes them, so that whatever it does to its input before, and a bias of its linear
map, are in them, and what it does afterwards (softmax, correction bias, groups) is not.

Letters: B blocks of text, S tokens of a block, T = B S, E experts, D what enters the router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from understudy.collectors import Collector, Resident
from understudy.collectors.weights import router_weight

_PRODUCTS = ("linear", "matmul", "mm", "addmm", "__matmul__", "einsum")


class Router(Collector):
    """Sums over the router's logits."""

    group = "router"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        E = resident.layer.num_experts
        self._sums: dict[str, Any] = {
            "sequences": 0.0,
            "logit_norm_sum": 0.0,
            "logit_gram": np.zeros((E, E)),
            "logit_cos_sum": np.zeros((E, E)),
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the products that the module which owns the router's matrix computes."""
        model = self.resident.skeleton.model
        name = router_weight(self.resident.skeleton, self.resident.layer)
        owner = model.get_submodule(name.rpartition(".")[0]) if name else None
        if name is None or owner is None or owner is self.resident.decoder or owner is self.resident.block:
            yield  # a mode around all that a layer runs would cost too much
            return
        own_forward, shape = owner.forward, tuple(self.resident.skeleton.get(name).shape)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Products(shape) as products:
                output = own_forward(*args, **kwargs)
            if len(products.found) == 1:
                self._add(products.found[0])
            else:
                self._sums["sequences"] = np.nan  # nothing fits, or too much: such sums are left out
            return output

        owner.forward = forward  # an attribute of the object shadows the class's method
        try:
            yield
        finally:
            del owner.forward

    def _add(self, logits_TE: torch.Tensor) -> None:
        E, S = logits_TE.shape[-1], self.resident.seq_len
        logits_TE = logits_TE.reshape(-1, E).float()
        if len(logits_TE) % S:  # not every token of every block comes by here
            self._sums["sequences"] = np.nan
            return
        logits_BSE = logits_TE.view(-1, S, E)
        gram_BEE = (logits_BSE.mT @ logits_BSE).double()
        norm_BE = gram_BEE.diagonal(dim1=1, dim2=2).sqrt()
        scale_BE = torch.where(norm_BE > 0, 1 / norm_BE, 0)
        cosine_BEE = gram_BEE * scale_BE[:, :, None] * scale_BE[:, None, :]
        batch = {
            "sequences": float(len(logits_BSE)),
            "logit_norm_sum": float(torch.linalg.vector_norm(logits_TE, dim=1).sum(dtype=torch.float64)),
            "logit_gram": gram_BEE.sum(0).cpu().numpy(),
            "logit_cos_sum": cosine_BEE.sum(0).cpu().numpy(),
        }
        self._sums = {name: value + batch[name] for name, value in self._sums.items()}

    def sums(self) -> dict[str, Any]:
        """Return the sums, unless the router did not show its logits."""
        expected = sum(len(batch) for batch in self.resident.batches)
        if self._sums["sequences"] != expected:
            return {}
        return {name: np.asarray(value, np.float64) for name, value in self._sums.items()}


class _Products(TorchFunctionMode):
    """Keeps the results of products with a matrix of this shape, `[E, D]`, whatever dtype it was converted to."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS and isinstance(result, torch.Tensor):
            shapes = {tuple(x.shape) for x in args if isinstance(x, torch.Tensor)}
            if result.shape[-1] == self.shape[0] and shapes & {self.shape, self.shape[::-1]}:
                self.found.append(result)
        return result
