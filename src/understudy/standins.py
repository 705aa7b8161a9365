"""What replaced experts are, as config.json declares it: plain data, in the words of vLLM >= 0.33 where it has them.

`compression_config.transform_config.expert_substitution` names, for each experts module, the format of every replaced
expert by original id. Engines know `constant-v1`; the other formats are ours, and a folder that has one of them also
carries an architecture that no engine knows, so that what goes by the architecture refuses it.

    constant-v1  one vector answers for the expert
    merged-v1    the expert shares the weights of the expert `into`; that one is listed, too
    slim-v1      the expert keeps `width` of its neurons, and perhaps answers a constant vector on top
    absent-v1    the expert answers zero
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from understudy.errors import CheckpointError

CONSTANT, MERGED, SLIM, ABSENT = "constant-v1", "merged-v1", "slim-v1", "absent-v1"
ARCHITECTURE_PREFIX = "Understudy"
ROUTER_SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


@dataclass(frozen=True)
class StandIn:
    """What one expert has become: its format, the expert that it shares weights with, its width, a constant or none."""

    format: str
    into: int | None = None  # of merged-v1
    width: int | None = None  # of slim-v1, at least 1
    constant: bool = False  # of slim-v1, and always of constant-v1

    def __post_init__(self) -> None:
        if self.format == CONSTANT:
            object.__setattr__(self, "constant", True)
        fits = {
            CONSTANT: self.into is None and self.width is None,
            MERGED: self.into is not None and self.width is None and not self.constant,
            SLIM: self.into is None and self.width is not None and self.width > 0,
            ABSENT: self.into is None and self.width is None and not self.constant,
        }
        if not fits.get(self.format, False):
            raise ValueError(f"not a form of stand-in that this version reads: {self}")


def impossible(stand_ins: Mapping[int, StandIn], num_experts: int) -> str | None:
    """Say why these cannot be the stand-ins of a layer with so many experts, or None."""
    outside = sorted(e for e in stand_ins if not 0 <= e < num_experts)
    if outside:
        return f"expert {outside[0]} is not one of the {num_experts}"
    for expert, stand_in in sorted(stand_ins.items()):
        into = stand_ins.get(stand_in.into) if stand_in.into is not None else None
        if stand_in.format == MERGED and (into is None or into.into != stand_in.into):
            return (
                f"expert {expert} is merged into {stand_in.into}, which is not a merged expert that stands for itself"
            )
    gone = sum(s.format in (CONSTANT, ABSENT) for s in stand_ins.values())
    if not stand_ins or gone == num_experts:
        return "no stand-in is named" if not stand_ins else "no expert keeps any weights"
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
        return {} if "layer_removal" in _transform(config) else None
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
    numbers = {"into": stand_in.into, "width": stand_in.width}
    tensors = {} if tensor is None else {"tensors": {"value": tensor}}
    return {"format": stand_in.format} | {k: v for k, v in numbers.items() if v is not None} | tensors


def _read(replacement: Mapping[str, Any]) -> StandIn:
    form, into, width = replacement["format"], replacement.get("into"), replacement.get("width")
    if form not in (CONSTANT, MERGED, SLIM, ABSENT):
        raise ValueError(f"a stand-in of format {form!r}")
    if any(isinstance(n, bool) or not isinstance(n, int | None) for n in (into, width)):
        raise ValueError(f"into and width of a {form} are whole numbers, not {into!r} and {width!r}")
    return StandIn(form, into, width, "tensors" in replacement)
