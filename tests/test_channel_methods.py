"""Methods over channels against slow and obvious allocation, on random statistics."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from routes import draw_routes, filled, stats_of
from understudy.channel_scores import get_channel_score, score_channels
from understudy.kinds import added_bytes, get_kind
from understudy.methods import Choice, Problem, get_method
from understudy.methods.moe_slimming import tempered
from understudy.methods.tenp import whole_experts
from understudy.recipe import Selection
from understudy.selection import _partition, by_coverage, by_layer, by_rank, in_classes, in_two_tiers
from understudy.stats import Stats

METHODS = ["heapr", "heapr_freq", "camera", "moe_slimming", "flap", "tenp"]
WIDTH, CHANNEL, HIDDEN = 12, 36, 6  # a constant costs 12 bytes
RATIOS = [0.01, 0.1, 0.25, 0.4, 0.5, 0.7, 0.9]
Scores = dict[str, np.ndarray]
Widths = dict[str, list[int]]


def made_up(seed: int = 0) -> Stats:
    """Return statistics of three layers of different numbers of experts, in which everything is there."""
    layers = {"1": draw_routes(experts=6, seed=seed), "2": draw_routes(experts=4), "10": draw_routes(experts=5, seed=1)}
    stats = filled(
        stats_of(layers, width=WIDTH, channel_bytes=CHANNEL, expert_bytes=WIDTH * CHANNEL, expert_params=1), seed
    )
    rng = np.random.default_rng(seed + 100)
    # products over several orders of magnitude, as real sums are; variances that are not clipped at 0
    spread = {"gradient_sq_sum": 3.0, "activation_sq_sum": 1.0, "local_loss_sum": 2.0, "attribution_sum": 1.0}
    for key, layer in stats.layers.items():
        more = {n: np.exp(s * rng.normal(size=np.shape(getattr(layer, n)))) + 1 for n, s in spread.items()}
        more["activation_sum"] = 0.1 * np.asarray(layer.activation_sum)
        stats.layers[key] = replace(layer, **more)
    return stats


def problem_of(method: str, stats: Stats | None = None, **more: Any) -> Problem:
    stats = stats or made_up()
    layers = more.pop("layers", stats.model.layers)
    protected = {key: frozenset(ids) for key, ids in more.pop("protected", {}).items()}
    settings = Selection(method=method, **more)
    return Problem(stats, layers, settings, get_kind("slim"), None, protected)


def scores_of(problem: Problem, name: str) -> Scores:
    return score_channels(get_channel_score(name), problem.stats, problem.layers, problem.settings)


def choose(problem: Problem, ratio: float) -> Choice:
    method = get_method(problem.settings.method)
    assert method.choose is not None
    return method.choose(problem, ratio)


def widths_of(problem: Problem, choice: Choice) -> Widths:
    """Widths of all experts, whole ones too."""
    found = {}
    for key, layer in problem.layers.items():
        entry = choice.layers.get(key, {}).get("slim", {})
        assert isinstance(entry, dict)
        assert all(0 <= w < WIDTH for w in entry.values())
        found[key] = [entry.get(e, WIDTH) for e in range(layer.experts)]
    return found


def listed(widths: dict[str, np.ndarray]) -> Widths:
    return {key: width.tolist() for key, width in widths.items()}


# --- slow and obvious ---


def slow_rank(problem: Problem, scores: Scores, ratio: float, keys: list[str], vector: int = 0) -> Widths:
    """Take the lowest channel that may go, one at a time, until the bytes are there."""
    left = {(key, e, k) for key in keys for e, k in np.ndindex(scores[key].shape)}
    wanted, freed, touched = ratio * len(left) * CHANNEL, 0, set()
    while freed < wanted - 1e-6:
        alone = {key for key in keys if sum(c[0] == key for c in left) == 1}
        may_go = [c for c in left if c[0] not in alone and c[1] not in problem.protected.get(c[0], ())]
        if not may_go:
            break
        lowest = min(may_go, key=lambda c: scores[c[0]][c[1], c[2]])
        left.remove(lowest)
        freed += CHANNEL - (0 if lowest[:2] in touched else vector)
        touched.add(lowest[:2])
    return {key: [sum(c[:2] == (key, e) for c in left) for e in range(len(scores[key]))] for key in keys}


def prefix(score: np.ndarray, coverage: float) -> int:
    """Fewest of the largest that reach a share of the total."""
    total, reached, count = score.sum(), 0.0, 0
    for value in sorted(score.ravel(), reverse=True):
        if reached >= min(1.0, coverage) * total:
            break
        reached += value
        count += 1
    return count


def bisected(counts_at: Any, wanted: int) -> Any:
    """Find counts with the wanted sum by bisection of one number."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(counts_at(middle)) >= wanted else (middle, high)
    return counts_at(high)


def slow_coverage(scores: Scores, sensitivity: dict[str, float], importance: Scores, ratio: float) -> Widths:
    """The two bisections of METHODS 10.3."""
    N = sum(s.size for s in scores.values())
    in_layers = bisected(
        lambda s: [prefix(scores[key], s * sensitivity[key]) for key in scores], N - int(np.ceil(ratio * N - 1e-6))
    )
    found = {}
    for key, count in zip(scores, in_layers, strict=True):
        omega = np.sqrt(importance[key]) / np.sqrt(importance[key]).sum()
        experts = list(zip(scores[key], omega, strict=True))
        found[key] = bisected(lambda t, experts=experts: [prefix(row, t * o) for row, o in experts], count)
    return found


# --- allocators ---


@pytest.mark.parametrize("ratio", RATIOS)
def test_by_rank_takes_the_lowest_of_the_model(ratio: float) -> None:
    problem = problem_of("heapr")
    scores = scores_of(problem, "heapr")
    want = slow_rank(problem, scores, ratio, list(scores))
    assert listed(by_rank(problem, scores, ratio)) == want == widths_of(problem, choose(problem, ratio))
    N = sum(s.size for s in scores.values())
    assert sum(map(sum, want.values())) == int(N * (1 - ratio) + 1e-6)  # as the paper counts


@pytest.mark.parametrize("ratio", RATIOS)
def test_by_rank_pays_for_constants(ratio: float) -> None:
    problem = problem_of("flap")
    scores = scores_of(problem, "flap")
    want = slow_rank(problem, scores, ratio, list(scores), vector=2 * HIDDEN)
    choice = choose(problem, ratio)
    assert widths_of(problem, choice) == want
    assert choice.how == {"slim": {"order": "flap", "constant": True}}
    kind = problem.kind.having(choice.how["slim"])
    freed = -sum(kind.added_bytes(problem.layers[key], x["slim"]) for key, x in choice.layers.items())
    wanted = ratio * problem.stats.model.routed_bytes
    assert wanted <= freed + 1e-6 and freed < wanted + CHANNEL


@pytest.mark.parametrize("ratio", RATIOS)
def test_by_layer_takes_the_lowest_of_each(ratio: float) -> None:
    problem = problem_of("camera")
    scores = scores_of(problem, "camera")
    want: Widths = {}
    for key in scores:
        want |= slow_rank(problem, scores, ratio, [key])
    assert listed(by_layer(problem, scores, ratio)) == want == widths_of(problem, choose(problem, ratio))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", range(3))
def test_by_coverage_is_both_bisections(ratio: float, seed: int) -> None:
    problem = problem_of("moe_slimming", made_up(seed))
    scores = scores_of(problem, "moe_slimming")
    sums = {key: problem.stats.layers[key] for key in scores}
    importance = {key: s.attribution_sum / s.tokens for key, s in sums.items()}
    sensitivity = dict(zip(sums, tempered(np.array([s.local_loss_sum / s.tokens for s in sums.values()])), strict=True))
    assert len(set(sensitivity.values())) == 3
    want = slow_coverage(scores, sensitivity, importance, ratio)
    assert listed(by_coverage(problem, scores, sensitivity, importance, ratio)) == want
    assert widths_of(problem, choose(problem, ratio)) == want


def test_sensitivity_is_rooted_and_clipped_four_times() -> None:
    values = [1e-4, 3e-3, 2e-3, 5.0]
    for _ in range(4):
        values = [v**0.5 for v in values]
        middle = sum(values) / 4
        spread = (sum((v - middle) ** 2 for v in values) / 4) ** 0.5
        values = [min(max(v, middle - spread), middle + spread) for v in values]
    np.testing.assert_allclose(tempered(np.array([1e-4, 3e-3, 2e-3, 5.0])), np.array(values) * 4 / sum(values))
    np.testing.assert_array_equal(tempered(np.zeros(3)), np.ones(3))


def test_experts_without_effect_keep_about_one_channel() -> None:
    problem = problem_of("moe_slimming")
    for key, layer in problem.stats.layers.items():
        effect = np.asarray(layer.attribution_sum).copy()
        effect[1] = -1.0
        problem.stats.layers[key] = replace(layer, attribution_sum=effect)
    assert [width[1] for width in widths_of(problem, choose(problem, 0.5)).values()] == [1, 1, 1]


@pytest.mark.parametrize("ratio", RATIOS)
def test_two_tiers_keep_the_best_whole_and_the_others_equal(ratio: float) -> None:
    problem = problem_of("tenp")
    whole = whole_experts([6, 4, 5], ratio)
    for (key, widths), n in zip(widths_of(problem, choose(problem, ratio)).items(), whole, strict=True):
        E, ranked = len(widths), np.argsort(-problem.stats.layers[key].towards_sum)
        n = min(n, int(E * WIDTH * (1 - ratio) / WIDTH))
        assert [widths[e] for e in ranked[:n]] == [WIDTH] * n
        others = [widths[e] for e in ranked[n:]]
        assert others == sorted(others, reverse=True)
        assert others[0] - others[-1] <= 1
        assert sum(widths) == max(1, int(E * WIDTH * (1 - ratio) + 1e-6))


def test_deep_layers_keep_more_experts_whole() -> None:
    assert whole_experts([100] * 5, 0.40) == [12, 19, 25, 31, 38]  # a quarter on the mean
    assert sum(whole_experts([1000] * 4, 0.70)) == 200  # a twentieth
    assert whole_experts([100], 0.55) == [15]
    assert whole_experts([100, 100], 0.99) == [0, 0]


# --- what all of them promise ---


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethodOverChannels:
    def test_nothing_goes_at_ratio_0(self, name: str) -> None:
        choice = choose(problem_of(name), 0.0)
        assert choice.layers == {} == choice.how
        assert choice.notes == ("the ratio is less than one neuron; nothing is replaced",)

    def test_the_ratio_is_met_and_no_more(self, name: str) -> None:
        problem = problem_of(name)
        for ratio in RATIOS[:-1]:
            choice = choose(problem, ratio)
            kind = problem.kind.having(choice.how["slim"])
            freed = -sum(kind.added_bytes(problem.layers[key], x["slim"]) for key, x in choice.layers.items())
            wanted = ratio * problem.stats.model.routed_bytes
            # FLAP pays for constants; what ranks layer by layer rounds up in each of three layers
            assert wanted <= freed + 1e-6 and freed < wanted + 3 * CHANNEL

    def test_a_larger_ratio_never_needs_more(self, name: str) -> None:
        problem = problem_of(name)
        before = 0
        for ratio in np.linspace(0, 1, 60):
            choice = choose(problem, float(ratio))
            added = added_bytes(choice.layers, problem.stats.model, choice.how)
            assert added <= before
            before = added

    def test_every_layer_keeps_a_neuron(self, name: str) -> None:
        problem = problem_of(name)
        for ratio in (0.99, 1.0):
            widths = widths_of(problem, choose(problem, ratio))
            assert all(1 <= sum(width) <= 2 for width in widths.values())

    def test_is_the_same_again(self, name: str) -> None:
        assert choose(problem_of(name), 0.5) == choose(problem_of(name), 0.5)

    def test_follows_experts_that_change_places(self, name: str) -> None:
        stats = made_up()
        moved = dict(stats.layers)
        order = {key: np.random.default_rng(7).permutation(layer.experts) for key, layer in stats.model.layers.items()}
        for key, layer in stats.layers.items():
            arrays = layer.arrays()
            experts = stats.model.layers[key].experts
            moved[key] = replace(layer, **{n: x[order[key]] for n, x in arrays.items() if x.shape[:1] == (experts,)})
        before, after = (problem_of(name, x) for x in (stats, replace(stats, layers=moved)))
        was, now = (widths_of(x, choose(x, 0.5)) for x in (before, after))
        assert now == {key: [width[e] for e in order[key]] for key, width in was.items()}
        assert was != now

    def test_leaves_alone_what_it_must(self, name: str) -> None:
        stats = made_up()
        layers = {key: stats.model.layers[key] for key in ("1", "10")}
        problem = problem_of(name, stats, layers=layers, protected={"1": [0, 2], "10": [4]})
        for ratio in (0.3, 0.6):
            choice = choose(problem, ratio)
            assert set(choice.layers) == {"1", "10"}
            widths = widths_of(problem, choice)
            assert widths["1"][0] == widths["1"][2] == widths["10"][4] == WIDTH
            kept = sum(map(sum, widths.values()))
            assert abs(kept - (1 - ratio) * 11 * WIDTH) <= (4 if name == "flap" else 2)

    @pytest.mark.parametrize("classes", [1, 2, 3])
    def test_widths_come_in_classes(self, name: str, classes: int) -> None:
        free, rounded = problem_of(name), problem_of(name, width_classes=classes)
        for ratio in (0.25, 0.5):
            before, after = (widths_of(x, choose(x, ratio)) for x in (free, rounded))
            left = 0  # what one layer's classes leave over is the next one's
            for key, width in after.items():
                assert len(set(width)) <= classes
                wanted = sum(before[key]) + left
                assert wanted - len(width) < sum(width) <= wanted
                left = wanted - sum(width)


# --- classes ---


def lost_by(score: np.ndarray, widths: Any) -> float:
    return sum(float(np.sort(row)[: len(row) - w].sum()) for row, w in zip(score, widths, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_classes_lose_little_more_than_the_best_there_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score, classes = np.exp(2 * rng.normal(size=(5, 6)) + rng.normal(size=(5, 1))), int(rng.integers(1, 4))
    count = int(rng.integers(1, 30))
    wanted = (score >= np.sort(score.ravel())[-count]).sum(1)  # as ranking the layer would have it
    got = in_classes(score, wanted, classes)
    if classes == 1 and wanted.sum() < 5:  # one neuron for all is too much, and none for all is no layer
        assert np.flatnonzero(got).tolist() == [wanted.argmax()] and got.sum() == wanted.sum()
        return
    assert len(set(got)) <= classes
    assert got.sum() <= wanted.sum()
    every = [
        widths
        for chosen in itertools.combinations(range(7), classes)
        for widths in itertools.product(chosen, repeat=5)
        if sum(widths) <= wanted.sum()
    ]
    best = min(lost_by(score, widths) for widths in every)
    assert best <= lost_by(score, got) <= 1.1 * best + 0.01 * score.sum()


def test_widths_that_are_few_enough_stay() -> None:
    widths = np.array([3, 6, 3, 0])
    assert in_classes(np.random.default_rng(0).random((4, 6)), widths, 3) is widths


@pytest.mark.parametrize("more", [0, 5, 40])
def test_wide_experts_have_widths_that_kernels_take(more: int) -> None:
    rng = np.random.default_rng(more)
    score = rng.random((6, 96))
    wanted = (score >= np.sort(score.ravel())[-300]).sum(1)
    got = in_classes(score, wanted, 3, more)
    assert len(set(got)) <= 3 and not (got % 8).any()
    assert 300 + more - 8 * 6 < got.sum() <= 300 + more
    assert not (in_classes(score, np.full(6, 43), 3) % 8).any(), "few enough, but of an awkward width"
    few = np.array([0, 0, 1, 0, 2, 0])
    assert in_classes(score, few, 3).tolist() == [0, 0, 0, 0, 3, 0], "no step is left: the layer keeps what it has"


@pytest.mark.parametrize("seed", range(10))
def test_partition_is_the_cheapest_of_all(seed: int) -> None:
    cost = np.random.default_rng(seed).normal(size=(6, 4))
    for runs in (1, 2, 3):
        every = []
        for cuts in itertools.combinations_with_replacement(range(7), runs - 1):
            parts = np.split(cost, cuts)
            every.append(sum(float(part.sum(0).min()) for part in parts if len(part)))
        columns = _partition(cost, runs)
        assert 1 + int((np.diff(columns) != 0).sum()) <= runs
        assert np.isclose(cost[np.arange(6), columns].sum(), min(every))


def test_layers_of_other_sizes_count_by_their_bytes() -> None:
    stats = made_up()
    wide = stats.model.layers["2"].model_copy(update={"channel_bytes": 4 * CHANNEL})
    problem = problem_of("heapr", stats, layers=stats.model.layers | {"2": wide})
    widths = by_rank(problem, scores_of(problem, "heapr"), 0.5)
    freed = {key: int((WIDTH - width).sum()) * problem.layers[key].channel_bytes for key, width in widths.items()}
    total = sum(x.experts * WIDTH * x.channel_bytes for x in problem.layers.values())
    assert total / 2 <= sum(freed.values()) < total / 2 + 4 * CHANNEL


def test_two_tiers_never_keep_more_whole_than_the_budget() -> None:
    problem = problem_of("tenp", protected={"2": [0, 1, 2]})
    importance = {key: np.arange(layer.experts, dtype=float) for key, layer in problem.layers.items()}
    widths = listed(in_two_tiers(problem, importance, {"1": 6, "2": 0, "10": 2}, 0.5))
    assert widths == {"1": [0, 0, 0, 12, 12, 12], "2": [12, 12, 12, 0], "10": [2, 2, 2, 12, 12]}
