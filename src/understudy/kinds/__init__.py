"""Kinds of stand-in: what an expert can become, a file each, found by looking into this folder.

A kind says here what it is, what it costs and what it demands of a plan; none of that needs weights.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from understudy.entries import OVERLAYS, Entry, ids_of
from understudy.errors import PlanError
from understudy.facts import LayerFacts, ModelFacts
from understudy.plans import Plan, check_model
from understudy.registry import discover, lookup
from understudy.standins import StandIn, impossible
from understudy.stats import ExpertStats

if TYPE_CHECKING:  # cutting needs torch, planning must not wait for it
    from torch import Tensor

    from understudy.cut import LayerCut, LayerSource


class Kind(ABC):
    """A kind of stand-in as planning sees it.

    Attributes:
        name: as plans spell it.
        description: one line for people.
        needs: fields of `ExpertStats` that making the stand-ins reads.
        unseen: what becomes of a replaced expert that saw no token, to finish the sentence "they ...".
        renumbers: the kept experts move up and their router rows with them; such a kind takes the same number of
            experts from every layer, and from every group of a group-limited router, and shares a layer with no other.
        whole_numbers: of the form with numbers, that they are whole ones.
        counts: of whole numbers, what they count, for people.
        form: what a plan lists under the kind: ids, groups of ids, or a number for each id.
        losers: any expert that a score ranks low can become this; else the kind asks for more than a list of ids.
    """

    name: str
    description: str
    needs: tuple[str, ...] = ()
    unseen: str
    renumbers: bool = False
    losers: bool = True
    form: Literal["ids", "groups", "numbers"] = "ids"
    whole_numbers: bool = True
    counts: str = "neurons"

    @abstractmethod
    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes of the stand-ins of what a layer lists under this kind."""

    def freed_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return the bytes that leave the checkpoint with those experts."""
        return layer.expert_bytes * len(ids_of(entry))

    def added_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        """Return by how much a layer grows with this entry; negative where it shrinks."""
        return self.stored_bytes(layer, entry) - self.freed_bytes(layer, entry)

    def beside_bytes(self, facts: ModelFacts, entries: Mapping[str, Entry]) -> int:
        """Return the bytes that the entries of a plan add together, beside what each adds by itself."""
        return 0

    @property
    def overlays(self) -> bool:
        """Whether entries of this kind may name experts that other kinds replace."""
        return self.name in OVERLAYS

    def refuses_beside(self, other: Kind) -> str | None:
        """Return why a kind that overlays cannot share a layer with another, or None."""
        return None

    def refuses(self, layer: LayerFacts) -> str | None:
        """Return why this kind cannot be used in a layer at all, or None."""
        return None

    @abstractmethod
    def most(self, layer: LayerFacts) -> int:
        """Return how many experts of a layer can be replaced at most."""

    def cut(self, source: LayerSource, replaced: Sequence[int]) -> LayerCut:
        """Return what replacing experts of one layer changes in the checkpoint; for kinds without `stand_ins`."""
        raise NotImplementedError

    def reworked(self, experts: Any, replaced: Sequence[int], stats: ExpertStats | None) -> Any:
        """Return the live experts of a layer with those that stay as this kind makes them; most leave them alone."""
        return experts

    @property
    def substitutes(self) -> bool:
        """Whether the kind puts something in the place of experts; else it says itself how to `cut`."""
        return type(self).stand_ins is not Kind.stand_ins

    def having(self, how: Mapping[str, Any]) -> Kind:
        """Return the kind with the settings that a plan gives it, which `needs` and sizes may depend on."""
        return self

    def stand_ins(self, entry: Entry, how: Mapping[str, Any], layer: LayerFacts | None = None) -> dict[int, StandIn]:
        """Return what each expert becomes, by original id; `how` holds the settings of the kind in the plan."""
        return {}

    def fill(  # noqa: B027 (kinds without stand-ins have nothing to write)
        self, made: Any, source: Any, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None
    ) -> None:
        """Write the values of the stand-ins into `made`, the layer's experts with stand-ins, from the live `source`.

        Both are modules in the family's own layout, `source` with all experts. `made.rows` gives the row of an expert
        in the stacked weights, `made.slim_place(id)` the module and row of one of fewer neurons,
        `made.thin_place(id)` of one that becomes an affine map, and `made.constant_row(id)` the row of its vector in
        `made.constants`.
        """

    def answer(self, stats: ExpertStats, expert: int) -> np.ndarray | None:
        """Return what a replaced expert answers every token, `[H]` float32; None where that depends on the token."""
        return None

    def reference(
        self, source: Any, hidden: Tensor, expert: int, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None
    ) -> Tensor | None:
        """Return what a replaced expert answers tokens `[n, H]`, `[n, H]` float32; None where it is never asked.

        The slow, obvious way, from the live experts of the source: a written layer is verified against it.
        """
        import torch

        value = None if stats is None else self.answer(stats, expert)
        return None if value is None else torch.from_numpy(value).to(hidden.dtype).float().expand(len(hidden), -1)

    @abstractmethod
    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        """Refuse what this kind cannot do; `entries` holds its experts in every MoE layer, empty where there are none.

        Raises:
            PlanError: says which layer, why, and what to do.
        """


@functools.cache
def all_kinds() -> dict[str, Kind]:
    """Return every kind by name."""
    return discover(__name__, Kind)  # type: ignore[type-abstract]


def get_kind(name: str) -> Kind:
    """Return a kind by name.

    Raises:
        PlanError: there is none; the nearest name is suggested.
    """
    return lookup(all_kinds(), name, "kind")


def check_plan(plan: Plan, facts: ModelFacts | None = None) -> None:
    """Check a plan against the kinds it names and, where the facts of the model are given, against the model.

    Without facts, what the plan itself carries of the model is checked: experts and top-k, not groups of the router.

    Raises:
        PlanError: an unknown kind, kinds that cannot share a layer, another model, or what a kind refuses.
    """
    layers = _carried(plan)
    if facts is not None:
        check_model(plan, facts.fingerprint, facts.source)
        if any((facts.layers.get(k) is None or facts.layers[k].experts != n) for k, n in plan.model.experts.items()):
            raise PlanError(f"model: experts by layer are not those of {facts.source}; take the line from a fresh plan")
        layers = facts.layers
    entries: dict[str, dict[str, Entry]] = {}
    for key, kinds in plan.layers.items():
        for name, chosen in kinds.items():
            _check_form(key, get_kind(name), chosen)
            if get_kind(name).renumbers and len(kinds) > 1:
                other = next(k for k in kinds if k != name)
                raise PlanError(
                    f"layer {key}: {name} cannot share a layer with {other}: it renumbers the experts that stay, while "
                    f"{other} keeps the original ids; use one of them"
                )
            entries.setdefault(name, {})[key] = chosen
            for other in kinds if get_kind(name).overlays else ():
                kind = get_kind(name).having(plan.how.get(name, {}))
                if other != name and (reason := kind.refuses_beside(get_kind(other))):
                    raise PlanError(f"layer {key}: {name} cannot share a layer with {other}: {reason}")
    for name, by_layer in entries.items():
        kind = get_kind(name).having(plan.how.get(name, {}))
        for key in by_layer:
            if reason := kind.refuses(layers[key]):
                raise PlanError(f"layer {key}: {name} is not possible: {reason}; use --kind constant")
        kind.check(layers, {key: by_layer.get(key, ()) for key in layers})
    for key in plan.layers:
        found = stand_ins_of(plan, key, layers[key])
        if found and (why := impossible(found, layers[key].experts)):
            raise PlanError(f"layer {key}: {why}")


def stand_ins_of(plan: Plan, key: str, layer: LayerFacts) -> dict[int, StandIn]:
    """Return what the experts of a layer become in a plan, by original id; experts that stay are not named."""
    found: dict[int, StandIn] = {}
    for name, entry in plan.layers.get(key, {}).items():
        found |= get_kind(name).stand_ins(entry, plan.how.get(name, {}), layer)
    return dict(sorted(found.items()))


def _check_form(key: str, kind: Kind, entry: Entry) -> None:
    found = "numbers" if isinstance(entry, dict) else "groups" if isinstance(entry[0], tuple) else "ids"
    if found != kind.form:
        like = {"ids": "expert ids, [3, 17]", "groups": "groups of ids, [[3, 17], [5, 9]]", "numbers": "{3: 512}"}
        if not kind.whole_numbers:
            like["numbers"] = "a number for each expert, {3: 0.08, rest: 0}"
        raise PlanError(f"layer {key}: {kind.name} takes {like[kind.form]}, not {like[found]}")
    odd = [(i, n) for i, n in entry.items() if n % 1 or n < 0] if isinstance(entry, dict) else []
    if kind.whole_numbers and odd:
        raise PlanError(f"layer {key}: {kind.name}: expert {odd[0][0]}: must come with a whole number, not {odd[0][1]}")


def expected_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Return the bytes of all tensors of the checkpoint that a plan leads to."""
    return facts.nbytes + added_bytes(plan.layers, facts, plan.how)


def added_bytes(
    layers: Mapping[str, Mapping[str, Entry]], facts: ModelFacts, how: Mapping[str, Mapping[str, Any]]
) -> int:
    """Return by how many bytes a checkpoint grows with the entries of a plan; negative where it shrinks.

    `how` holds the settings of each kind.
    """
    kinds = {name: get_kind(name).having(how.get(name, {})) for by_kind in layers.values() for name in by_kind}
    entries: dict[str, dict[str, Entry]] = {}
    for key, by_kind in layers.items():
        for name, entry in by_kind.items():
            entries.setdefault(name, {})[key] = entry
    alone = sum(kinds[name].added_bytes(facts.layers[key], e) for name, of in entries.items() for key, e in of.items())
    return alone + sum(kinds[name].beside_bytes(facts, of) for name, of in entries.items())


def _carried(plan: Plan) -> dict[str, LayerFacts]:
    """Return facts of the layers as far as the plan itself knows them; sizes in bytes are 0."""
    empty = LayerFacts(name="", experts=0, top_k=0, hidden=0, expert_params=0, expert_bytes=0, element_bytes=0)
    sizes = {key: {"experts": n, "top_k": plan.model.top_k[key]} for key, n in plan.model.experts.items()}
    return {key: empty.model_copy(update=size) for key, size in sizes.items()}
