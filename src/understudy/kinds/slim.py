"""`slim`: an expert keeps some of its neurons, gate and up rows and down columns together; the others answer zero.

Sources: HEAPr (arXiv 2509.22299), CAMERA-P (arXiv 2508.02322), MoE-Slimming (arXiv 2606.18304), TENP (arXiv
2606.09885); with a constant, FLAP (arXiv 2312.11983); refitted, see `refit`. How many neurons each expert keeps is in
the plan; which ones, a channel score tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.entries import Entry
from understudy.errors import NumericError, PlanError, StatsError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.standins import ABSENT, CONSTANT, SLIM, StandIn
from understudy.stats import ExpertStats

if TYPE_CHECKING:
    from torch import Tensor

_ORDER = "camera"
REFIT_NEEDS = {"count", "gate_sq_sum", "gated_activation_sum", "activation_gram"}


class Slim(Kind):
    """A number of neurons for each expert, which may be 0; the router stays as it is.

    Settings in a plan:
        order: name of the channel score; the neurons that rank highest in their expert stay, of equals the first.
        constant: what the dropped neurons answer on average over the routed tokens is added (FLAP).
        refit: the down columns of the neurons that stay take over what they can of the others, weighted by gate^2, and
            the constant is what is then missing on average. It comes with `constant` only.
    """

    name = "slim"
    description = "some of the neurons of each expert, the best by a channel score"
    unseen = "keep their first neurons"
    losers = False
    form = "numbers"

    def __init__(self, order: str = _ORDER, constant: bool = False, refit: bool = False) -> None:
        self.order, self.constant, self.refit = order, constant, refit

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the order reads, and what the constant is made of."""
        from understudy.channel_scores import get_channel_score

        needs = set(get_channel_score(self.order).needs)
        of_constant = REFIT_NEEDS if self.refit else {"count", "activation_sum"}
        return tuple(sorted(needs | (of_constant if self.constant else set())))

    def having(self, how: Mapping[str, Any]) -> Slim:
        """Return the kind with the settings of a plan.

        Raises:
            PlanError: a setting that there is not, or a value that it cannot have.
        """
        from understudy.channel_scores import get_channel_score

        for name, value in how.items():
            if name not in ("order", "constant", "refit"):
                raise PlanError(f"how: slim has no setting {name!r}; it has order, constant and refit")
            if not isinstance(value, str if name == "order" else bool):
                like = "the name of a channel score" if name == "order" else "true or false"
                raise PlanError(f"how: {name} of slim is {like}, not {value!r}")
        get_channel_score(how.get("order", self.order))
        kind = Slim(**{"order": self.order, "constant": self.constant, "refit": self.refit, **how})
        if kind.refit and not kind.constant:
            raise PlanError("how: refit of slim comes with a constant; add constant: true")
        return kind

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of the neurons that stay, of what belongs to none of them, and of the constants."""
        vector, total = layer.hidden * layer.element_bytes, 0
        for width in _widths(entry).values():
            if width:
                total += width * layer.channel_bytes + _rest_bytes(layer) + vector * self.constant
            else:
                total += vector * self._answers(layer)
        return total

    def _answers(self, layer: LayerFacts) -> bool:
        """Whether an expert without neurons still answers something."""
        return self.constant or _rest_bytes(layer) > 0

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return that neurons cannot be told apart; unknown where the facts carry no sizes."""
        if layer.expert_bytes and not layer.channel_bytes:
            return "nothing tells which weights of its experts make up a neuron"
        return None

    def most(self, layer: LayerFacts) -> int:
        """Return all experts: each may lose neurons."""
        return layer.experts

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse widths that the experts do not have, and a layer that keeps no neuron."""
        for key, entry in entries.items():
            layer, widths = layers[key], _widths(entry)
            for expert, width in widths.items():
                if layer.width is not None and width >= layer.width:
                    raise PlanError(
                        f"layer {key}: slim keeps {width} neurons of expert {expert}, which has {layer.width}; give "
                        "fewer, or leave the expert out to keep it as it is"
                    )
            if len(widths) == layer.experts and not any(widths.values()):
                raise PlanError(
                    f"layer {key}: none of the {layer.experts} experts keeps a neuron; slim needs one in each layer"
                )

    def stand_ins(self, entry: Entry, how: Mapping[str, Any], layer: LayerFacts | None = None) -> dict[int, StandIn]:
        """Declare a width for each expert; without neurons it is its bias or a constant, or answers nothing."""
        kind = self.having(how)
        empty = StandIn(CONSTANT if kind.constant or (layer and kind._answers(layer)) else ABSENT)
        return {
            expert: StandIn(SLIM, width=width, constant=kind.constant) if width else empty
            for expert, width in _widths(entry).items()
        }

    def fill(self, made: Any, source: Any, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None) -> None:
        """Copy the neurons that stay, in their own order, and write the constants."""
        import torch

        from understudy.channels import channel_views, neurons, rest, set_neurons, set_rest

        kind = self.having(how)
        kind._check_family(source)
        for expert, kept in kind._kept(source, entry, stats).items():
            bias = rest(source, expert)
            columns, vector_H = kind._fitted(source, expert, kept, stats)
            if len(kept):
                place, row = made.slim_place(expert)
                set_neurons(place, row, neurons(source, expert)[kept])
                set_rest(place, row, bias)
                if columns is not None:
                    channel_views(place)["down"][row].copy_(columns)
            if made.stand_ins[expert].constant:
                vector = torch.zeros(made.constants.shape[1], device=made.constants.device)
                if not len(kept):
                    vector += bias.float() if len(bias) else 0
                if vector_H is not None:
                    vector += vector_H.to(vector.device)
                made.constants.data[made.constant_row(expert)] = vector.to(made.constants.dtype)

    def reference(
        self, source: Any, hidden: Tensor, expert: int, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None
    ) -> Tensor:
        """Return what the whole expert answers tokens `[n, H]` with the dropped down columns zeroed: `[n, H]` float32.

        With a constant, the dropped columns at their mean activation, one by one. Refitted, by solving ridge regression
        as it is written down.
        """
        import torch

        from understudy.channels import channel_views, channel_width, sliced

        kind = self.having(how)
        kind._check_family(source)
        width = channel_width(source)
        kept = set(kind._kept(source, entry, stats)[expert].tolist())
        masked = sliced(source, [expert], torch.arange(width)[None])
        down = channel_views(masked)["down"][0]
        constant = torch.zeros(down.shape[1])
        if kind.refit and stats is not None and stats.count[expert]:
            columns, c = _ridge(stats, expert, down.double().cpu().numpy(), sorted(kept))
            down[sorted(kept)] = torch.from_numpy(columns).to(down)
            constant += torch.from_numpy(c)
        for k in range(width):
            if k not in kept:
                if kind.constant and not kind.refit and stats is not None and stats.count[expert]:
                    mean = float(stats.activation_sum[expert, k] / stats.count[expert])
                    constant += mean * down[k].float().cpu()
                down[k] = 0
        index = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        out: Tensor = masked(hidden, index, torch.ones_like(index, dtype=hidden.dtype)).float()
        return out + constant.to(out.device)

    def _kept(self, source: Any, entry: Entry, stats: ExpertStats | None) -> dict[int, Tensor]:
        """Which neurons each expert keeps, ascending, by original id."""
        import torch

        from understudy.channel_scores import get_channel_score
        from understudy.channels import channel_width, num_experts
        from understudy.recipe import Selection
        from understudy.scores import Context

        assert stats is not None, "the kind needs statistics"
        shape = num_experts(source), channel_width(source)
        # What a layer's place in the model or the settings of a plan could change is not for a neuron's rank in it.
        facts = LayerFacts(
            name="",
            experts=shape[0],
            top_k=0,
            hidden=0,
            width=shape[1],
            expert_params=0,
            expert_bytes=0,
            element_bytes=0,
        )
        score = np.asarray(get_channel_score(self.order).compute(stats, Context(facts, 0, Selection())), np.float64)
        if score.shape != shape:
            raise StatsError(f"statistics of {score.shape} experts and neurons, the model has {shape}; calibrate again")
        if not np.isfinite(score).all():
            raise NumericError(f"the {self.order} score of a neuron is NaN or infinite; calibrate again")
        best = np.argsort(-score, axis=1, kind="stable")
        return {e: torch.from_numpy(np.sort(best[e, :width])) for e, width in _widths(entry).items()}

    def _fitted(
        self, source: Any, expert: int, kept: Tensor, stats: ExpertStats | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Down columns `[n, H]` of the neurons that stay and the constant `[H]`, each None where it is not asked for.

        Raises:
            NumericError: they are NaN or infinite.
        """
        import torch

        from understudy.channels import channel_views
        from understudy.refit import centred, refitted

        if not self.refit:
            return None, self._constant(source, expert, kept, stats) if self.constant else None
        assert stats is not None
        sums = (stats.activation_gram, stats.gated_activation_sum, stats.gate_sq_sum)
        moment, mean = centred(*(part[expert] for part in sums))
        down = channel_views(source)["down"][expert].double().cpu().numpy()
        columns, constant = refitted(moment, mean, down, kept.numpy())
        found = torch.from_numpy(columns).float(), torch.from_numpy(constant).float()
        if not all(bool(part.isfinite().all()) for part in found):
            raise NumericError(f"slim: what is refitted of expert {expert} is NaN or infinite; calibrate again")
        return found

    def _constant(self, source: Any, expert: int, kept: Tensor, stats: ExpertStats | None) -> Tensor:
        """What the dropped neurons answer at their mean activation over the routed tokens, `[H]` float32."""
        import torch

        from understudy.channels import channel_views

        assert stats is not None
        mean = torch.from_numpy(stats.activation_sum[expert] / max(float(stats.count[expert]), 1.0)).float()
        mean[kept] = 0
        down_IH = channel_views(source)["down"][expert].float()
        return mean.to(down_IH.device) @ down_IH

    def _check_family(self, source: Any) -> None:
        if self.constant and getattr(source, "has_post_expert_norm", False):
            raise PlanError(
                f"slim with a constant is not possible: {type(source).__name__} normalises what an expert puts out, "
                "and the constant would come after that; set constant: false"
            )


def _ridge(stats: ExpertStats, expert: int, down: np.ndarray, kept: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Down columns of the neurons that stay and the constant of an expert, with its whole `down` `[I, H]`."""
    from understudy.refit import LOST, RIDGE

    mean = stats.gated_activation_sum[expert] / stats.gate_sq_sum[expert]
    A = stats.activation_gram[expert].astype(np.float64) - stats.gate_sq_sum[expert] * np.outer(mean, mean)
    whole = float(stats.activation_gram[expert].diagonal().mean())
    r = max(RIDGE * A.diagonal().mean(), LOST * whole)
    if not kept:
        return down[:0], mean @ down
    if np.maximum(A.diagonal(), 0).mean() <= LOST * whole:  # one token, say
        return down[kept], mean @ down - mean[kept] @ down[kept]
    D = np.linalg.solve(A[kept][:, kept] + r * np.eye(len(kept)), A[kept] @ down + r * down[kept])
    return D, mean @ down - mean[kept] @ D


def _widths(entry: Entry) -> dict[int, int]:
    """Return an entry that is known to hold numbers as what it is; an untouched layer has an empty one."""
    assert isinstance(entry, dict) or not entry
    return {expert: int(width) for expert, width in entry.items()} if isinstance(entry, dict) else {}


def _rest_bytes(layer: LayerFacts) -> int:
    """Bytes of an expert that belong to none of its neurons: the bias of the down projection."""
    return layer.expert_bytes - (layer.width or 0) * layer.channel_bytes


SLIM_KIND = Slim()
