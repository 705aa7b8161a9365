"""What replaced experts are, as config.json declares it: plain data, in the words of vLLM >= 0.33 where it has them.

`compression_config.transform_config.expert_substitution` names, for each experts module, the format of every replaced
expert by original id. Engines know `constant-v1`; the other formats are ours, and a folder that has one of them also
carries an architecture that no engine knows, so that what goes by the architecture refuses it.

    constant-v1  one vector answers for the expert
    merged-v1    the expert shares the weights of the expert `into`; that one is listed, too
    slim-v1      the expert keeps `width` of its neurons, and perhaps answers a constant vector on top
    absent-v1    the expert answers zero
    shared-v1    the expert is the weights of its group, named by its first member `into`, plus products of two thin
                 matrices of rank `rank` that are its own; without `into`, these products alone
    affine-v1    the expert answers a constant vector plus its input times two thin matrices of rank `rank`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from understudy.errors import CheckpointError, PlanError

CONSTANT, MERGED, SLIM, ABSENT = "constant-v1", "merged-v1", "slim-v1", "absent-v1"
SHARED, AFFINE = "shared-v1", "affine-v1"
ARCHITECTURE_PREFIX = "Understudy"
ROUTER_SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


@dataclass(frozen=True)
class StandIn:
    """What one expert has become: its format, and what the format tells of it."""

    format: str
    into: int | None = None  # of merged-v1, and of shared-v1 where it has a base
    width: int | None = None  # of slim-v1, at least 1
    constant: bool = False  # of slim-v1, and always of constant-v1 and affine-v1
    rank: int | None = None  # of shared-v1 and affine-v1, at least 1

    def __post_init__(self) -> None:
        if self.format in (CONSTANT, AFFINE):
            object.__setattr__(self, "constant", True)
        plain = self.width is None and not self.constant
        ranked = self.rank is not None and self.rank > 0
        fits = {
            CONSTANT: self.into is None and self.width is None,
            MERGED: self.into is not None and plain,
            SLIM: self.into is None and self.width is not None and self.width > 0,
            ABSENT: self.into is None and plain,
            SHARED: plain and ranked,
            AFFINE: self.into is None and self.width is None and ranked,
        }
        if not fits.get(self.format, False) or (self.rank is not None and self.format not in (SHARED, AFFINE)):
            raise ValueError(f"not a form of stand-in that this version reads: {self}")

    @property
    def free(self) -> bool:
        """Whether a route to it costs next to nothing: no weights of an expert are behind it."""
        return self.format in (CONSTANT, ABSENT)


def impossible(stand_ins: Mapping[int, StandIn], num_experts: int) -> str | None:
    """Say why these cannot be the stand-ins of a layer with so many experts, or None."""
    outside = sorted(e for e in stand_ins if not 0 <= e < num_experts)
    if outside:
        return f"expert {outside[0]} is not one of the {num_experts}"
    thin = [s for s in stand_ins.values() if s.format == SHARED]
    if len(ranks := sorted({str(s.rank) for s in thin})) > 1:
        return f"its {SHARED} experts have ranks {' and '.join(ranks)}, and one module holds one rank"
    if len({s.into is None for s in thin}) > 1:
        return f"some of its {SHARED} experts share a base and others have none"
    for expert, stand_in in sorted(stand_ins.items()):
        into = stand_ins.get(stand_in.into) if stand_in.into is not None else None
        if stand_in.into is None or into == stand_in:
            continue
        if stand_in.format == SHARED:
            return f"expert {expert} shares a base with {stand_in.into}, which is not a member of that group"
        return f"expert {expert} is merged into {stand_in.into}, which is not a merged expert that stands for itself"
    gone = sum(s.format in (CONSTANT, ABSENT, SHARED, AFFINE) for s in stand_ins.values())
    if not stand_ins or gone == num_experts:
        return "no stand-in is named" if not stand_ins else "no expert keeps any weights of its own"
    if all(s.format == MERGED and s.into == e for e, s in stand_ins.items()):
        return "every merged expert stands for itself alone"
    return None


def declare(layers: Mapping[str, tuple[Mapping[int, StandIn], Mapping[int, str]]]) -> dict[str, Any]:
    """Build the `compression_config` that says what the experts of a folder are.

    `layers` maps the dotted name of an experts module to its stand-ins, and to the tensor that holds the vector of each
    expert with a constant, by original id.
    """
    targets = {
        module: {
            "weight_layout": "compact_retained_experts",
            "replacements": {str(e): _written(s, tensors.get(e)) for e, s in sorted(stand_ins.items())},
        }
        for module, (stand_ins, tensors) in layers.items()
    }
    substitution = {"version": 1, "router_semantics": ROUTER_SEMANTICS, "targets": targets}
    return {"transform_config": {"expert_substitution": substitution}}


def declare_absent(config: dict[str, Any], blocks: Mapping[str, str]) -> None:
    """Add to a config.json which MoE sublayers are gone, and for each the tensor that is left of it, empty."""
    transform = config.setdefault("compression_config", {}).setdefault("transform_config", {})
    transform["layer_removal"] = {"version": 1, "blocks": dict(blocks)}


def declared_absent(config: Any) -> dict[str, str]:
    """Read which MoE sublayers a config declares as gone: the tensor that is left of each, by dotted name.

    Raises:
        CheckpointError: the declaration is there but is not one that this version reads.
    """
    removal = _transform(config).get("layer_removal")
    if removal is None:
        return {}
    blocks = removal.get("blocks") if isinstance(removal, Mapping) and removal.get("version") == 1 else None
    names = [] if not isinstance(blocks, Mapping) else [*blocks, *blocks.values()]
    fits = isinstance(blocks, Mapping) and all(isinstance(x, str) for x in names)
    if not fits or not all(guard.startswith(f"{block}.") for block, guard in blocks.items()):  # type: ignore[union-attr]
        raise CheckpointError("config.json declares layer_removal in a form that is not read")
    return dict(blocks)  # type: ignore[arg-type]


def declare_unrouted(config: dict[str, Any], layers: Mapping[str, tuple[str, Mapping[int, float]]]) -> None:
    """Add to a config.json which layers have no router: by the name of their experts, the router's matrix and w."""
    transform = config.setdefault("compression_config", {}).setdefault("transform_config", {})
    found = {n: {"router": g, "weights": {str(e): w for e, w in ws.items()}} for n, (g, ws) in layers.items()}
    transform["layer_condensation"] = {"version": 1, "layers": found}


def declared_unrouted(config: Any) -> dict[str, tuple[str, dict[int, float]]]:
    """Read which layers a config declares as having no router, as `declare_unrouted` takes them.

    Raises:
        CheckpointError: the declaration is there but is not one that this version reads.
    """
    condensation = _transform(config).get("layer_condensation")
    if condensation is None:
        return {}
    try:
        if condensation["version"] != 1:
            raise ValueError(f"version {condensation['version']!r}")
        found = {}
        for name, layer in condensation["layers"].items():
            weights = {int(e): w for e, w in layer["weights"].items()}
            if not all(type(w) in (int, float) and math.isfinite(w) for w in weights.values()):
                raise ValueError(f"a weight of {name} is no number")
            if not layer["router"].startswith(name.rpartition(".")[0]):
                raise ValueError(f"{layer['router']} is not beside {name}")
            found[name] = (layer["router"], dict(sorted(weights.items())))
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json declares layer_condensation in a form that is not read: {error}") from None


@dataclass(frozen=True)
class Modulated:
    """How layers run fewer experts: routes of a token that do, vectors of each expert, whether gates are scaled up.

    `layers` names, for each experts module, the tensor that is stored with one dimension more, so that loaders that do
    not know of vectors stop.
    """

    main_k: int
    vectors: int
    renormalise: bool
    layers: Mapping[str, str]


def main_k_of(wanted: int | None, top_ks: Iterable[int]) -> int:
    """Return how many experts run for a token: as wanted, or half of what it chooses in the layer where that is least.

    `top_ks` is what it chooses in each layer; those where that is one expert do not count.

    Raises:
        PlanError: not fewer are wanted.
    """
    fewest = min(top_k for top_k in top_ks if top_k > 1)
    main_k = wanted or fewest // 2
    if main_k >= fewest:
        raise PlanError(
            f"--main-k {main_k} is not fewer than the {fewest} experts that a token chooses; give 1 to {fewest - 1}"
        )
    return main_k


def declare_modulated(config: dict[str, Any], modulated: Modulated) -> None:
    """Add to a config.json which layers run fewer experts."""
    transform = config.setdefault("compression_config", {}).setdefault("transform_config", {})
    transform["expert_modulation"] = {
        "version": 1,
        "main_k": modulated.main_k,
        "vectors": modulated.vectors,
        "renormalise": modulated.renormalise,
        "layers": {name: {"guard": guard} for name, guard in modulated.layers.items()},
    }


def declared_modulated(config: Any) -> Modulated | None:
    """Read which layers a config declares to run fewer experts; None where there are none.

    Raises:
        CheckpointError: the declaration is there but is not one that this version reads.
    """
    modulation = _transform(config).get("expert_modulation")
    if modulation is None:
        return None
    try:
        if modulation["version"] != 1:
            raise ValueError(f"version {modulation['version']!r}")
        main_k, vectors, renormalise = (modulation[name] for name in ("main_k", "vectors", "renormalise"))
        if type(main_k) is not int or main_k < 1 or vectors not in (1, 3) or not isinstance(renormalise, bool):
            raise ValueError(f"main_k {main_k!r}, vectors {vectors!r}, renormalise {renormalise!r}")
        layers = {name: layer["guard"] for name, layer in modulation["layers"].items()}
        if not all(isinstance(guard, str) for guard in layers.values()):
            raise ValueError("a guard is no name")
        return Modulated(main_k, vectors, renormalise, layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json declares expert_modulation in a form that is not read: {error}") from None


def _transform(config: Any) -> Mapping[str, Any]:
    get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    compression = get("compression_config")
    transform = compression.get("transform_config") if isinstance(compression, Mapping) else None
    return transform if isinstance(transform, Mapping) else {}


def declared(config: Any) -> dict[str, dict[int, StandIn]] | None:
    """Read what a config (a mapping or an object) declares: stand-ins by original id, by module; None if nothing.

    Raises:
        CheckpointError: the declaration is there but is not one that this version reads.
    """
    substitution = _transform(config).get("expert_substitution")
    if substitution is None:
        return {} if {"layer_removal", "layer_condensation", "expert_modulation"} & set(_transform(config)) else None
    try:
        if substitution["version"] != 1 or substitution["router_semantics"] != ROUTER_SEMANTICS:
            raise ValueError("only version 1 with unchanged routing is supported")
        found = {}
        for module, target in substitution["targets"].items():
            if target["weight_layout"] != "compact_retained_experts":
                raise ValueError(f"weight layout {target['weight_layout']!r} of {module}")
            replacements = target["replacements"].items()
            found[module] = {int(e): _read(r) for e, r in sorted(replacements, key=lambda item: int(item[0]))}
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json declares expert_substitution in a form that is not read: {error}") from None


def known_to_engines(stand_ins: Mapping[int, StandIn]) -> bool:
    """Return whether stock engines know every format among these."""
    return all(s.format == CONSTANT for s in stand_ins.values())


def _written(stand_in: StandIn, tensor: str | None) -> dict[str, Any]:
    assert stand_in.constant == (tensor is not None)
    numbers = {"into": stand_in.into, "width": stand_in.width, "rank": stand_in.rank}
    tensors = {} if tensor is None else {"tensors": {"value": tensor}}
    return {"format": stand_in.format} | {k: v for k, v in numbers.items() if v is not None} | tensors


def _read(replacement: Mapping[str, Any]) -> StandIn:
    form, numbers = replacement["format"], {name: replacement.get(name) for name in ("into", "width", "rank")}
    if form not in (CONSTANT, MERGED, SLIM, ABSENT, SHARED, AFFINE):
        raise ValueError(f"a stand-in of format {form!r}")
    for name, n in numbers.items():
        if isinstance(n, bool) or not isinstance(n, int | None):
            raise ValueError(f"{name} of a {form} is a whole number, not {n!r}")
    if form == AFFINE and "tensors" not in replacement:
        raise ValueError(f"an {form} without the tensor of its constant")
    return StandIn(form, constant="tensors" in replacement, **numbers)
