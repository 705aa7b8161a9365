"""What several commands show of plans, and the model that a plan is checked against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import understudy

if TYPE_CHECKING:
    from understudy.facts import ModelFacts
    from understudy.plans import Plan


def planned(plan: Plan, out: Path) -> dict[str, Any]:
    """What is shown of a plan that was just made."""
    from understudy.methods import get_method

    shown = understudy.show(plan)
    for layer in shown["layers"].values():
        layer["replaced"] = {kind: chosen["count"] for kind, chosen in layer["replaced"].items()}
    return shown | {"out": str(out), "paper": get_method(plan.method).paper}


def each(plans: list[Path], look: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What is said of one plan, or of several under their names."""
    if len(plans) == 1:
        return look(plans[0])
    return {"plans": {str(plan): look(plan) for plan in plans}}


def facts_of(stats: Path | None, model: str | None, trust_remote_code: bool) -> ModelFacts | None:
    """Return the facts of the model to check against, from its statistics or itself; None where neither is given."""
    from understudy.errors import UnderstudyError
    from understudy.stats import load_stats

    if stats is not None and model is not None:
        raise UnderstudyError("give one of --stats and --model")
    if stats is not None:
        return load_stats(stats, only=()).model
    if model is None:
        return None
    found = understudy.inspect(model, trust_remote_code=trust_remote_code)
    if found.facts is None:
        raise UnderstudyError(f"{model} holds stand-ins already; check the plan against the original model")
    return found.facts
