"""What a MoE block does to the residual stream (layer drop, block drop, EASY-EP).

Whatever a family calls its parts, most blocks add to the stream what they put out: h = x + c m, with c a constant that
is 1 but for a few families. That this is so is found out on the first batch, where x must be what the layer holds by
then: what enters the block or the norm before it, with what attention in parallel adds. Where nothing fits (a norm
behind the block, several streams), sums that need it are left out; likewise for m = c' r + a s.

Letters: T tokens, H hidden size; h what the decoder layer puts out, m what its MoE block puts out with shared experts,
r what the routed experts do alone, s what shared experts do, a their gate, a number a token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from understudy.collectors import Collector, Resident
from understudy.tap import Routes, by_expert

_LOOK = 256  # tokens that are looked at to find out what a family does


class Stream(Collector):
    """Sums over cosines of the residual stream before and after."""

    group = "stream"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        self._eps = torch.finfo(resident.skeleton.dtype).eps
        self._checked = False
        self._changed: set[str] = set()  # parts that the family changes in place afterwards
        self._scale: float | None = None  # c
        self._reach: float | None = None  # c c', what r counts in h
        self._tokens, self._block_cos, self._moe_cos = 0, 0.0, 0.0
        self._shift_E = np.zeros(resident.layer.num_experts)
        self._forget()

    def _forget(self) -> None:
        """Be ready for the next batch."""
        self._parts: dict[str, list[tuple[torch.Tensor, torch.Tensor, int]]] = defaultdict(list)
        self._routes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # expert, token, gated norm
        self._heard = 0
        self._children: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # took, a copy of it, gave
        self._entered: tuple[torch.Tensor, torch.Tensor] | None = None  # the block took, a copy of it

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the decoder layer, its children, the block, the experts and shared experts."""
        resident, decoder, block = self.resident, self.resident.decoder, self.resident.block
        with ExitStack() as stack:

            def before(module: nn.Module, hook: Callable[..., None]) -> None:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

            def after(module: nn.Module, hook: Callable[..., None]) -> None:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

            def keep(module: nn.Module, name: str) -> None:
                after(module, lambda module, args, kwargs, output: self._keep(name, _first((output,))))

            before(decoder, self._begin)
            after(decoder, self._end)
            if block is not decoder:
                for child in decoder.children():
                    if child is not block:
                        after(child, self._passed)
                before(block, self._enter)
                keep(block, "block")
                keep(resident.experts, "routed")
                for name in resident.layer.shared:
                    inside = name.startswith(resident.layer.block + ".")
                    keep(resident.skeleton.model.get_submodule(name), "inside" if inside else "outside")
            yield

    def _keep(self, name: str, tensor: torch.Tensor | None) -> None:
        """Hold a part until the layer is through: itself, or a copy where it might be changed until then."""
        if tensor is not None:
            copied = not self._checked or name in self._changed
            self._parts[name].append((tensor.clone() if copied else tensor, tensor, tensor._version))

    def _kept_parts(self, name: str) -> list[torch.Tensor]:
        """Return what was held, float32 `[T, H]` each; nothing if it was changed against expectation."""
        parts = self._parts[name]
        if any(tensor._version != version for _, tensor, version in parts):
            if not self._checked:
                self._changed.add(name)
            elif name not in self._changed:
                return []
        return [_rows(held) for held, _, _ in parts]

    def hear(self, routes: Routes) -> None:
        """Keep what is needed of the routes until the layer is through."""
        gated_N = routes.gates_N.float() * routes.norm_N
        self._routes.append((routes.ids_N, routes.token_N + self._heard, gated_N))
        self._heard += len(routes.hidden_TH)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._forget()
        self._keep("input", _first((*args, kwargs.get("hidden_states"), *kwargs.values())))

    def _passed(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        took, gave = _first((*args, *kwargs.values())), _first((output,))
        if not self._checked and took is not None and gave is not None:
            # All are held, so that no two share a place in memory.
            self._children.append((took, _rows(took)[:_LOOK].clone(), gave))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        took = _first((*args, *kwargs.values()))
        if not self._checked and took is not None:
            self._entered = took, _rows(took)[:_LOOK].clone()

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        left = _first((output,))
        h_TH = torch.empty(0, 0) if left is None else _rows(left)
        x_TH = _like(h_TH, self._kept_parts("input"))
        block, outside, inside = (self._kept_parts(name) for name in ("block", "outside", "inside"))
        m_TH = _like(h_TH, block + outside)
        routed = self._kept_parts("routed")
        r_TH = _like(h_TH, [torch.cat(routed)] if len(routed) > 1 else routed)
        if not self._checked:
            self._check(h_TH, m_TH, r_TH, _like(h_TH, block), inside)
        h_T = _norms(h_TH)
        self._tokens += len(h_TH)
        self._block_cos += np.nan if x_TH is None else _cosines(_turn(_norms(x_TH), h_T, _norms(h_TH - x_TH)))
        turn_T = None
        if self._scale is not None and m_TH is not None:
            turn_T = _turn(_norms(torch.sub(h_TH, m_TH, alpha=self._scale)), h_T, self._scale * _norms(m_TH))
        self._moe_cos += np.nan if turn_T is None else _cosines(turn_T)
        if self._reach is None or r_TH is None:
            self._reach = None
        else:
            if turn_T is None or self._reach != self._scale or inside or outside:  # m is more than r
                turn_T = _turn(_norms(torch.sub(h_TH, r_TH, alpha=self._reach)), h_T, self._reach * _norms(r_TH))
            self._add_shift(turn_T.clamp(min=0))
            self._through(h_TH, r_TH)
        self._forget()

    def _through(self, h_TH: torch.Tensor, r_TH: torch.Tensor) -> None:
        """Take h and r of a batch, where `_reach` says what r counts in h; a place for those who build on this."""

    def _check(
        self,
        h_TH: torch.Tensor,
        m_TH: torch.Tensor | None,
        r_TH: torch.Tensor | None,
        block_TH: torch.Tensor | None,
        inside: list[torch.Tensor],
    ) -> None:
        """Find out from the first batch what the family does."""
        self._checked = True
        if m_TH is None:
            return
        h_TH, m_TH = h_TH[:_LOOK], m_TH[:_LOOK]
        candidates = [x_TH for x_TH in self._candidates() if x_TH.shape == h_TH.shape]
        found = (_proportion(h_TH - x_TH, m_TH, self._eps, h_TH, x_TH) for x_TH in candidates)
        self._scale = next((c for c in found if c is not None), None)
        s_TH = _like(h_TH, [part[:_LOOK] for part in inside])
        if self._scale is None or block_TH is None or r_TH is None or (inside and s_TH is None):
            return
        block_TH, r_TH = block_TH[:_LOOK], r_TH[:_LOOK]
        whole_TH, part_TH = block_TH, r_TH
        if s_TH is not None:  # a is not known: compare what is orthogonal to s
            whole_TH, part_TH = _without(block_TH, s_TH), _without(r_TH, s_TH)
        inner = _proportion(whole_TH, part_TH, self._eps, block_TH, r_TH, block_TH - whole_TH)
        self._reach = None if inner is None else self._scale * inner

    def _candidates(self) -> Iterator[torch.Tensor]:
        """What x may be: what entered the block, or the norm before it, and that with what took the same beside it."""
        if self._entered is None:
            return
        place, entered = self._entered[0].data_ptr(), self._entered[1]
        residuals = [x_TH for _, x_TH, gave in self._children if gave.data_ptr() == place] + [entered]
        yield from residuals
        for took, _, gave in self._children:
            beside = _rows(gave)[:_LOOK]
            yield from (x + beside for x in residuals if took.data_ptr() == place and x.shape == beside.shape)

    def _add_shift(self, shift_T: torch.Tensor) -> None:
        for ids_N, token_N, gated_N in self._routes:
            counts_E = torch.bincount(ids_N, minlength=len(self._shift_E))
            self._shift_E += by_expert((shift_T[token_N] * gated_N).double(), counts_E)

    def sums(self) -> dict[str, Any]:
        """Return the sums that this family shows."""
        if self._tokens != sum(batch.size for batch in self.resident.batches):
            return {}  # several streams, or tokens that never come by
        found: dict[str, Any] = {"block_cos_sum": np.float64(self._block_cos), "moe_cos_sum": np.float64(self._moe_cos)}
        if self._reach is not None:
            found["shift_norm_sum"] = self._shift_E
        return {name: value for name, value in found.items() if np.isfinite(value).all()}


def _first(values: Sequence[Any]) -> torch.Tensor | None:
    """The first floating tensor, looking into tuples."""
    for value in values:
        if isinstance(value, (tuple, list)):
            value = _first(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as float32 `[T, H]`, itself where it can be."""
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _like(h_TH: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The sum of parts that are as large as the stream; None where one is not, or there is none."""
    if not parts or any(part.shape != h_TH.shape for part in parts):
        return None
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _norms(x_TH: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x_TH, dim=1)


def _turn(before_T: torch.Tensor, after_T: torch.Tensor, added_T: torch.Tensor) -> torch.Tensor:
    """1 - cosine of a vector before and after something is added to it, from the three norms.

    Float32 could not tell the cosine of a small angle from 1.
    """
    product_T = before_T * after_T
    return torch.where(product_T > 0, (added_T**2 - (after_T - before_T) ** 2) / (2 * product_T), 1)


def _cosines(turn_T: torch.Tensor) -> float:
    return float((1 - turn_T).sum(dtype=torch.float64))


def _without(x_TH: torch.Tensor, s_TH: torch.Tensor) -> torch.Tensor:
    """The part of every row that is orthogonal to another."""
    return x_TH - (x_TH * s_TH).sum(1, keepdim=True) / (s_TH * s_TH).sum(1, keepdim=True).clamp(min=1e-30) * s_TH


def _proportion(whole_TH: torch.Tensor, part_TH: torch.Tensor, eps: float, *sizes: torch.Tensor) -> float | None:
    """Return c of whole = c part; None where this does not hold up to the rounding of tensors of these sizes."""
    c = float(((whole_TH * part_TH).sum(1) / (part_TH * part_TH).sum(1)).nanmedian())
    c = 1.0 if abs(c - 1) < 0.01 else c
    if not c > 0.001:
        return None
    rounding_TH = 4 * eps * sum((size.abs() for size in sizes), (c * part_TH).abs())
    fits_TH = (whole_TH - c * part_TH).abs() <= rounding_TH  # by element: massive activations hide nothing
    return c if float(fits_TH.float().mean()) > 0.99 else None  # a few elements cancel out
