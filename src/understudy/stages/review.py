"""Review: what a person asks of a plan before cutting; every answer is plain data, for tables and for --json."""

from __future__ import annotations

import os
from typing import Any

from understudy.entries import OVERLAYS, ids_of
from understudy.errors import PlanError
from understudy.facts import ModelFacts
from understudy.kinds import check_plan, expected_bytes
from understudy.plans import Plan, load_plan

KEPT = "kept"


def show(plan: Plan | str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a plan: totals, and for each MoE layer how many experts stay and which ids become what.

    Raises:
        PlanError: the plan cannot be read.
    """
    plan = _read(plan)
    layers: dict[str, Any] = {}
    totals: dict[str, int] = {}
    for key, experts in plan.model.experts.items():
        kinds = plan.layers.get(key, {})
        layers[key] = {
            "experts": experts,
            "kept": len(plan.kept(key, experts)),
            "replaced": {kind: {"count": len(ids_of(ids)), "ids": list(ids)} for kind, ids in kinds.items()},
        }
        for kind, ids in kinds.items():
            totals[kind] = totals.get(kind, 0) + len(ids_of(ids))
    experts = sum(plan.model.experts.values())
    return {
        "method": plan.method,
        "model": {"source": plan.model.source, "family": plan.model.family, "fingerprint": plan.model.fingerprint},
        "stats": plan.stats,
        "recipe": plan.recipe,
        "experts": experts,
        "replaced": totals,
        "ratio": sum(n for kind, n in totals.items() if kind not in OVERLAYS) / experts if experts else 0.0,
        "layers": layers,
    }


def diff(plan_a: Plan | str | os.PathLike[str], plan_b: Plan | str | os.PathLike[str]) -> dict[str, Any]:
    """Compare two plans expert by expert.

    `agreement` is the share of all experts that both plans treat alike. `overlap` is the share of the experts replaced
    by either plan that both replace: two random plans agree on half the experts at ratio 0.5, and overlap by a third.

    Raises:
        PlanError: a plan cannot be read, or the two are for models of different layers.
    """
    a, b = _read(plan_a), _read(plan_b)
    if a.model.experts != b.model.experts:
        raise PlanError(
            f"plans for {a.model.source} and {b.model.source} cannot be compared: their MoE layers or experts differ"
        )
    layers: dict[str, list[dict[str, Any]]] = {}
    changed = either = both = 0
    for key, experts in a.model.experts.items():
        in_a, in_b = a.replaced(key), b.replaced(key)
        either, both = either + len(in_a.keys() | in_b.keys()), both + len(in_a.keys() & in_b.keys())
        pairs = [(i, in_a.get(i, KEPT), in_b.get(i, KEPT)) for i in range(experts)]
        if moved := [{"expert": i, "from": old, "to": new} for i, old, new in pairs if old != new]:
            layers[key] = moved
            changed += len(moved)
    total = sum(a.model.experts.values())
    return {
        "same_model": a.model.fingerprint == b.model.fingerprint,
        "experts": total,
        "changed": changed,
        "agreement": 1 - changed / total if total else 1.0,
        "overlap": both / either if either else 1.0,
        "layers": layers,
    }


def check(plan: Plan | str | os.PathLike[str], facts: ModelFacts | None = None) -> dict[str, Any]:
    """Check a plan by itself, or against the facts of a model; say what was checked and what it leads to.

    Raises:
        PlanError: the plan is malformed, impossible, or made for another model.
    """
    plan = _read(plan)
    check_plan(plan, facts)
    needs_facts = ["fingerprint of the model", "groups of the router", "whether experts can be removed"]
    return {
        "replaced": sum(len(ids) for kinds in plan.layers.values() for ids in kinds.values()),
        "expected_bytes": expected_bytes(plan, facts) if facts else None,
        "unchecked": [] if facts else needs_facts,
    }


def _read(plan: Plan | str | os.PathLike[str]) -> Plan:
    return plan if isinstance(plan, Plan) else load_plan(plan)
