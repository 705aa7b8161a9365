"""`condense`: a few experts of a layer answer every token, each times a constant; its router goes, shared experts stay.

Source: CD-MoE (arXiv 2412.00069), METHODS 4.3. Which experts, with which constants, is in the plan: a number for each
expert of the layer, 0 for those that go. Where the family's config knows dense layers, such a layer is written as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.facts import LayerFacts, ModelFacts
from understudy.kinds import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from understudy.cut import LayerCut, LayerSource

_LEAST = 8  # neurons of a dense layer: 16 bytes in the smallest dtype, which is what kernels want


class Condense(Kind):
    """A number for each expert of a layer: the constant that its answer to every token is multiplied by, 0 for none.

    Settings in a plan:
        native: true writes the experts that stay one by one, for `import understudy`, also where they could be folded
            into an ordinary dense MLP. Dense layers of a model are all as wide as the widest; this saves the zeros.
    """

    name = "condense"
    description = "a few experts answer every token times a constant, without a router"
    unseen = "are removed"
    losers = False
    form = "numbers"
    whole_numbers = False

    def __init__(self, native: bool = False) -> None:
        self.native = native

    def having(self, how: Mapping[str, Any]) -> Condense:
        """Return the kind with the settings of a plan.

        Raises:
            PlanError: a setting that there is not, or a value that it cannot have.
        """
        for name, value in how.items():
            if name != "native":
                raise PlanError(f"how: condense has no setting {name!r}; it has native")
            if not isinstance(value, bool):
                raise PlanError(f"how: native of condense is true or false, not {value!r}")
        return Condense(**{"native": self.native, **how})

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of the experts that stay."""
        return layer.expert_bytes * len(staying(entry))

    def freed_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of all experts and of the router."""
        return layer.expert_bytes * layer.experts + layer.router_bytes

    def beside_bytes(self, facts: ModelFacts, entries: Mapping[str, Entry]) -> int:
        """Return the bytes of the zeros that give all dense layers one width; 0 where nothing is folded."""
        if self.why_native(facts, entries) is not None:
            return 0
        assert facts.dense is not None
        width, total = dense_width(facts, entries), 0
        for key, entry in entries.items():
            layer = facts.layers[key]
            total += width * layer.channel_bytes - layer.block_bytes - self.added_bytes(layer, entry)
        return total + sum(width - before for before in facts.dense.widths.values()) * facts.dense.neuron_bytes

    def why_native(self, facts: ModelFacts, entries: Mapping[str, Entry]) -> str | None:
        """Say why these layers are not written as ordinary dense ones; None where they are."""
        if self.native:
            return "the plan asks for it (native: true)"
        if facts.dense is None:
            return facts.not_dense or f"the config of {facts.family} cannot say that a layer is dense"
        for key in entries:
            if reason := facts.layers[key].folds_not:
                return f"layer {key}: {reason}"
        turned = {_index(key) for key in entries} | set(facts.dense.widths)
        if facts.dense.first and turned != set(range(len(turned))):
            first = next(i for i in range(len(turned)) if i not in turned)
            return (
                f"{facts.dense.setting} in the config of {facts.family} says how many of the first layers are dense, "
                f"and layer {first} is not condensed"
            )
        return None

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return why the layer cannot do without its router."""
        return layer.router_stays

    def most(self, layer: LayerFacts) -> int:
        """Return all experts: a layer is condensed whole."""
        return layer.experts

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Change nothing here; `understudy.virtual` knows the whole plan, which decides on the form of all layers."""
        from understudy.cut import LayerCut

        return LayerCut()

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse a part of a layer, and all layers."""
        for key, entry in entries.items():
            if 0 < len(entry) < layers[key].experts:
                raise PlanError(
                    f"layer {key}: condense takes whole layers; add `rest: 0` for the experts that are not named"
                )
        if all(entries.values()):
            raise PlanError(f"condense would take all {len(layers)} MoE layers; at least one must stay")


def staying(entry: Entry) -> dict[int, float]:
    """Return the experts of a condensed layer that answer, with their constants."""
    assert isinstance(entry, dict)
    return {expert: float(w) for expert, w in entry.items() if w}


def dense_width(facts: ModelFacts, entries: Mapping[str, Entry]) -> int:
    """Return the one width of all dense layers of a model whose condensed layers are folded."""
    widths = [_LEAST, *(facts.dense.widths.values() if facts.dense else ())]
    for key, entry in entries.items():
        layer = facts.layers[key]
        widths.append(len(staying(entry)) * (layer.width or 0) + layer.shared_width)
    return max(widths)


def slow_answer(experts: Any, hidden: Tensor, weights: Mapping[int, float], shared: Sequence[Any] = ()) -> Tensor:
    """Return what a condensed layer answers tokens `[n, H]`, `[n, H]` float32, expert by expert from the live ones.

    `shared` are the shared experts, where they are part of it.
    """
    import torch

    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    index = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
    ones = torch.ones(len(hidden), 1, dtype=hidden.dtype, device=hidden.device)
    for expert, weight in weights.items():
        out += weight * experts(hidden, index + expert, ones).float()
    for mlp in shared:
        out += mlp(hidden).float()
    return out


def _index(key: str) -> int:
    return int(key.split(".")[0])


CONDENSE = Condense()
