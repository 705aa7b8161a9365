"""Selection against slow loops that follow the words of METHODS, budgets in bytes, notes, and every bad setting."""

from __future__ import annotations

import math
import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from routes import HIDDEN, draw_routes, filled, stats_of, sums_of
from understudy.errors import OutputError, PlanError, StatsError, UnderstudyError
from understudy.kinds import added_bytes, all_kinds, expected_bytes, get_kind
from understudy.methods import OPTIONAL, Method, Problem, all_methods, get_method
from understudy.plans import Plan, load_plan
from understudy.protection import refuse_touched, super_experts
from understudy.ranking import planning_needs
from understudy.recipe import Scope, Selection
from understudy.scores import Scores, all_scores, get_score, score_layers
from understudy.stages.review import check, diff, show
from understudy.stages.select import PlanResult, make_plan
from understudy.stats import ExpertStats, Stats, file_hash
from understudy.sums import required_fields

EXPERT, ROW, VECTOR = 1000, 10, HIDDEN * 2  # bytes, as routes.facts_of has them
SIZES = {"width": 16, "channel_bytes": 60, "block_bytes": 8100, "decoder_bytes": 9000}


def four_layers(experts: int = 8, silent: tuple[int, ...] = (), **facts: Any) -> Stats:
    layers = {key: draw_routes(experts=experts, seed=int(key), silent=silent) for key in ("1", "2", "3", "10")}
    return stats_of(layers, **facts)


def chosen(plan: Plan) -> dict[str, list[int]]:
    """Return the replaced ids by layer, whatever they become."""
    return {key: sorted(plan.replaced(key)) for key in plan.model.experts}


def slow_by_layer(scores: dict[str, np.ndarray], counts: dict[str, int]) -> dict[str, list[int]]:
    """In each layer, take the lowest again and again; of equals the lower id."""
    picked: dict[str, list[int]] = {}
    for key, values in scores.items():
        left, taken = list(range(len(values))), []
        for _ in range(counts[key]):
            lowest = left[0]
            for i in left:
                if values[i] < values[lowest]:
                    lowest = i
            left.remove(lowest)
            taken.append(lowest)
        picked[key] = sorted(taken)
    return picked


def slow_by_model(scores: dict[str, np.ndarray], count: int) -> dict[str, list[int]]:
    """Take the lowest of the whole model again and again, never the last of a layer; of equals the first."""
    left = {key: list(range(len(values))) for key, values in scores.items()}
    for _ in range(count):
        where, lowest = "", -1
        for key, ids in left.items():
            if len(ids) == 1:
                continue
            for i in ids:
                if not where or scores[key][i] < scores[where][lowest]:
                    where, lowest = key, i
        left[where].remove(lowest)
    return {key: [i for i in range(len(v)) if i not in left[key]] for key, v in scores.items()}


SCORED = [method for method in all_methods().values() if method.choose is None]
CHOOSING = [method for method in all_methods().values() if method.choose is not None and method.shrinks]


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda m: m.name)
class TestEveryMethod:
    """The contract of a method; a new file comes in by itself."""

    def test_is_a_composition_of_what_exists(self, method: Method) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", method.name)
        assert get_method(method.name) is method
        assert method.score in {None, *all_scores()}
        assert method.score or method.choose
        assert method.kind in method.kinds
        assert set(method.kinds) <= set(all_kinds())
        assert "layer" in method.scopes
        assert set(method.scopes) <= set(get_args(Scope))
        assert set(method.needs) <= {f.name for f in fields(ExpertStats)}
        assert set(method.options) <= set(OPTIONAL)
        assert len(method.paper) > 10

    def test_reads_no_more_than_it_says(self, method: Method) -> None:
        stats, settings = everything(), fitting(method, ratio=0.5)
        needs = {"tokens", "count", *planning_needs(method, settings)}
        blank = {f.name: None for f in fields(ExpertStats) if f.name not in needs}
        bare = replace(stats, layers={key: replace(layer, **blank) for key, layer in stats.layers.items()})
        assert make_plan(bare, settings).plan == make_plan(stats, settings).plan

    def test_gives_the_same_bytes_again(self, method: Method, tmp_path: Path) -> None:
        stats = everything().save(tmp_path / "stats")
        for name in "ab":
            make_plan(stats, fitting(method, ratio=0.5, seed=1), tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert load_plan(tmp_path / "a").layers

    def test_leaves_alone_what_is_kept(self, method: Method) -> None:
        settings = fitting(method, ratio=0.5, keep_layers="2, 3", kind=other_than_drop(method))
        result = attempt(everything(), settings)
        if isinstance(result, str):
            assert "--keep-layers would leave layer 2 with more experts" in result
        else:
            assert result.plan.layers
            assert set(result.plan.layers) <= {"1", "10"}

    def test_leaves_super_experts_alone(self, method: Method) -> None:
        stats = everything()
        largest = {key: layer.output_max.tolist() for key, layer in stats.layers.items()}
        largest["2"][3] = 1e6
        result = attempt(with_outputs(stats, largest), fitting(method, ratio=0.5, keep_super=True))
        if isinstance(result, str):
            assert "layer 2: method" in result
            assert "a super expert" in result
        else:
            assert 3 not in result.plan.replaced("2")
            assert "super experts that stay as they are: 1 (layer 2: 3)" in result.notes


def fitting(method: Method, **more: Any) -> Selection:
    """Return settings of a method with which its stand-ins are smaller than the experts of `everything`."""
    small = {name: 1 for name in ("bases", "rank", "keep_experts") if name in method.options}
    if not method.shrinks:
        more = {name: value for name, value in more.items() if name not in ("ratio", "size", "model_ratio")}
    return Selection(method=method.name, **small, **more)


def attempt(stats: Stats, settings: Selection) -> PlanResult | str:
    """Return a plan, or why there is none."""
    try:
        return make_plan(stats, settings)
    except PlanError as error:
        return str(error)


def everything(**facts: Any) -> Stats:
    """Return statistics of four layers in which every sum is there."""
    return filled(four_layers(**facts, **SIZES))


def other_than_drop(method: Method) -> str:
    return next((kind for kind in method.kinds if kind != "drop"), method.kind)


@pytest.mark.parametrize("method", CHOOSING, ids=lambda m: m.name)
class TestEveryMethodThatChooses:
    """The contract of `choose`: ratios are shares of bytes, a larger one never needs more, and sizes are met."""

    @pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5])
    def test_removes_the_share_of_the_bytes(self, method: Method, ratio: float) -> None:
        stats = everything()
        result = make_plan(stats, fitting(method, ratio=ratio))
        removed = stats.model.nbytes - result.expected_bytes
        layer = max(x.experts * x.expert_bytes for x in stats.model.layers.values())  # the largest unit that there is
        assert abs(removed - ratio * stats.model.routed_bytes) <= layer
        assert (result.plan.layers == {}) == (removed == 0)

    def test_a_larger_ratio_never_needs_more(self, method: Method) -> None:
        stats, settings = everything(), fitting(method, scope=method.scopes[0])
        problem = Problem(stats, stats.model.layers, settings, get_kind(method.kind), scores_of(method, stats))
        most = method.most(problem)
        assert 0 < most <= 1
        choices = [method.choose(problem, most * n / 16) for n in range(17)]
        sizes = [added_bytes(choice.layers, stats.model, choice.how) for choice in choices]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] < sizes[0] == 0

    @pytest.mark.parametrize("size", [36_000, 28_000])
    def test_meets_a_size(self, method: Method, size: int) -> None:
        stats = everything()
        result = make_plan(stats, fitting(method, size=str(size)))
        layer = max(x.experts * x.expert_bytes for x in stats.model.layers.values())
        assert size - layer <= result.expected_bytes <= size
        assert expected_bytes(result.plan, stats.model) == result.expected_bytes
        with pytest.raises(
            PlanError, match=rf"out of reach: {method.name} brings toy from 37\.00 KB down to .* at best"
        ):
            make_plan(stats, fitting(method, size="1"))


def scores_of(method: Method, stats: Stats) -> Scores | None:
    return score_layers(get_score(method.score), stats, Selection()) if method.score else None


@pytest.mark.parametrize("method", SCORED, ids=lambda m: m.name)
class TestEveryMethodThatRanks:
    """What a method does whose experts go by their score."""

    @pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5, 0.75])
    def test_replaces_the_lowest_of_each_layer(self, method: Method, ratio: float) -> None:
        stats, settings = four_layers(), Selection(method=method.name, ratio=ratio, seed=3)
        result = make_plan(stats, settings)
        scores = score_layers(get_score(method.score), stats, settings)
        assert chosen(result.plan) == slow_by_layer(scores.layers, dict.fromkeys(scores.layers, round(ratio * 8)))
        assert {k for kinds in result.plan.layers.values() for k in kinds} <= {method.kind}
        assert result.scores.name == method.score
        for key, values in scores.layers.items():
            np.testing.assert_array_equal(result.scores.layers[key], values)

    @pytest.mark.parametrize("ratio", [0.02, 0.25, 0.5, 0.875])
    def test_replaces_the_lowest_of_the_model_by_constants(self, method: Method, ratio: float) -> None:
        stats, settings = four_layers(), Selection(method=method.name, ratio=ratio, scope="model", kind="constant")
        scores = score_layers(get_score(method.score), stats, settings)
        assert chosen(make_plan(stats, settings).plan) == slow_by_model(scores.layers, round(ratio * 32))

    def test_can_become_any_of_its_kinds(self, method: Method) -> None:
        for kind in method.kinds:
            plan = make_plan(four_layers(), Selection(method=method.name, ratio=0.5, kind=kind)).plan
            assert all(set(kinds) == {kind} for kinds in plan.layers.values())


# --- the plan and what stands beside it ---


def test_the_plan_names_its_parents(tmp_path: Path) -> None:
    stats = four_layers()
    path = stats.save(tmp_path / "stats.safetensors")
    result = make_plan(path, Selection(ratio=0.25), tmp_path / "run" / "plan.yaml")
    plan = load_plan(tmp_path / "run" / "plan.yaml")
    assert plan == result.plan
    assert plan.method == "mone"
    assert plan.model.fingerprint == stats.model.fingerprint
    assert plan.stats == file_hash(path)
    recipe = {"ratio": 0.25, "scope": "layer", "kind": "constant", "gate": "all-tokens", "seed": 0}
    recipe |= {"keep_super": False, "refit": False}
    assert plan.recipe == recipe
    assert result.facts == stats.model
    assert make_plan(stats, Selection(ratio=0.25)).plan == plan.model_copy(update={"stats": None})
    assert check(plan, stats.model)["expected_bytes"] == result.expected_bytes
    assert show(plan)["ratio"] == 0.25
    assert diff(plan, result.plan)["agreement"] == 1


def test_the_random_plan_follows_its_seed() -> None:
    plans = [make_plan(four_layers(), Selection(method="random", ratio=0.5, seed=s)).plan for s in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert chosen(plans[0]) != chosen(plans[2])


def test_the_gate_over_routed_tokens_can_be_asked_for() -> None:
    stats, settings = four_layers(), Selection(ratio=0.5, gate="routed")
    scores = score_layers(get_score("mone"), stats, settings)
    assert chosen(make_plan(stats, settings).plan) == slow_by_layer(scores.layers, dict.fromkeys(scores.layers, 4))


def scored(values: dict[str, list[float]], **facts: Any) -> Stats:
    """Return statistics in which the EAN score is what is given."""
    stats = stats_of({key: draw_routes(experts=len(v)) for key, v in values.items()}, **facts)
    layers = {}
    for key, v in values.items():
        arrays = stats.layers[key].arrays() | {"norm_sum": np.array(v)}
        layers[key] = ExpertStats(**arrays)
    return Stats(stats.model, {}, layers)


def ean(stats: Stats, **settings: Any) -> dict[str, list[int]]:
    return chosen(make_plan(stats, Selection(method="ean", kind="constant", **settings)).plan)


def test_of_equal_scores_the_first_goes() -> None:
    stats = scored({"0": [1, 1, 0, 1, 1], "1": [1, 0, 1, 1, 1], "2": [1, 1, 1, 1, 0]})
    assert ean(stats, ratio=0.6) == {"0": [0, 1, 2], "1": [0, 1, 2], "2": [0, 1, 4]}
    assert ean(stats, ratio=5 / 15, scope="model") == {"0": [0, 1, 2], "1": [1], "2": [4]}


def test_no_layer_is_emptied() -> None:
    stats = scored({"0": [0, 0, 0, 0], "1": [5, 6, 7, 8], "2": [9, 9, 9, 9]})
    assert ean(stats, ratio=0.5, scope="model") == {"0": [0, 1, 2], "1": [0, 1, 2], "2": []}
    assert ean(stats, ratio=0.75, scope="model") == {"0": [0, 1, 2], "1": [0, 1, 2], "2": [0, 1, 2]}
    with pytest.raises(
        PlanError, match=r"ratio 0\.9 would leave a layer without an expert; .* 9 of 12 at most .*0\.75"
    ):
        ean(stats, ratio=0.9, scope="model")
    with pytest.raises(PlanError, match="layer 0: all 4 experts would be replaced"):
        ean(stats, ratio=0.9)


def test_the_ratio_is_rounded_as_python_rounds() -> None:
    stats = scored({"0": [1, 2, 3, 4, 5], "1": [1, 2, 3, 4, 5, 6, 7]})
    assert ean(stats, ratio=0.5) == {"0": [0, 1], "1": [0, 1, 2, 3]}  # 2.5 -> 2, 3.5 -> 4
    assert ean(stats, ratio=0.5, scope="model") == {"0": [0, 1, 2], "1": [0, 1, 2]}  # 6 of 12


def test_groups_of_the_router_lose_the_same_number() -> None:
    values = [3, 1, 2, 0, 10, 13, 12, 11, 20, 20, 20, 20, 5, 6, 4, 7]
    stats = scored({"0": values, "1": values[::-1]}, groups=4, top_groups=2)
    plan = make_plan(stats, Selection(method="ean", ratio=0.5)).plan
    assert chosen(plan) == {"0": [1, 3, 4, 7, 8, 9, 12, 14], "1": [1, 3, 4, 5, 8, 11, 12, 14]}
    assert ean(stats, ratio=0.5)["0"] == [0, 1, 2, 3, 12, 13, 14, 15]  # constants do not mind
    for ratio, near in ((0.3, "0.25 or 0.5"), (0.1, "0.25"), (0.6, "0.5"), (0.95, "0.5")):
        with pytest.raises(
            PlanError, match=f"layer 0: ratio {ratio} takes .* each of the 4 groups .* works is {near}$"
        ):
            make_plan(stats, Selection(method="ean", ratio=ratio))


# --- budgets in bytes ---


def slow_size(stats: Stats, size: int, settings: Selection) -> PlanResult | None:
    """Try every number of experts from none to all and return the first plan that fits."""
    per = 4 if settings.scope == "layer" else 1
    for n in range(0, 32, per):
        result = make_plan(stats, settings.model_copy(update={"ratio": n / 32, "size": None}))
        if result.expected_bytes <= size:
            return result
    return None


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("size", [36_999, 36_500, 33_048, 33_049, 33_047, 20_000, 12_000])
def test_the_size_is_met_with_the_fewest_experts(scope: str, size: int) -> None:
    stats = four_layers()
    assert stats.model.nbytes == 37_000
    settings = Selection(size=f"{size}", scope=scope)
    result = make_plan(stats, settings)
    want = slow_size(stats, size, settings)
    assert want is not None
    assert chosen(result.plan) == chosen(want.plan)
    assert result.expected_bytes == want.expected_bytes == expected_bytes(result.plan, stats.model) <= size
    assert result.plan.recipe["size"] == str(size)
    assert "ratio" not in result.plan.recipe


@pytest.mark.parametrize(
    ("size", "each"), [("36999B", 1), ("32.96KB", 1), ("32.95KB", 2), ("20.84KB", 4), ("12.76KB", 6)]
)
def test_the_size_is_met_by_dropping(size: str, each: int) -> None:
    result = make_plan(four_layers(), Selection(method="reap", size=size))
    assert {key: len(ids) for key, ids in chosen(result.plan).items()} == dict.fromkeys(("1", "2", "3", "10"), each)
    assert result.expected_bytes == 37_000 - 4 * each * (EXPERT + ROW)


def test_a_size_for_grouped_routers_steps_by_the_groups() -> None:
    stats = four_layers(16, groups=4)
    for method, each in (("reap", 4), ("mone", 1)):
        plan = make_plan(stats, Selection(method=method, size=str(stats.model.nbytes - 1))).plan
        assert {len(ids) for ids in chosen(plan).values()} == {each}


@pytest.mark.parametrize(
    ("settings", "best", "ratio"),
    [
        ({"method": "mone"}, 37_000 - 28 * (EXPERT - VECTOR), "0.875"),
        ({"method": "mone", "scope": "model"}, 37_000 - 28 * (EXPERT - VECTOR), "0.875"),
        ({"method": "reap"}, 37_000 - 24 * (EXPERT + ROW), "0.75"),
    ],
)
def test_a_size_out_of_reach_names_the_smallest(settings: dict[str, Any], best: int, ratio: str) -> None:
    with pytest.raises(
        PlanError, match=rf"out of reach: .* 37\.00 KB down to .* \({best} bytes\) at best, at ratio {ratio}"
    ):
        make_plan(four_layers(), Selection(size=f"{best - 1}", **settings))
    assert make_plan(four_layers(), Selection(size=f"{best}", **settings)).expected_bytes == best
    by_ratio = make_plan(four_layers(), Selection(ratio=float(ratio), **settings))
    assert by_ratio.expected_bytes == best


def test_a_size_that_the_model_has_already_replaces_nothing() -> None:
    for size in ("37000", "1GB"):
        result = make_plan(four_layers(), Selection(size=size))
        assert result.plan.layers == {}
        assert result.expected_bytes == 37_000
        assert result.notes[0].startswith("nothing to replace: the model's 37.00 KB are within")


# --- notes ---


def test_a_ratio_that_replaces_nothing_says_so() -> None:
    result = make_plan(four_layers(), Selection(ratio=0.05))
    assert result.plan.layers == {}
    assert result.notes == ("ratio 0.05 replaces nothing; one expert in each layer is ratio 0.125",)
    whole = make_plan(four_layers(), Selection(ratio=0.01, scope="model"))
    assert whole.notes == ("ratio 0.01 replaces nothing; one expert is ratio 0.03125",)
    assert make_plan(four_layers(), Selection(ratio=0)).expected_bytes == 37_000


def test_experts_that_saw_no_token_are_counted() -> None:
    stats = four_layers(silent=(1, 5, 6))
    saw = "12 of 32 experts saw no token in calibration; "
    assert make_plan(stats, Selection(ratio=0.25)).notes == (saw + "8 of them become zero vectors, 4 stay as they are",)
    assert make_plan(stats, Selection(ratio=0.5)).notes == (saw + "12 of them become zero vectors, 0 stay as they are",)
    dropped = make_plan(stats, Selection(method="reap", ratio=0.5))
    assert dropped.notes == (saw + "12 of them are removed, 0 stay as they are",)
    assert make_plan(four_layers(), Selection(ratio=0.5)).notes == ()


@pytest.mark.parametrize("method", SCORED, ids=lambda m: m.name)
def test_a_layer_that_saw_no_token_is_left_alone(method: Method) -> None:
    layers = {"0": draw_routes(), "0.vision": draw_routes(tokens=0), "1": draw_routes(seed=1)}
    stats = stats_of(layers)
    for more in ({"ratio": 0.5}, {"ratio": 0.5, "scope": "model"}, {"size": "24KB"}):
        result = make_plan(stats, Selection(method=method.name, kind="constant", **more))
        assert {key: len(ids) > 0 for key, ids in chosen(result.plan).items()} == {
            "0": True,
            "0.vision": False,
            "1": True,
        }
        assert result.notes == ("layers 0.vision saw no token in calibration and are left untouched",)
    with pytest.raises(PlanError, match=r"from layer 0 and 0 from layer 0\.vision"):
        make_plan(stats, Selection(method=method.name, kind="drop", ratio=0.5))


@pytest.mark.parametrize("method", CHOOSING, ids=lambda m: m.name)
def test_a_method_that_chooses_leaves_such_a_layer_alone_too(method: Method) -> None:
    layers = {"0": draw_routes(), "0.vision": draw_routes(tokens=0, experts=6), "1": draw_routes(seed=1)}
    stats = filled(stats_of(layers, **SIZES))
    result = make_plan(stats, fitting(method, ratio=0.5))
    assert result.notes[0] == "layers 0.vision saw no token in calibration and are left untouched"
    assert result.plan.layers
    assert "0.vision" not in result.plan.layers


# --- by mass ---


def slow_by_mass(stats: Stats, name: str, threshold: float, alpha: float, crossing: bool) -> dict[str, list[int]]:
    """LightMoE 1.3 to the letter, or SHAPE's rule: what each layer gives up at a threshold of the model."""
    scores = score_layers(get_score(name), stats, Selection()).layers
    norms = {key: layer.logit_norm_sum / layer.tokens for key, layer in stats.layers.items()}
    mean, picked = sum(norms.values()) / len(norms), {}
    for key, values in scores.items():
        p = threshold * math.exp(-alpha * (norms[key] / mean - 1))
        p = min(max(p, 0.8 * threshold), 1.2 * threshold)
        lowest, taken, total = sorted(range(len(values)), key=lambda i: values[i]), [], 0.0
        for i in lowest[:-1]:  # a layer keeps an expert in any case
            if not crossing and total + values[i] / values.sum() > p:
                break
            taken.append(i)
            total += values[i] / values.sum()
            if crossing and total > p:
                break
        picked[key] = sorted(taken)
    return picked


def search(stats: Stats, count: int, *rule: Any) -> dict[str, list[int]]:
    """Bisect the threshold for the smallest that gives up this number of experts."""
    low, high = 0.0, 5.0
    for _ in range(80):
        middle = (low + high) / 2
        enough = sum(map(len, slow_by_mass(stats, rule[0], middle, *rule[1:]).values())) >= count
        low, high = (low, middle) if enough else (middle, high)
    return slow_by_mass(stats, rule[0], high, *rule[1:])


MASSES = [method for method in SCORED if "mass" in method.scopes]


@pytest.mark.parametrize("method", MASSES, ids=lambda m: m.name)
def test_mass_is_what_the_search_for_the_threshold_finds(method: Method) -> None:
    stats = four_layers(12)
    rule = (method.score, *((0.0, False) if method.name == "shape" else (0.3, True)))
    met = 0
    for count in range(4, 44):
        result = make_plan(stats, Selection(method=method.name, ratio=count / 48, scope="mass", kind="constant"))
        got, want = chosen(result.plan), search(stats, count, *rule)
        assert sum(map(len, got.values())) == count
        met += sum(map(len, want.values())) == count
        if sum(map(len, want.values())) == count:
            assert got == want, count
        else:  # several experts go at once there
            assert all(set(got[key]) <= set(want[key]) for key in got)
    assert met >= 35
    with pytest.raises(
        PlanError, match=r"ratio 0\.95 would leave a layer without an expert; constant can replace 44 of"
    ):
        make_plan(stats, Selection(method=method.name, ratio=0.95, scope="mass", kind="constant"))


def test_mass_takes_less_where_the_logits_are_large() -> None:
    routes = draw_routes(tokens=300, experts=16)
    sizes = {"0": 1.0, "1": 1.5, "2": 2.0, "3": 50.0}
    stats = stats_of({key: replace(routes, logits=routes.logits * size) for key, size in sizes.items()})
    options = {"method": "gate", "scope": "mass", "kind": "constant", "ratio": 0.4}
    lost = {key: len(ids) for key, ids in chosen(make_plan(stats, Selection(**options)).plan).items()}
    assert lost["0"] >= lost["1"] >= lost["2"] > lost["3"]
    same = stats_of(dict.fromkeys(sizes, routes))
    result = make_plan(same, Selection(**(options | {"ratio": 0.5})))
    assert {len(ids) for ids in chosen(result.plan).values()} == {8}
    share = np.sort(stats.layers["0"].gate_sum)[:7].sum() / stats.layers["0"].gate_sum.sum()  # the eighth crosses it
    assert result.notes == (f"by mass: the threshold is {share:.4g}; layers lose 8 to 8 experts",)


def test_mass_meets_a_size_with_the_fewest_experts() -> None:
    stats = four_layers()
    for size in (36_000, 30_000, 20_000, 10_000):
        settings = Selection(method="gate", scope="mass", kind="constant", size=str(size))
        result = make_plan(stats, settings)
        want = slow_size(stats, size, settings)
        assert want is not None
        assert chosen(result.plan) == chosen(want.plan)
    with pytest.raises(PlanError, match=r"out of reach: constant brings toy .* at best, at ratio 0\.875"):
        make_plan(stats, Selection(method="gate", scope="mass", kind="constant", size="1KB"))


def test_mass_needs_masses_and_the_norms_of_logits() -> None:
    stats = four_layers()
    options = {"scope": "mass", "kind": "constant", "ratio": 0.5}
    with pytest.raises(PlanError, match="reap does not select by mass; use --scope layer or model"):
        make_plan(stats, Selection(method="reap", **options))
    with pytest.raises(PlanError, match=r"--scope mass takes more .* and drop needs the same number in every layer"):
        make_plan(stats, Selection(method="gate", scope="mass", ratio=0.5))
    blind = replace(stats, layers={key: replace(x, logit_norm_sum=None) for key, x in stats.layers.items()})
    with pytest.raises(StatsError, match="method gate needs logit_norm_sum, which the statistics of layer 1 lack; cal"):
        make_plan(blind, Selection(method="gate", **options))
    assert make_plan(blind, Selection(method="shape", **options)).plan.layers  # takes the same share everywhere
    gates = stats.layers["3"].gate_sum.copy()
    gates[5] = -1
    odd = replace(stats, layers=stats.layers | {"3": replace(stats.layers["3"], gate_sum=gates)})
    with pytest.raises(PlanError, match="layer 3: the gate score of expert 5 is negative, so it is no mass"):
        make_plan(odd, Selection(method="gate", **options))


# --- what is not to be touched ---


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_kept_layers_stay(scope: str) -> None:
    stats = four_layers()
    whole = chosen(make_plan(stats, Selection(ratio=0.5)).plan)
    result = make_plan(stats, Selection(ratio=0.5, keep_layers="10,2-3", scope=scope))
    assert {key: len(ids) for key, ids in chosen(result.plan).items()} == {"1": 4, "2": 0, "3": 0, "10": 0}
    assert chosen(result.plan)["1"] == whole["1"]
    assert result.notes == ("layers that stay as they are: 2, 3, 10; a ratio is of the experts in the others",)
    assert result.plan.recipe["keep_layers"] == "10,2-3"
    assert make_plan(stats, Selection(size="36.9KB", keep_layers="2-3,10", scope=scope)).plan.replaced("1")
    least = 37_000 - 7 * (EXPERT - VECTOR)
    with pytest.raises(PlanError, match=rf"\({least} bytes\) at best, at ratio 0\.875"):
        make_plan(stats, Selection(size="10KB", keep_layers="2-3,10", scope=scope))


def test_where_every_layer_is_kept_nothing_is_replaced() -> None:
    for method in ("mone", "reap"):
        result = make_plan(four_layers(), Selection(method=method, ratio=0.5, keep_layers="1-3,10"))
        assert result.plan.layers == {}
        assert result.notes[-1] == "every MoE layer stays as it is; nothing is replaced"
        with pytest.raises(PlanError, match="20KB is out of reach: every MoE layer is to stay as it is"):
            make_plan(four_layers(), Selection(method=method, size="20KB", keep_layers="1-3,10"))


def test_drop_keeps_layers_only_where_none_of_their_size_is_left() -> None:
    with pytest.raises(
        PlanError,
        match=r"--keep-layers would leave layer 2 with more experts than layer 1, and drop needs .* --kind con",
    ):
        make_plan(four_layers(), Selection(method="reap", ratio=0.5, keep_layers="2"))
    assert make_plan(four_layers(), Selection(method="reap", ratio=0, keep_layers="2")).plan.layers == {}
    stats = stats_of({"0": draw_routes(experts=12), "1": draw_routes(seed=1), "2": draw_routes(seed=2)})
    plan = make_plan(stats, Selection(method="reap", ratio=0.5, keep_layers="0")).plan
    assert {key: len(ids) for key, ids in chosen(plan).items()} == {"0": 0, "1": 4, "2": 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4", "--keep-layers 4: the model has no MoE layer 4; those that it has are 1-3, 10"),
        ("1-4", "no MoE layer 4; those that it has are 1-3, 10"),
        ("0,1", "no MoE layer 0;"),
        ("3-1", "'3-1' names no layer; write layers and ranges like 0,3,12-15"),
        ("1,,2", "'' names no layer"),
        ("", "'' names no layer"),
        ("first", "no MoE layer first"),
        ("-1", "no MoE layer -1"),
    ],
)
def test_kept_layers_must_be_there(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=re.escape(says)):
        make_plan(four_layers(), Selection(ratio=0.5, keep_layers=text))


def with_outputs(stats: Stats, largest: dict[str, list[float]]) -> Stats:
    layers = {key: replace(layer, output_max=np.array(largest[key])) for key, layer in stats.layers.items()}
    return replace(stats, layers=layers)


def test_super_experts_are_those_beyond_percentile_and_tenth() -> None:
    rng = np.random.default_rng(0)
    largest = {str(n): rng.random(64) for n in range(10)}
    largest["2"][[3, 60]], largest["7"][5], largest["9"][1] = (500, 40), 51, 1000
    found = super_experts({key: ExpertStats(**{"output_max": v}, **NOTHING) for key, v in largest.items()})
    everything = sorted(v for values in largest.values() for v in values)
    position = 0.995 * (len(everything) - 1)  # between the fourth and the third largest
    low, high = everything[math.floor(position)], everything[math.ceil(position)]
    bound = max(low + (position - math.floor(position)) * (high - low), 100.0)
    want = {key: {i for i, v in enumerate(values) if v > bound} for key, values in largest.items()}
    assert found == {key: ids for key, ids in want.items() if ids} == {"2": {3}, "9": {1}}


NOTHING: dict[str, Any] = dict.fromkeys(required_fields())


def test_super_experts_stay() -> None:
    values = {"0": [0.0, 1, 2, 3], "1": [0.0, 1, 2, 3]}
    stats = with_outputs(scored(values), {"0": [900, 1, 1, 1], "1": [1, 1, 1, 1]})
    assert ean(stats, ratio=0.5, keep_super=True) == {"0": [1, 2], "1": [0, 1]}
    assert ean(stats, ratio=0.5, keep_super=True, scope="model") == {"0": [1, 2], "1": [0, 1]}
    result = make_plan(stats, Selection(method="ean", ratio=0.5, keep_super=True))
    assert chosen(result.plan) == {"0": [1, 2], "1": [0, 1]}
    assert result.notes == ("super experts that stay as they are: 1 (layer 0: 0)",)
    assert ean(stats, ratio=0.75, keep_super=True) == {"0": [1, 2, 3], "1": [0, 1, 2]}
    calm = with_outputs(scored(values), {key: [1.0, 1, 1, 1] for key in values})
    assert make_plan(calm, Selection(method="ean", ratio=0.5, keep_super=True)).notes == (
        "no expert is a super expert",
    )


def test_super_experts_can_be_too_many() -> None:
    stats = with_outputs(scored({"0": [0.0, 1, 2, 3, 4, 5]}), {"0": [1.0, 1, 1, 1, 1, 9]})
    many = with_outputs(scored({"0": [0.0] * 6, "1": [0.0] * 400}), {"0": [9.0, 9, 1, 1, 1, 1], "1": [1.0] * 400})
    assert ean(stats, ratio=5 / 6, keep_super=True) == {"0": [0, 1, 2, 3, 4]}
    says = r"layer 0: ratio 0\.83 takes 5 experts, and 2 super experts are to stay; 4 can go at most \(ratio 0\.666667"
    with pytest.raises(PlanError, match=says):
        ean(many, ratio=0.83, keep_super=True)
    with pytest.raises(
        PlanError, match=r"ratio 0\.999 would replace an expert that is to stay; constant can replace 403 of"
    ):
        ean(many, ratio=0.999, keep_super=True, scope="model")
    with pytest.raises(PlanError, match="out of reach"):
        ean(many, size="1KB", keep_super=True)


def test_groups_of_the_router_go_on_losing_the_same_number_beside_super_experts() -> None:
    values = [3.0, 1, 2, 0, 10, 13, 12, 11, 20, 20, 20, 20, 5, 6, 4, 7]
    outputs = [1.0] * 16
    outputs[3] = outputs[9] = 50
    stats = with_outputs(scored({"0": values}, groups=4, top_groups=2), {"0": outputs})
    # two of sixteen are more than the percentile lets through, so they share it with the rest of a larger model
    rest = draw_routes(experts=800, seed=1)
    more = stats_of({"0": draw_routes(experts=16), "1": rest}, groups=4, top_groups=2)
    layers = {"0": stats.layers["0"], "1": replace(sums_of(rest), output_max=np.ones(800))}
    plan = make_plan(replace(more, layers=layers), Selection(method="ean", ratio=0.5, keep_super=True)).plan
    assert chosen(plan)["0"] == [1, 2, 4, 7, 8, 10, 12, 14]
    with pytest.raises(PlanError, match=r"takes 16 experts, and 2 super experts are to stay; 12 can go at most"):
        make_plan(replace(more, layers=layers), Selection(method="ean", ratio=0.99, keep_super=True))


def test_a_choice_that_touches_what_is_protected_is_refused() -> None:
    layers: dict[str, dict[str, Any]] = {"1": {"merge": ((3, 1),)}, "2": {"slim": {5: 3}}}
    refuse_touched(layers, ["1", "2"], {"1": [2], "2": [3]}, "method it")
    with pytest.raises(
        PlanError, match="layer 1: method it would change expert 3, a super expert; leave out --keep-sup"
    ):
        refuse_touched(layers, ["1", "2"], {"1": [3]}, "method it")
    with pytest.raises(PlanError, match="layer 2: method it would change this layer, which is to stay as it is"):
        refuse_touched(layers, ["1"], {}, "method it")


# --- statistics that lack something ---


def test_what_the_statistics_lack_is_said_with_how_to_collect_it() -> None:
    stats = four_layers()

    def without(*names: str) -> Stats:
        layers = {key: replace(layer, **dict.fromkeys(names)) for key, layer in stats.layers.items()}
        return replace(stats, layers=layers)

    for names, method, says in (
        (
            ("topk_sets", "topk_counts"),
            "shape",
            "needs topk_counts, topk_sets, .* calibrate with --collect sets",
        ),
        (("base_router_norm",), "router_norm_change", "layer 1 lack; calibrate with --base MODEL"),
        (("norm_sq_sum",), "msan", "needs norm_sq_sum, which the statistics of layer 1 lack; calibrate again"),
    ):
        with pytest.raises(StatsError, match=says):
            make_plan(without(*names), Selection(method=method, ratio=0.5))
    with pytest.raises(StatsError, match="needs output_max"):
        make_plan(without("output_max"), Selection(ratio=0.5, keep_super=True))


def test_weights_alone_are_enough_for_methods_that_read_no_more(tmp_path: Path) -> None:
    full = four_layers()
    layers = {key: sums_of(draw_routes(experts=8, seed=int(key)).part(0, 0)) for key in full.layers}  # all sums are 0
    path = replace(full, data={"weights_only": True}, layers=layers).save(tmp_path / "stats")
    for method in ("aimer", "router_norm_change", "random"):
        result = make_plan(path, Selection(method=method, ratio=0.5))
        assert result.notes == ()
        assert result.plan.layers == make_plan(full, Selection(method=method, ratio=0.5)).plan.layers
    for more in ({"method": "reap"}, {"method": "mone"}, {"method": "aimer", "kind": "constant"}):
        with pytest.raises(StatsError, match=rf"method {more['method']} needs .* which the statistics of layer 1 lack"):
            make_plan(path, Selection(ratio=0.5, **more))
    with pytest.raises(StatsError, match="method aimer needs output_max"):
        make_plan(path, Selection(method="aimer", ratio=0.5, keep_super=True))


# --- bad settings ---


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({}, "give one of --ratio, --size and --model-ratio"),
    ({"ratio": 0.5, "size": "1GB"}, "give one of --ratio, --size and --model-ratio"),
    ({"ratio": 1.0}, "ratio 1 is not a share of the experts; give 0 or more and less than 1"),
    ({"ratio": -0.1}, r"ratio -0\.1 is not a share"),
    ({"ratio": 50}, "ratio 50 is not a share"),
    ({"ratio": float("nan")}, "ratio nan is not a share"),
    ({"ratio": 0.5, "method": "moen"}, r"no method is named 'moen' \(did you mean 'mone'\?\); there is aimer, "),
    ({"ratio": 0.5, "kind": "Drop"}, r"no kind is named 'Drop' \(did you mean 'drop'\?\); there is "),
    (
        {"ratio": 0.5, "method": "reap", "scope": "model"},
        "--scope model takes more .* use --scope layer or --kind const",
    ),
    ({"ratio": 0.5, "method": "frequenzy"}, r"\(did you mean 'frequency'\?\)"),
    ({"ratio": 0.5, "method": "ean_mean"}, "no method is named 'ean_mean'"),
    ({"ratio": 0.5, "model_ratio": 0.5}, "give one of --ratio, --size and --model-ratio"),
    ({"model_ratio": 1.0}, "model ratio 1 is not a share of the parameters; give 0 or more and less than 1"),
    ({"model_ratio": 0.9}, r"model ratio 0\.9 is out of reach: constant removes 0\.\d+ of the parameters of toy"),
    ({"ratio": 0.5, "bases": 2}, "--bases has no effect on method mone; leave it out"),
    ({"ratio": 0.5, "method": "reap", "rank": 4}, "--rank has no effect on method reap; leave it out"),
    ({"ratio": 0.5, "method": "ream", "grouping": "kmeans"}, "--grouping has no effect on method ream; leave it out"),
    ({"ratio": 0.5, "alpha": 0.1}, "--alpha has no effect where method mone does not select by mass; leave it out"),
    ({"ratio": 0.5, "method": "gate", "alpha": 0.1}, "--alpha has no effect .* by mass; give --scope mass, too"),
    ({"ratio": 0.5, "method": "reap", "width_classes": 3}, "--width-classes has no effect on method reap"),
    ({"ratio": 0.5, "method": "reap", "refit": True}, "--refit has no effect on method reap"),
    ({"ratio": 0.5, "method": "mone", "scope": "mass"}, "mone does not select by mass; use --scope layer or model"),
    ({"ratio": 0.5, "method": "reap", "gate": "routed"}, "--gate routed has no effect on method reap"),
    ({"ratio": 0.9, "method": "reap"}, r"layer 1: drop leaves 1 of 8 experts, fewer than the 2 .*ratio 0\.75"),
    ({"ratio": 0.99}, "layer 1: all 8 experts would be replaced; constant needs at least one kept"),
    ({"size": "half"}, "'half' is not a size; write 4.8GB"),
    ({"size": "-1GB"}, "is not a size"),
    ({"size": "0GB"}, "out of reach"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[str(s) for s, _ in BAD_SETTINGS])
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnderstudyError, match=message) as caught:
        make_plan(four_layers(), Selection(**settings), tmp_path / "plan.yaml")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_routers_that_cannot_lose_rows_are_refused_before_any_search() -> None:
    stats = four_layers(removable="its router reads a hash table")
    for more in ({"ratio": 0.5}, {"size": "30KB"}):
        with pytest.raises(
            PlanError, match="layer 1: drop is not possible: its router reads a hash table; use --kind con"
        ):
            make_plan(stats, Selection(method="reap", **more))
    assert make_plan(stats, Selection(method="reap", kind="constant", ratio=0.5)).plan.layers


def test_statistics_without_a_token_are_refused(tmp_path: Path) -> None:
    empty = stats_of({"0": draw_routes(tokens=0)})
    with pytest.raises(StatsError, match="the statistics hold no token; calibrate on more data"):
        make_plan(empty, Selection(ratio=0.5))
    with pytest.raises(StatsError, match="no such statistics file"):
        make_plan(tmp_path / "nowhere", Selection(ratio=0.5))


def test_a_plan_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        make_plan(four_layers(), Selection(ratio=0.5), tmp_path / "file" / "plan.yaml")


def test_layers_of_different_sizes() -> None:
    sizes = {"0": 8, "1": 4, "2": 16}
    stats = stats_of({key: draw_routes(experts=n, seed=n) for key, n in sizes.items()})
    assert {k: len(v) for k, v in chosen(make_plan(stats, Selection(ratio=0.5)).plan).items()} == {
        "0": 4,
        "1": 2,
        "2": 8,
    }
    # a size takes the same number from each, as far as the smallest layer goes
    best = stats.model.nbytes - 9 * (EXPERT - VECTOR)
    assert {len(v) for v in chosen(make_plan(stats, Selection(size=str(best))).plan).values()} == {3}
    with pytest.raises(PlanError, match=rf"\({best} bytes\) at best, at ratio {9 / 28:.6g}"):
        make_plan(stats, Selection(size=str(best - 1)))
