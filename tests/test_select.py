"""Selection against slow loops that follow the words of METHODS, budgets in bytes, notes, and every bad setting."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from routes import HIDDEN, draw_routes, stats_of
from understudy.errors import OutputError, PlanError, StatsError, UnderstudyError
from understudy.kinds import all_kinds, expected_bytes
from understudy.methods import Method, all_methods, get_method
from understudy.plans import Plan, load_plan
from understudy.recipe import Scope, Selection
from understudy.scores import all_scores, get_score, score_layers
from understudy.stages.review import check, diff, show
from understudy.stages.select import PlanResult, make_plan
from understudy.stats import ExpertStats, Stats, file_hash

EXPERT, ROW, VECTOR = 1000, 10, HIDDEN * 2  # bytes, as routes.facts_of has them


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


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda m: m.name)
class TestEveryMethod:
    """The contract of a method; a new file comes in by itself."""

    def test_is_a_composition_of_what_exists(self, method: Method) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", method.name)
        assert get_method(method.name) is method
        assert method.score in all_scores()
        assert method.kind in all_kinds()
        assert method.scopes
        assert set(method.scopes) <= set(get_args(Scope))
        assert len(method.paper) > 10

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
        if "model" not in method.scopes:
            pytest.skip("by layer only")
        stats, settings = four_layers(), Selection(method=method.name, ratio=ratio, scope="model", kind="constant")
        scores = score_layers(get_score(method.score), stats, settings)
        assert chosen(make_plan(stats, settings).plan) == slow_by_model(scores.layers, round(ratio * 32))

    def test_can_become_any_kind(self, method: Method) -> None:
        for kind in all_kinds():
            plan = make_plan(four_layers(), Selection(method=method.name, ratio=0.5, kind=kind)).plan
            assert all(set(kinds) == {kind} for kinds in plan.layers.values())

    def test_gives_the_same_bytes_again(self, method: Method, tmp_path: Path) -> None:
        stats = four_layers().save(tmp_path / "stats")
        for name in "ab":
            make_plan(stats, Selection(method=method.name, ratio=0.5, seed=1), tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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
    recipe |= {"keep_super": False, "width_classes": 0}
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


@pytest.mark.parametrize("method", all_methods())
def test_a_layer_that_saw_no_token_is_left_alone(method: str) -> None:
    layers = {"0": draw_routes(), "0.vision": draw_routes(tokens=0), "1": draw_routes(seed=1)}
    stats = stats_of(layers)
    for more in ({"ratio": 0.5}, {"ratio": 0.5, "scope": "model"}, {"size": "24KB"}):
        result = make_plan(stats, Selection(method=method, kind="constant", **more))
        assert {key: len(ids) > 0 for key, ids in chosen(result.plan).items()} == {
            "0": True,
            "0.vision": False,
            "1": True,
        }
        assert result.notes == ("layers 0.vision saw no token in calibration and are left untouched",)
    with pytest.raises(PlanError, match=r"from layer 0 and 0 from layer 0\.vision"):
        make_plan(stats, Selection(method=method, kind="drop", ratio=0.5))


# --- bad settings ---


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({}, "give one of --ratio and --size"),
    ({"ratio": 0.5, "size": "1GB"}, "give one of --ratio and --size"),
    ({"ratio": 1.0}, "ratio 1 is not a share of the experts; give 0 or more and less than 1"),
    ({"ratio": -0.1}, r"ratio -0\.1 is not a share"),
    ({"ratio": 50}, "ratio 50 is not a share"),
    ({"ratio": float("nan")}, "ratio nan is not a share"),
    ({"ratio": 0.5, "method": "moen"}, r"no method is named 'moen' \(did you mean 'mone'\?\); there is ean, "),
    ({"ratio": 0.5, "kind": "Drop"}, r"no kind is named 'Drop' \(did you mean 'drop'\?\); there is constant, drop"),
    (
        {"ratio": 0.5, "method": "reap", "scope": "model"},
        "--scope model takes more .* use --scope layer or --kind const",
    ),
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
