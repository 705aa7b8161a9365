"""Who enters a comparison, at which budgets, and what may stand side by side in one folder.

Methods are given as people write them: `reap`, `reap:constant`, `heapr:width_classes=4`.

Letter: E experts.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from understudy.comparison import Record, ResultSet
from understudy.errors import OutputError, PlanError, UnderstudyError
from understudy.facts import ModelFacts
from understudy.kinds import all_kinds, get_kind
from understudy.methods import Method, all_methods, get_method
from understudy.ranking import planning_needs
from understudy.recipe import Comparison, Extra, Selection, settings_from
from understudy.registry import suggest
from understudy.sums import groups_for

# Settings that all records of a folder have in common; the test text is told by its tokens.
_COMMON = (
    *("data", "samples", "seq_len", "dtype", "dense_tokens", "gradient_samples", "base"),
    *("tasks", "limit", "num_fewshot"),
)
_OWN = {"method", "kind", "ratio", "size", "model_ratio", "seed"}  # what the comparison sets itself


@dataclass(frozen=True)
class Entrant:
    """A method of a comparison, with what its label says beside the name."""

    label: str
    method: Method
    kind: str
    options: dict[str, str]  # settings of a plan
    repair: int = 0  # rounds, as `compress` has them

    def selection(self, seed: int, **budget: Any) -> Selection:
        """Return the settings of a plan; `budget` is a ratio or a size."""
        given = {"method": self.method.name, "kind": self.kind, "seed": seed}
        return settings_from(Selection, None, given | budget | self.options)

    @property
    def sequential(self) -> bool:
        """Whether its statistics can be taken layer by layer from the compressed model, as its paper does."""
        plain = self.kind == self.method.kind and not self.options and not self.repair
        return self.method.sequential and plain

    @property
    def needs(self) -> set[str]:
        """Fields of the statistics that its plans and their stand-ins are made from."""
        return planning_needs(self.method, self.selection(0)) | set(get_kind(self.kind).needs)


def read_entrants(labels: Iterable[str]) -> list[Entrant]:
    """Read the methods of a comparison.

    Raises:
        UnderstudyError: none, an unknown or impossible one, or one that comes twice.
    """
    entrants = [_read(label.strip()) for label in labels if label.strip()]
    if not entrants:
        raise UnderstudyError(f"--methods names no method; there is {', '.join(all_methods())}")
    seen: dict[tuple[object, ...], str] = {}
    for entrant in entrants:
        identity = (entrant.method.name, entrant.kind, tuple(sorted(entrant.options.items())), entrant.repair)
        if identity in seen:
            twice = f"--methods names {entrant.label} twice"
            same = f"--methods names {seen[identity]} and {entrant.label}, which are the same"
            raise UnderstudyError(f"{twice if seen[identity] == entrant.label else same}; leave one out")
        seen[identity] = entrant.label
    return entrants


def _read(label: str) -> Entrant:
    name, *parts = (part.strip() for part in label.split(":"))
    method, kind, options, repair = get_method(name), None, {}, 0
    for part in parts:
        setting, equals, value = part.partition("=")
        setting = setting.strip().replace("-", "_")
        if not equals and kind is None:
            kind = get_kind(part).name
        elif not equals:
            raise PlanError(f"--methods {label}: names two kinds, {kind} and {part}; give one")
        elif setting == "repair":
            if not value.strip().isdecimal() or not int(value):
                raise PlanError(f"--methods {label}: {value} is no number of rounds; give 1 or more")
            repair = int(value)
        elif setting in _OWN or setting not in Selection.model_fields:
            known = sorted({"repair", *Selection.model_fields} - _OWN)
            hint = suggest(setting, known)
            raise PlanError(f"--methods {label}: {setting} is no setting here{hint}; there is {', '.join(known)}")
        else:
            options[setting] = value.strip()
    if not method.shrinks:
        raise PlanError(f"--methods {label}: {method.name} removes nothing, so it cannot be compared at equal bytes")
    kind = kind or method.kind
    if kind not in method.kinds:
        possible = " or ".join(k for k in method.kinds if k in all_kinds())
        raise PlanError(f"--methods {label}: {method.name} cannot make {kind}; there is {possible}")
    entrant = Entrant(label, method, kind, options, repair)
    entrant.selection(0)  # refuses values that no setting takes
    return entrant


def check_settings(settings: Comparison) -> None:
    """Refuse ratios and seeds that are none, and settings without effect.

    Raises:
        UnderstudyError: says which.
    """
    for name, values in (("ratios", settings.ratios), ("seeds", settings.seeds)):
        if not values:
            raise UnderstudyError(f"--{name} is empty; give at least one, or leave it out")
        if twice := next((v for i, v in enumerate(values) if v in values[:i]), None):
            raise UnderstudyError(f"--{name} names {twice:g} twice; leave one out")
    if wrong := [r for r in settings.ratios if not 0 < r < 1]:
        raise UnderstudyError(
            f"--ratios {wrong[0]:g} is no share of the bytes in experts; give more than 0 and less than 1"
        )
    if wrong := [s for s in settings.seeds if s < 0]:
        raise UnderstudyError(f"--seeds {wrong[0]} is below 0; give 0 or more")
    if not settings.test:
        raise UnderstudyError("--test is missing; give held-out text, other than that of --data")
    for name in ("include_path", "limit", "num_fewshot"):
        if not settings.tasks and getattr(settings, name) is not None:
            raise UnderstudyError(f"--{name.replace('_', '-')} has no effect without --tasks; leave it out")


def groups_of(entrants: Iterable[Entrant]) -> tuple[Extra, ...]:
    """Return the groups of sums that a calibration for all of them has to be asked for."""
    needs = {name for entrant in entrants for name in entrant.needs}
    return tuple(group for group in get_args(Extra) if group in groups_for(needs))


def budget(facts: ModelFacts, ratio: float) -> int:
    """Return the bytes that every method may use at a ratio.

    That is the model less the share of its routed experts' bytes, and with room for a constant in the place of each
    expert that goes: without it, a method that leaves constants would have to give up a whole expert more in each
    layer than one that leaves nothing, in a small model a difference of several percent.
    """
    room = sum(math.ceil(ratio * x.experts) * x.hidden * x.element_bytes for x in facts.layers.values())
    return facts.nbytes - math.floor(ratio * facts.routed_bytes) + room


def command_line(model: str, out: str, settings: Comparison) -> str:
    """Return the call that makes a comparison, or adds to it."""
    words = ["understudy", "compare", model]
    for name, field in Comparison.model_fields.items():
        value, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        if value == field.default:
            continue
        if name in ("methods", "ratios", "seeds"):
            words += [flag, ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)]
        elif value is True:
            words.append(flag)
        else:
            words += [w for v in (value if isinstance(value, tuple) else (value,)) for w in (flag, str(v))]
    return shlex.join([*words, "--out", out])


def check_same(results: ResultSet, facts: ModelFacts, settings: dict[str, Any], folder: Path) -> None:
    """Refuse to add to results of another model, other text or other settings.

    Raises:
        OutputError: says in what they differ.
    """
    if results.model.fingerprint != facts.fingerprint:
        raise OutputError(
            f"{folder} compares on {results.model.source} ({results.model.fingerprint}), not on {facts.source} "
            f"({facts.fingerprint}); choose another --out"
        )
    for name in _COMMON:
        if (there := results.settings.get(name)) != settings[name]:
            raise OutputError(
                f"{folder} was made with --{name.replace('_', '-')} {_shown(there)}, not {_shown(settings[name])}; the "
                "figures could not be compared, choose another --out"
            )
    if results.settings.get("digest") != settings["digest"]:
        raise OutputError(f"{folder} was made on other test text; choose another --out, or give the same --test")


def in_order(records: Iterable[Record], results: ResultSet, settings: Comparison) -> list[Record]:
    """Sort records by method as first asked for, ratio and seed."""
    labels = dict.fromkeys([*(r.label for r in results.results), *settings.methods])
    place = {label: i for i, label in enumerate(labels)}
    return sorted(records, key=lambda r: (place.get(r.label, len(place)), r.label, r.ratio, r.seed))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "left out"
    return "left out" if value is None else str(value)
