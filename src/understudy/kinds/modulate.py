"""`modulate`: the strongest experts of a token run, the others become vectors that rescale what these are given.

Source: Compressed Experts (arXiv 2503.00634), METHODS 2; `understudy.modulated` has the rule. Every expert stays and
gets vectors. Ones change nothing until `recover` trains them: until then the layer is one that asks fewer experts.
Others may be fitted in calibration (`understudy.fitting`), to the layer as it is without any other kind of stand-in.

Letters: T tokens, k routes of a token, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.entries import Entry, ids_of
from understudy.errors import PlanError, StatsError
from understudy.facts import LayerFacts
from understudy.kinds import Kind
from understudy.plans import Plan
from understudy.standins import Modulated
from understudy.stats import ExpertStats

if TYPE_CHECKING:
    from understudy.cut import LayerCut, LayerSource
    from understudy.skeleton import Skeleton

_SETTINGS = ("main_k", "vectors", "renormalise", "plain", "fit")
_FITTED_FOR = ("main_k", "vectors", "renormalise")
_VECTORS = ("modulation_sum", "modulation_weight")
FIT_NEEDS = (*(f"modulation_{name}" for name in _FITTED_FOR), "modulation_plain", "modulation_fitted")


class Modulate(Kind):
    """All experts of a layer, of which each token runs fewer; it lies over what other kinds replace.

    A route to an expert without weights of its own, a constant say, is nearly free: it stays, and is neither main nor
    auxiliary.

    Settings in a plan:
        main_k: routes of a token that run, at least 1 and fewer than it has.
        vectors: of each expert: 1, on the hidden state, or 3, one for each projection.
        renormalise: scale the gates of what runs up to the sum of all.
        plain: write an ordinary checkpoint whose config asks for `main_k` experts, without vectors: what the vectors
            must beat. All MoE layers then; a router that normalises does so over the fewer.
        fit: vectors are those of the statistics and not ones.
    """

    name = "modulate"
    description = "fewer experts run for a token, and vectors of the others rescale what these are given"
    unseen = "get vectors like the others"
    losers = False

    def __init__(
        self,
        main_k: int | None = None,
        vectors: int = 1,
        renormalise: bool = False,
        plain: bool = False,
        fit: bool = False,
    ) -> None:
        self.main_k, self.vectors, self.renormalise, self.plain, self.fit = main_k, vectors, renormalise, plain, fit
        self.needs = (*_VECTORS, *FIT_NEEDS) if fit else ()

    def having(self, how: Mapping[str, Any]) -> Modulate:
        """Return the kind with the settings of a plan.

        Raises:
            PlanError: a setting that there is not, or a value that it cannot have.
        """
        for name, value in how.items():
            if name not in _SETTINGS:
                *others, last = _SETTINGS
                raise PlanError(f"how: modulate has no setting {name!r}; it has {', '.join(others)} and {last}")
            if name in ("renormalise", "plain", "fit") and not isinstance(value, bool):
                raise PlanError(f"how: {name} of modulate is true or false, not {value!r}")
            if name == "main_k" and (type(value) is not int or value < 1):
                raise PlanError(f"how: main_k of modulate is a whole number of at least 1, not {value!r}")
            if name == "vectors" and (type(value) is not int or value not in (1, 3)):
                raise PlanError(f"how: vectors of modulate is 1 or 3, not {value!r}")
        made = Modulate(**{**{name: getattr(self, name) for name in _SETTINGS}, **how})
        if made.plain and made.fit:
            raise PlanError("how: modulate with plain: true has no vectors to fit; leave out plain or fit")
        return made

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of the vectors."""
        if self.plain:
            return 0
        size = layer.hidden
        if self.vectors == 3:
            matrices = layer.channel_bytes // (layer.hidden * layer.element_bytes)  # 3, or 2 where there is no gate
            size = (matrices - 1) * layer.hidden + (layer.width or 0)
        return size * layer.element_bytes * len(ids_of(entry))

    def freed_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return 0: every expert stays."""
        return 0

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return that there is nothing to make fewer; or that projections cannot be told apart."""
        if layer.top_k < 2:
            return "a token chooses a single expert there"
        if self.vectors == 3 and layer.expert_bytes and not layer.channel_bytes:
            return "nothing tells which weights of its experts make up a neuron (vectors: 1 needs no such thing)"
        return None

    def refuses_beside(self, other: Kind) -> str | None:
        """Return why a layer cannot have both."""
        if not other.substitutes:
            return "nothing would be left to choose from; use one of them"
        if self.vectors == 3 and other.name in ("slim", "shared_base", "low_rank"):
            return "its experts have no projections of one size that are theirs alone; use vectors: 1"
        if self.vectors == 3 and self.fit and other.name == "merge":
            return (
                "vectors were fitted to neurons that are not those of merged experts; use vectors: 1, or leave out fit"
            )
        return None

    def most(self, layer: LayerFacts) -> int:
        """Return all experts: each has vectors."""
        return layer.experts

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Add vectors, that change nothing or were fitted, and store the guard with a dimension more.

        Raises:
            StatsError: they were fitted for other settings.
        """
        import torch

        from understudy.cut import LayerCut, tensor_bytes
        from understudy.layout import expert_dtype
        from understudy.shards import Piece, whole
        from understudy.weights import DTYPES

        if self.plain:
            return LayerCut()
        outline, layer = source.workshop.outline, source.layer
        key, _ = guard_tensor(source.source, layer)
        entry, dtype = source.checkpoint.entries[key], expert_dtype(source.checkpoint, source.tensors)
        vectors: Any = outline.model.get_submodule(layer.name).modulation
        added, shapes = [], {name: tuple(parameter.shape) for name, parameter in vectors.named_parameters()}
        fitted = self.fitted(layer.key, source.stats, {name: shape[1] for name, shape in shapes.items()})
        for name, parameter in vectors.named_parameters():
            (saved,) = outline.saved({f"{layer.name}.modulation.{name}": parameter})
            values = bytes(parameter.numel() * DTYPES[dtype][1])
            if fitted:
                values = tensor_bytes(torch.from_numpy(fitted[name]).to(getattr(torch, DTYPES[dtype][0])))
            added.append(Piece(saved, dtype, shapes[name], (values,)))
        return LayerCut(changed={key: replace(whole(entry), shape=(1, *entry.shape))}, added=added)

    def fitted(self, key: str, stats: ExpertStats | None, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Return the fitted vectors of a layer minus one, `[E, n]` by what they rescale; nothing where ones start.

        `sizes` gives n, in the order of the statistics. An expert that was never auxiliary gets a vector of ones.

        Raises:
            StatsError: they were fitted for other settings.
        """
        if not self.fit:
            return {}
        assert stats is not None, "the kind needs statistics"
        self.check_fitted(key, stats)
        weight_E1 = np.asarray(stats.modulation_weight)[:, None]
        mean_ES = np.asarray(stats.modulation_sum) / np.where(weight_E1 > 0, weight_E1, 1)
        ends = np.cumsum(list(sizes.values()))
        assert mean_ES.shape[1] == ends[-1]
        return dict(zip(sizes, np.split(np.ascontiguousarray(mean_ES), ends[:-1], axis=1), strict=True))

    def check_fitted(self, key: str, stats: ExpertStats) -> None:
        """Refuse vectors that were fitted for other settings.

        Raises:
            StatsError: says which.
        """
        found = {name: int(getattr(stats, f"modulation_{name}")) for name in _FITTED_FOR}
        wanted = {name: int(getattr(self, name)) for name in _FITTED_FOR}
        if found != wanted:
            was, want = (", ".join(f"{name} {value}" for name, value in of.items()) for of in (found, wanted))
            raise StatsError(
                f"layer {key}: its vectors were fitted for {was}, and the plan has {want}; calibrate with "
                "--collect modulation and the settings of the plan"
            )

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse a part of a layer, and a number of experts that is not smaller than what a token has."""
        if self.main_k is None:
            raise PlanError("how: modulate needs main_k, how many experts run for a token; add {main_k: N}")
        for key, entry in entries.items():
            layer = layers[key]
            if not entry:
                if self.plain:
                    raise PlanError(f"layer {key}: modulate with plain: true takes all MoE layers; add it there, too")
                continue
            if ids_of(entry) != tuple(range(layer.experts)):
                raise PlanError(f"layer {key}: modulate takes whole layers; write `modulate: all`")
            if not 1 <= self.main_k < layer.top_k:
                raise PlanError(
                    f"layer {key}: main_k {self.main_k} is not fewer than the {layer.top_k} experts that a token has; "
                    f"give 1 to {layer.top_k - 1}"
                )


def modulate_of(plan: Plan, key: str) -> Modulate | None:
    """Return the kind, with its settings, where a plan lets a layer run fewer experts."""
    return MODULATE.having(plan.how.get("modulate", {})) if "modulate" in plan.layers.get(key, {}) else None


def modulated_layers(source: Skeleton, plan: Plan, ordinary: bool = False) -> Modulated | None:
    """Return what config.json says of a plan's layers that have vectors, None where there are none.

    Raises:
        PlanError: they should be `ordinary`.
    """
    layers = [layer for layer in source.layers if modulate_of(plan, layer.key) is not None]
    kind = MODULATE.having(plan.how.get("modulate", {}))
    if not layers or kind.plain:
        return None
    if ordinary:
        raise PlanError("vectors of experts cannot be written as an ordinary checkpoint; leave out --materialise")
    assert kind.main_k is not None
    guards = {layer.name: guard_tensor(source, layer)[1] for layer in layers}
    return Modulated(kind.main_k, kind.vectors, kind.renormalise, guards)


def guard_tensor(source: Skeleton, layer: Any) -> tuple[str, str]:
    """Return a tensor of a layer, in the checkpoint and in the model, that is the same in both: the router's, if it is.

    Raises:
        PlanError: there is none.
    """
    from understudy.layout import guard_of

    targets = [source.targets[key] for key in source.keys[layer.index]]
    alone = {name: key for key, name in source.targets.items() if targets.count(name) == 1}
    of_router = [name for name in (guard_of(source, layer),) if name is not None]
    others = [name for name in targets if not name.startswith(f"{layer.name}.")]
    for name in [*of_router, *others]:
        if name in alone and source.checkpoint.entries[alone[name]].shape == tuple(source.get(name).shape):
            return alone[name], name
    raise PlanError(f"layer {layer.key}: no tensor of it can tell stock loaders to stop; modulate is not possible")


def plain_config(source: Skeleton, plan: Plan, config: dict[str, Any]) -> tuple[str, ...]:
    """Let a config ask for fewer experts where a plan wants that alone; say so.

    Raises:
        PlanError: the config of the family does not hold that number, or holds several.
    """
    from understudy.moe import find_moe_layers, top_k_keys
    from understudy.skeleton import read_config

    layers = [layer for layer in source.layers if (kind := modulate_of(plan, layer.key)) is not None and kind.plain]
    if not layers:
        return ()
    main_k = MODULATE.having(plan.how["modulate"]).main_k
    inner = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in inner:
        for name in top_k_keys(part, layers[0].top_k):
            part[name] = main_k
    made = find_moe_layers(source.build(read_config(type(source.config), config)))
    if any(layer.top_k != main_k for layer in made):
        raise PlanError(
            f"the config of {source.config.model_type} does not hold one number of experts for a token, so that a "
            "plain checkpoint is not possible; leave out plain"
        )
    return (f"an ordinary checkpoint whose config asks for {main_k} experts instead of {layers[0].top_k}",)


MODULATE = Modulate()
