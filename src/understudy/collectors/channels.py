"""What the neurons of each expert do on the tokens that are routed to it, and what each expert does to its layer.

Letters: T tokens, E experts, I expert width, H hidden size, N routes sorted by expert, n routes of one expert; x what
enters an expert, h its activations (what enters `down_proj`), w a column of `down_proj`, y its output before its gate,
g the gate.

Where transformers' grouped implementation runs, the activations of all routes pass through one call of the family's
gating function, and are read there; elsewhere they are computed a second time.

MoE-Slimming (arXiv 2606.18304, METHODS 10.3) scales all expert outputs of one layer by a = 0.9 and looks at the local
loss L = sum_t |o'_t - o_t|^2 / |o_t|^2, o what the decoder layer puts out and o' what it then would; o is held fixed.
No second run and no backward pass is needed where the layer adds what its experts put out to the rest of the stream,
o = rest + c r with r_t = sum_e g_te y_te, which `Stream` finds out: then o'_t - o_t = -(1 - a) c r_t, so that

    L_t = (1 - a)^2 c^2 |r_t|^2 / |o_t|^2
    dL/d(a y_te) = 2 c g_te (o'_t - o_t) / |o_t|^2 = -2 (1 - a) c^2 g_te r_t / |o_t|^2
    -dL/d(a y_te) * (a y_te) = 2 a (1 - a) c^2 g_te r_t * y_te / |o_t|^2   in each dimension; the same for y_te itself

An expert's effect is (n/T) times the mean of the last over its n tokens, each dimension clipped at the 99th percentile
of its absolute value, summed over the dimensions: that is the sum of clipped values over T, and the sum is what is
kept. The percentile is that of a batch. The paper's code smooths over batches (0.9, the last weighs most); a sum gives
every token the same weight and does not depend on the order of the batches. In other families (a norm after the block,
experts in a narrower space) these two sums are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from understudy.channels import channel_views, channel_width, projections
from understudy.collectors import Resident
from understudy.collectors.stream import Stream
from understudy.errors import UnsupportedModelError
from understudy.tap import Routes, runs_grouped

_Seen = tuple[torch.Tensor, torch.Tensor]  # what the first matrices put out `[N, 2I]`, activations `[N, I]`

_SCALE = 0.9  # a
_PERCENTILE = 0.99

_SUMS = (
    "activation_sum",
    "activation_sq_sum",
    "gated_activation_sum",
    "gated_activation_sq_sum",
    "projection_sum",
    "up_sq_sum",
    "preactivation_sq_sum",
)
_MAX = "gated_activation_sq_max"


class Activations:
    """What the neurons of an experts module do on the routes that a tap shows.

    Several may watch one module; each leaves it as it found it, so the last to begin has to be the first to end.
    """

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self._seen: _Seen | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the gating function while the context is open, where all routes pass through one call of it."""
        experts = self.experts
        if shown_width(experts) is None or not runs_grouped(experts):
            yield
            return
        name = "_apply_gate" if experts.has_gate else "act_fn"
        own, hidden = getattr(experts, name), experts.__dict__.get(name)

        def observed(projected: torch.Tensor) -> torch.Tensor:
            activations: torch.Tensor = own(projected)
            self._seen = projected, activations
            return activations

        experts.__dict__[name] = observed  # set past nn.Module's bookkeeping; hides what is there
        try:
            yield
        finally:
            if hidden is None:
                del experts.__dict__[name]
            else:
                experts.__dict__[name] = hidden

    def of(self, routes: Routes) -> Callable[[int, slice], _Seen]:
        """Return what gives `(expert, its routes)` what its first matrices put out and its activations."""
        seen, self._seen = _chosen(self._seen, routes), None

        def parts(expert: int, mine: slice) -> _Seen:
            if seen is None:
                return activations(self.experts, expert, routes.hidden_TH[routes.token_N[mine]])
            return seen[0][mine], seen[1][mine]

        return parts


class Channels(Stream):
    """Sums over the activations of each expert's neurons, and MoE-Slimming's and TENP's over each expert."""

    group = "channels"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        E, self._device = resident.layer.num_experts, resident.skeleton.device
        self._width = shown_width(resident.experts)
        shape = (E, self._width or 0)
        self._sums = {name: torch.zeros(shape, dtype=torch.float64, device=self._device) for name in (*_SUMS, _MAX)}
        self._towards_E, self._effect_E = (torch.zeros(E, dtype=torch.float64, device=self._device) for _ in range(2))
        self._local_loss = 0.0
        self._watched = Activations(resident.experts)

    def _forget(self) -> None:
        super()._forget()
        self._kept: list[tuple[Routes, int]] = []  # with the number of tokens before them

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Also watch the gating function, where all routes pass through one call of it."""
        with super().attached(), self._watched.attached():
            yield

    def hear(self, routes: Routes) -> None:
        """Add up what the neurons did, and keep the routes until the layer is through."""
        self._kept.append((routes, self._heard))
        super().hear(routes)
        watched = self._watched.of(routes)
        for expert, mine in slices(routes.ids_N):
            x_nH, y_nH = routes.hidden_TH[routes.token_N[mine]], routes.output_NH[mine].float()
            g_n, norm_n = routes.gates_N[mine].float(), routes.norm_N[mine]
            self._towards_E[expert] += _towards(x_nH.float(), y_nH, g_n, norm_n)
            if self._width is None:
                continue
            projected_nP, h_nI = watched(expert, mine)
            self._add(expert, projected_nP, h_nI.float(), y_nH / torch.where(norm_n > 0, norm_n, 1)[:, None], g_n)

    def _add(
        self, expert: int, projected_nP: torch.Tensor, h_nI: torch.Tensor, way_nH: torch.Tensor, g_n: torch.Tensor
    ) -> None:
        experts, square_nI, g2_n = self.resident.experts, h_nI * h_nI, g_n * g_n
        down_IH = channel_views(experts)["down"][expert].float()
        roles = projections(experts, projected_nP)
        terms = {
            "activation_sum": h_nI.sum(0),
            "activation_sq_sum": square_nI.sum(0),
            "gated_activation_sum": g2_n @ h_nI,
            "gated_activation_sq_sum": g2_n @ square_nI,
            "projection_sum": ((way_nH @ down_IH.T) * h_nI).sum(0),
            "up_sq_sum": roles["up"].float().square().sum(0),
        }
        if "gate" in roles:
            terms["preactivation_sq_sum"] = roles["gate"].float().square().sum(0)
        for name, term_I in terms.items():
            self._sums[name][expert] += term_I
        largest_I = (square_nI * g2_n[:, None]).amax(0)
        torch.maximum(self._sums[_MAX][expert], largest_I.double(), out=self._sums[_MAX][expert])

    def _through(self, h_TH: torch.Tensor, r_TH: torch.Tensor) -> None:
        assert self._reach is not None
        self._add_local(self._reach, h_TH, r_TH, self._kept)

    def _add_local(self, c: float, o_TH: torch.Tensor, r_TH: torch.Tensor, kept: list[tuple[Routes, int]]) -> None:
        """Add one batch to MoE-Slimming's sums, see above."""
        size_T1 = o_TH.square().sum(1, keepdim=True)
        pull_TH = r_TH * (c * c / torch.where(size_T1 > 0, size_T1, torch.inf))
        self._local_loss += (1 - _SCALE) ** 2 * float((pull_TH * r_TH).sum(dtype=torch.float64))
        pull_TH *= 2 * _SCALE * (1 - _SCALE)
        for routes, before in kept:
            for expert, mine in slices(routes.ids_N):
                g_n1, y_nH = routes.gates_N[mine].float()[:, None], routes.output_NH[mine].float()
                effect_nH = pull_TH[before + routes.token_N[mine]] * g_n1 * y_nH
                self._effect_E[expert] += _clipped(effect_nH).sum(dtype=torch.float64)

    def sums(self) -> dict[str, Any]:
        """Return the sums that this family shows."""
        found: dict[str, Any] = {"towards_sum": self._towards_E.cpu().numpy()}
        if self._width is not None:
            found |= {name: value.cpu().numpy() for name, value in self._sums.items()}
            down = channel_views(self.resident.experts)["down"]
            norms = [down_IH.double().square().sum(1) for down_IH in down]  # one by one: in float64 they are large
            found["down_sq_norm"] = torch.stack(norms).cpu().numpy()
        if self._reach is not None and self._tokens == sum(batch.size for batch in self.resident.batches):
            found["attribution_sum"] = self._effect_E.cpu().numpy()
            found["local_loss_sum"] = np.float64(self._local_loss)
        return found


def shown_width(experts: Any) -> int | None:
    """Neurons of an expert; None where what they are is not told, or not how their activations come about."""
    try:
        roles = channel_views(experts)
        known = ("gate" in roles) == ("gate_up_proj" in experts._parameters)
        return channel_width(experts) if known else None
    except UnsupportedModelError:
        return None


def slices(ids_N: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Give each expert with its routes, which lie together."""
    start = 0
    for expert, count in enumerate(torch.bincount(ids_N).tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _chosen(seen: _Seen | None, routes: Routes) -> _Seen | None:
    """Leave out the places that a router filled and nobody chose, as the routes do."""
    if seen is None or len(seen[0]) == len(routes.ids_N):
        return seen
    order_N = torch.sort(routes.index_Tk.reshape(-1))[1]  # as the implementation sorts them
    chosen_N = routes.weights_Tk.reshape(-1)[order_N] != 0
    return seen[0][chosen_N], seen[1][chosen_N]


def activations(experts: Any, expert: int, x_nH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what one expert's first matrices put out, `[n, 2I]` as the family lays it out, and its activations."""
    views = channel_views(experts)
    width, n = views["down"].shape[1], len(x_nH)
    projected_nP = x_nH.new_empty(n, width * (2 if "gate" in views else 1))
    for role, out_nI in projections(experts, projected_nP).items():
        out_nI.copy_(x_nH @ views[role][expert].T)
        if f"{role}_bias" in views:
            out_nI += views[f"{role}_bias"][expert, :, 0]
    run = experts._apply_gate if "gate" in views else experts.act_fn
    return projected_nP, run(projected_nP)


def _towards(x_nH: torch.Tensor, y_nH: torch.Tensor, g_n: torch.Tensor, norm_n: torch.Tensor) -> torch.Tensor:
    """Sum of g |y| (1 - cos(x, y)), the importance of an expert to TENP (arXiv 2606.09885)."""
    length_n = torch.linalg.vector_norm(x_nH, dim=1)
    along_n = (x_nH * y_nH).sum(1) / torch.where(length_n > 0, length_n, 1)
    return (g_n * (norm_n - along_n)).sum(dtype=torch.float64)


def _clipped(effect_nH: torch.Tensor) -> torch.Tensor:
    """Clip each dimension at the 99th percentile of its absolute value, interpolated as NumPy does."""
    rank = _PERCENTILE * (len(effect_nH) - 1)
    below = int(rank)
    # The few largest, so that no full sort is needed; the last of them is the one at or below the percentile.
    top_mH = effect_nH.abs().topk(len(effect_nH) - below, dim=0).values
    low_H, high_H = top_mH[-1], top_mH[max(len(top_mH) - 2, 0)]
    limit_H = low_H + (rank - below) * (high_H - low_H)
    return effect_nH.clamp(-limit_H, limit_H)
