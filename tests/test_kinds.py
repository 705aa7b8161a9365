"""Kinds as planning sees them: what they cost, what they demand of a plan, and the contract of every one of them."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from understudy.errors import PlanError
from understudy.facts import LayerFacts, ModelFacts
from understudy.kinds import Kind, all_kinds, check_plan, expected_bytes, get_kind
from understudy.plans import Plan, PlanModel
from understudy.stages.review import check
from understudy.stats import ExpertStats


def layer_facts(experts: int = 8, top_k: int = 2, **more: Any) -> LayerFacts:
    sizes = {"hidden": 16, "expert_params": 50, "expert_bytes": 1000, "router_row_bytes": 10, "element_bytes": 2}
    return LayerFacts(**({"name": "experts", "experts": experts, "top_k": top_k} | sizes | more))


def model_facts(layers: dict[str, LayerFacts], source: str = "toy", fingerprint: str = "65514d0e") -> ModelFacts:
    return ModelFacts(source=source, family="toy_moe", fingerprint=fingerprint, nbytes=100_000, params=0, layers=layers)


def plan_for(facts: ModelFacts, layers: dict[str, Any]) -> Plan:
    return Plan(method="edited", model=PlanModel.of(facts), layers=layers)


UNEVEN = "drop takes 2 experts from layer 0 and 1 from layer 1; stock loaders need the same number .* --kind constant"
G = {"groups": 4, "top_groups": 2}  # of 16 experts: 0-3, 4-7, 8-11, 12-15
IMPOSSIBLE: dict[str, tuple[dict[str, LayerFacts], dict[str, Any], str]] = {
    "unknown kind": (
        {"0": layer_facts()},
        {"0": {"constnt": [1]}},
        r"no kind is named 'constnt' \(did you mean 'constant'\?\); there is block_drop, condense, constant, drop",
    ),
    "all constant": (
        {"0": layer_facts(), "1": layer_facts()},
        {"1": {"constant": list(range(8))}},
        "layer 1: all 8 experts would be replaced; constant needs at least one kept expert",
    ),
    "uneven": ({"0": layer_facts(), "1": layer_facts()}, {"0": {"drop": [1, 2]}, "1": {"drop": [1]}}, UNEVEN),
    "untouched layer": (
        {"0": layer_facts(), "1": layer_facts()},
        {"0": {"drop": [1, 2]}},
        "drop takes 2 experts from layer 0 and 0 from layer 1",
    ),
    "mixed over layers": (
        {"0": layer_facts(), "1": layer_facts()},
        {"0": {"drop": [1, 2]}, "1": {"constant": [1, 2]}},
        "drop takes 2 experts from layer 0 and 0 from layer 1",
    ),
    "mixed in a layer": (
        {"0": layer_facts()},
        {"0": {"drop": [1], "constant": [2]}},
        "layer 0: drop cannot share a layer with constant: it renumbers",
    ),
    "fewer than top-k": (
        {"0": layer_facts(top_k=4)},
        {"0": {"drop": [0, 1, 2, 3, 4]}},
        r"layer 0: drop leaves 3 of 8 experts, fewer than the 4 that each token uses \(top-k\); at most 4 .*0\.5",
    ),
    "all dropped": ({"0": layer_facts()}, {"0": {"drop": list(range(8))}}, "drop leaves 0 of 8 experts"),
    "not removable": (
        {"0": layer_facts(), "1": layer_facts(removable="its router reads a hash table")},
        {"0": {"drop": [1]}, "1": {"drop": [1]}},
        "layer 1: drop is not possible: its router reads a hash table; use --kind constant",
    ),
    "groups": (
        {"0": layer_facts(16, **G)},
        {"0": {"drop": [0, 4, 8, 9]}},
        "layer 0: .* 4 groups of 4 consecutive experts, .* the same number from each; the plan takes 1, 1, 2, 0",
    ),
    "one left in a group": (
        {"0": layer_facts(16, top_k=1, **G)},
        {"0": {"drop": [i for i in range(16) if i % 4]}},
        r"drop leaves 1 experts in each of the 4 groups of the router, which needs 2; at most 8 can go \(ratio 0\.5\)",
    ),
    "top-k not in the groups used": (  # 8 of 16 stay, but a token sees 2 of 4 groups: 4 experts for a top-6
        {"0": layer_facts(16, top_k=6, **G)},
        {"0": {"drop": [i for i in range(16) if i % 2]}},
        r"leaves 2 experts in each of the 4 groups of the router, which needs 3; at most 4 can go \(ratio 0\.25\)",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_plan_gets_one_clear_line(case: str) -> None:
    layers, chosen, message = IMPOSSIBLE[case]
    facts = model_facts(layers)
    with pytest.raises(PlanError, match=message) as caught:
        check_plan(plan_for(facts, chosen), facts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [c for c in IMPOSSIBLE if "group" not in c and c != "not removable"])
def test_a_plan_alone_tells_all_but_groups_and_routers(case: str) -> None:
    layers, chosen, message = IMPOSSIBLE[case]
    with pytest.raises(PlanError, match=message):
        check_plan(plan_for(model_facts(layers), chosen))


def test_possible_plans_pass() -> None:
    grouped = model_facts({"0": layer_facts(16, top_k=4, **G), "1": layer_facts(16, top_k=4, **G)})
    check_plan(plan_for(grouped, {"0": {"drop": [0, 7, 8, 12]}, "1": {"drop": [1, 5, 11, 15]}}), grouped)
    check_plan(plan_for(grouped, {"0": {"constant": [0, 1, 2, 3]}}), grouped)
    two_towers = model_facts({"0": layer_facts(), "0.vision": layer_facts(4, 1)})
    check_plan(plan_for(two_towers, {"0": {"drop": [1, 2]}}), two_towers)  # a number for each tower
    check_plan(plan_for(two_towers, {}), two_towers)


def test_facts_of_another_model_are_refused() -> None:
    facts = model_facts({"0": layer_facts()})
    other = model_facts({"0": layer_facts()}, "other", "ffff")
    with pytest.raises(PlanError, match=r"made for toy \(65514d0e\), not for other \(ffff\)"):
        check_plan(plan_for(facts, {}), other)
    with pytest.raises(PlanError, match="experts by layer are not those of toy"):
        check_plan(plan_for(facts, {}), model_facts({"0": layer_facts(16)}))


def test_expected_bytes_by_hand() -> None:
    facts = model_facts({"0": layer_facts(), "1": layer_facts()})
    assert expected_bytes(plan_for(facts, {}), facts) == 100_000
    constant = {"0": {"constant": [1, 2, 3]}, "1": {"constant": [0]}}
    assert expected_bytes(plan_for(facts, constant), facts) == 100_000 - 4 * 1000 + 4 * 16 * 2
    drop = {"0": {"drop": [1, 2]}, "1": {"drop": [0, 3]}}
    assert expected_bytes(plan_for(facts, drop), facts) == 100_000 - 4 * 1000 - 4 * 10


@pytest.mark.parametrize("kind", all_kinds().values(), ids=lambda k: k.name)
class TestEveryKind:
    """The contract of a kind as planning sees it; a new file comes in by itself."""

    def test_describes_itself(self, kind: Kind) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", kind.name)
        assert get_kind(kind.name) is kind
        assert 10 < len(kind.description) < 120
        assert kind.unseen
        assert set(kind.needs) <= {f.name for f in fields(ExpertStats)}

    @pytest.mark.parametrize("layer", [layer_facts(), layer_facts(64, 8), layer_facts(16, 4, **G)])
    def test_frees_more_than_it_stores(self, kind: Kind, layer: LayerFacts) -> None:
        if not kind.losers:
            pytest.skip("asks for more than a list of ids")
        assert kind.stored_bytes(layer, ()) == kind.freed_bytes(layer, ()) == kind.added_bytes(layer, ()) == 0
        entries = [tuple(range(n)) for n in range(1, kind.most(layer) + 1)]
        assert all(isinstance(kind.added_bytes(layer, entry), int) for entry in entries)
        assert all(kind.stored_bytes(layer, entry) >= 0 for entry in entries)
        assert all(kind.freed_bytes(layer, entry) >= len(entry) * layer.expert_bytes for entry in entries)
        assert kind.added_bytes(layer, entries[-1]) < 0

    @pytest.mark.parametrize("layer", [layer_facts(), layer_facts(64, 8), layer_facts(16, 4, **G)])
    def test_allows_what_it_calls_the_most_and_no_more(self, kind: Kind, layer: LayerFacts) -> None:
        if not kind.losers:
            pytest.skip("asks for more than a list of ids")
        facts = model_facts({"0": layer, "1": layer})
        order = sorted(range(layer.experts), key=lambda i: (i % (layer.experts // layer.groups), i))
        most, step = kind.most(layer), layer.groups if kind.renumbers else 1
        assert 0 < most < layer.experts
        assert most % step == 0
        for count in range(0, most + 1, step):
            ids = {kind.name: order[:count]}
            check_plan(plan_for(facts, {"0": ids, "1": ids}), facts)
        ids = {kind.name: order[: most + step]}
        with pytest.raises(PlanError, match="layer 0: "):
            check_plan(plan_for(facts, {"0": ids, "1": ids}), facts)


def test_check_says_what_it_checked() -> None:
    facts = model_facts({"0": layer_facts(), "1": layer_facts()})
    plan = plan_for(facts, {"0": {"constant": [1]}})
    assert check(plan, facts) == {"replaced": 1, "expected_bytes": 100_000 - 1000 + 32, "unchecked": []}
    alone = check(plan)
    assert alone["expected_bytes"] is None
    assert "groups of the router" in alone["unchecked"]
    with pytest.raises(PlanError, match="all 8 experts would be replaced"):
        check(plan_for(facts, {"0": {"constant": list(range(8))}}))
