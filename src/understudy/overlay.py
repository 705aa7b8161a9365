"""Fewer experts for a token, laid over what a method makes of the experts: `--main-k` beside `--method mone`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from understudy.entries import Entry
from understudy.errors import PlanError
from understudy.kinds.modulate import MODULATE
from understudy.standins import main_k_of

if TYPE_CHECKING:
    from understudy.facts import LayerFacts
    from understudy.kinds import Kind
    from understudy.methods import Choice, Method
    from understudy.recipe import Selection

SETTINGS = ("main_k", "vectors", "renormalise")  # that go with every method, the last two where the first is given


def refuse_unfit(settings: Selection, method: Method, kind: Kind) -> None:
    """Refuse what leaves nothing to choose from, and vectors of what has no projections, before any text is run.

    Raises:
        PlanError: the kind cannot share a layer with vectors.
    """
    if lies_over(settings, method) and (reason := MODULATE.having(_how(settings)).refuses_beside(kind)):
        raise PlanError(f"--main-k with method {method.name}, whose experts become {kind.name}: {reason}")


def lies_over(settings: Selection, method: Method) -> bool:
    """Return whether fewer experts are asked for of a method that does not do so itself."""
    return settings.main_k is not None and "main_k" not in method.options


def laid_over(choice: Choice, layers: Mapping[str, LayerFacts], settings: Selection) -> Choice:
    """Add to a choice that in these layers only the strongest `--main-k` experts of a token run.

    Raises:
        PlanError: they are not fewer than a token chooses.
    """
    main_k = main_k_of(settings.main_k, (layer.top_k for layer in layers.values()))
    entries: dict[str, dict[str, Entry]] = {
        key: {**choice.layers.get(key, {}), "modulate": tuple(range(layer.experts))} for key, layer in layers.items()
    }
    note = f"a token passes through {main_k} experts of each layer; vectors change nothing until `recover` trains them"
    return replace(choice, layers=entries, how={**choice.how, "modulate": _how(settings)}, notes=(*choice.notes, note))


def overlay_bytes(layers: Mapping[str, LayerFacts], settings: Selection) -> int:
    """Return the bytes of the vectors, whatever the experts become; 0 without `--main-k`."""
    if settings.main_k is None:
        return 0
    kind = MODULATE.having(_how(settings))
    return sum(kind.stored_bytes(layer, tuple(range(layer.experts))) for layer in layers.values())


def _how(settings: Selection) -> dict[str, bool | int | float | str]:
    return {name: value for name in SETTINGS if (value := getattr(settings, name)) is not None}
