"""The plan: which expert of which layer becomes what. The one thing that selection hands to application, as a file.

    layers:
      3: {constant: [3, 17, 44]}
      4: {merge: [[3, 17], [5, 9, 12]]}
      5: {slim: {3: 512, 17: 0}}
      6: {layer_drop: all}
      7: {condense: {3: 0.0812, 17: 0.0533, rest: 0}}

Each layer holds kinds and each kind the original ids of the experts that become it: a list, or groups of experts that
share something, or ids with a number each. An expert that is not named is kept; a layer without an entry stays as it
is. `how` holds settings of kinds. What a kind demands of a plan is checked in `understudy.kinds`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from understudy.entries import OVERLAYS, Entry, entry_text, ids_of, read_entries
from understudy.errors import OutputError, PlanError
from understudy.facts import ModelFacts, layer_order
from understudy.registry import suggest

FORMAT = 1
_HEADER = """\
# Understudy plan. Each layer names the original ids of experts under what they become; the others are kept as they are.
# Edit by hand: add, move or delete ids; a layer without an entry is untouched. Then: understudy check THIS_FILE
"""
_Value = TypeVar("_Value")


class PlanModel(BaseModel):
    """The model that a plan is made for; experts and top-k by layer key, all MoE layers of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    family: str
    fingerprint: str
    experts: dict[str, StrictInt]
    top_k: dict[str, StrictInt]

    @field_validator("experts", "top_k", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        return _spread(value) if isinstance(value, dict) else value

    @classmethod
    def of(cls, facts: ModelFacts) -> PlanModel:
        """Take from the facts of a model what a plan carries."""
        return cls(
            source=facts.source,
            family=facts.family,
            fingerprint=facts.fingerprint,
            experts={key: layer.experts for key, layer in facts.layers.items()},
            top_k={key: layer.top_k for key, layer in facts.layers.items()},
        )


class Plan(BaseModel):
    """What happens to which expert of one model; layers and ids are kept in ascending order.

    Raises:
        PlanError: a field is missing, unknown or of the wrong type; a layer that the model has not; an id that is
            fractional, out of range or named twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    method: str  # a label for people; "edited" is as good as any
    model: PlanModel
    stats: str | None = None  # hash of the statistics file
    recipe: dict[str, bool | int | float | str | None] = {}  # settings of the selection, a record only
    how: dict[str, dict[str, bool | int | float | str]] = {}  # kind -> its settings
    layers: dict[str, dict[str, Entry]] = {}  # layer key -> kind -> experts

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(_first(error)) from None

    @field_validator("layers", mode="before")
    @classmethod
    def _canonical(cls, value: Any, info: ValidationInfo) -> dict[str, dict[str, Entry]]:
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise PlanError("layers: must hold an entry for each layer, like 3: {constant: [3, 17]}")
        layers = {_layer_key(key): entry for key, entry in value.items()}
        if len(layers) < len(value):
            raise PlanError('layers: a layer is named twice, as a number and as text (3 and "3")')
        model = info.data.get("model")  # None where it is broken, which is said elsewhere
        experts = model.experts if model is not None else {}
        checked = {key: read_entries(key, layers[key], experts.get(key)) for key in layer_order(layers)}
        return {key: entry for key, entry in checked.items() if entry}

    @model_validator(mode="after")
    def _fits_model(self) -> Plan:
        if set(self.model.experts) != set(self.model.top_k):
            raise PlanError("model: experts and top_k must name the same layers")
        for key, kinds in self.layers.items():
            if key not in self.model.experts:
                known = _squeeze(dict.fromkeys(self.model.experts, None))
                raise PlanError(f"layer {key}: the model has no such MoE layer; it has {', '.join(map(str, known))}")
            experts = self.model.experts[key]
            for entry in kinds.values():
                if out := [i for i in ids_of(entry) if not 0 <= i < experts]:
                    raise PlanError(f"layer {key}: expert {out[0]} is out of range, its ids are 0 to {experts - 1}")
        return self

    def replaced(self, layer: str) -> dict[int, str]:
        """Return id -> kind of the experts of a layer that do not stay, ascending."""
        kinds = {kind: entry for kind, entry in self.layers.get(layer, {}).items() if kind not in OVERLAYS}
        return dict(sorted((i, kind) for kind, entry in kinds.items() for i in ids_of(entry)))

    def kept(self, layer: str, experts: int) -> tuple[int, ...]:
        """Return the ids of a layer with `experts` experts that stay, ascending."""
        gone = self.replaced(layer)
        return tuple(i for i in range(experts) if i not in gone)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan, under a temporary name first; equal plans give equal bytes.

        Raises:
            OutputError: the file cannot be written.
        """
        target = Path(path)
        partial = target.with_name(target.name + ".tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.text(), encoding="utf-8", newline="\n")
            os.replace(partial, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OutputError(f"{target}: cannot be written ({error.strerror})") from None
        return target

    def text(self) -> str:
        """Return the plan as it is written: one line a layer, so that two plans differ line by line."""
        head = self.model_dump(exclude={"layers"} | (set() if self.how else {"how"}))
        head["model"]["experts"] = _squeeze(self.model.experts)
        head["model"]["top_k"] = _squeeze(self.model.top_k)
        # leaves are written in one line ({...}), whatever is above them as a block
        text = yaml.safe_dump(head, default_flow_style=None, sort_keys=False, allow_unicode=True, width=10**9)
        if not self.layers:
            return f"{_HEADER}{text}layers: {{}}\n"
        lines = []
        for key, kinds in self.layers.items():
            listed = ", ".join(f"{kind}: {self._entry_text(key, kind)}" for kind in kinds)
            lines.append(f"  {json.dumps(_number(key))}: {{{listed}}}\n")
        return f"{_HEADER}{text}layers:\n{''.join(lines)}"

    def _entry_text(self, key: str, kind: str) -> str:
        return entry_text(self.layers[key][kind], self.model.experts[key])


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read what `Plan.save` or a person wrote.

    Raises:
        PlanError: no such file, not YAML (with the line), of another format version, or anything that `Plan` refuses.
    """
    file = Path(path)
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise PlanError(f"{file}: no such plan; `understudy plan` writes one") from None
    except OSError as error:
        raise PlanError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not text"
        raise PlanError(f"{file}{line}: not valid YAML ({reason})") from None
    if not isinstance(data, dict) or any(not isinstance(key, str) for key in data):
        raise PlanError(f"{file}: not a plan; it has no format, method, model and layers")
    if data.get("format") != FORMAT:
        raise PlanError(f"{file}: a plan of format {data.get('format')}, this version reads {FORMAT}")
    try:
        return Plan(**data)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None


def check_model(plan: Plan, fingerprint: str, source: str = "the model at hand") -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PlanError: the fingerprints differ; both models are named.
    """
    if plan.model.fingerprint != fingerprint:
        raise PlanError(
            f"the plan was made for {plan.model.source} ({plan.model.fingerprint}), not for {source} ({fingerprint}); "
            "expert ids of one model mean nothing in another, plan again from this model's statistics"
        )


def _layer_key(key: Any) -> str:
    if isinstance(key, bool) or not isinstance(key, (int, str)):
        raise PlanError(f"layers: {key!r} is not a layer; a layer is a whole number, or text in quotes")
    return str(key)


def _number(key: str) -> int | str:
    return int(key) if re.fullmatch(r"0|[1-9][0-9]*", key) else key


def _squeeze(layers: Mapping[str, _Value]) -> dict[int | str, _Value]:
    """Join runs of layers of equal value under one key, `0-15`: sixty equal numbers are hard to read."""
    runs: list[tuple[list[str], _Value]] = []
    for key in layer_order(layers):
        follows = runs and isinstance(_number(key), int) and runs[-1][0][-1] == str(int(key) - 1)
        if follows and runs[-1][1] == layers[key]:
            runs[-1][0].append(key)
        else:
            runs.append(([key], layers[key]))
    return {_number(keys[0]) if len(keys) == 1 else f"{keys[0]}-{keys[-1]}": value for keys, value in runs}


def _spread(layers: Mapping[Any, _Value]) -> dict[str, _Value]:
    """Undo `_squeeze`."""
    spread: dict[str, _Value] = {}
    for key, value in layers.items():
        run = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6})", str(key))
        keys: Iterable[Any] = range(int(run.group(1)), int(run.group(2)) + 1) if run else [key]
        spread.update({_layer_key(k): value for k in keys})
    return {key: spread[key] for key in layer_order(spread)}


def _first(error: ValidationError) -> str:
    """Say in one line what pydantic found first."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    if isinstance(cause := found.get("ctx", {}).get("error"), PlanError):
        return str(cause)
    if found["type"] == "extra_forbidden":
        owner = PlanModel if found["loc"][0] == "model" else Plan
        return f"{where} is not a key of a plan{suggest(str(found['loc'][-1]), owner.model_fields)}"
    if found["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {found['msg'][:1].lower()}{found['msg'][1:]}, not {found['input']!r}"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML without its traps: a key named twice loses half of an edit, and 010 is 8."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a key that comes twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} comes twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: Any) -> int:
        """Build an integer, refusing octal, hexadecimal, sexagesimal and the like."""
        if not re.fullmatch(r"-?(0|[1-9][0-9]*)", node.value):
            problem = f"write {node.value} as a plain decimal number"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
