"""Scores against METHODS read literally, route by route; statistics that merge; and the contract of every score."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from routes import Routes, draw_routes, facts_of, norm, stats_of, sums_of, turn
from understudy import registry
from understudy.errors import NumericError, PlanError, StatsError
from understudy.recipe import Selection
from understudy.scores import Score, all_scores, get_score, score_layers
from understudy.scores.shape import _same_rows as same_rows
from understudy.stats import ExpertStats, Stats, file_hash, load_stats
from understudy.sums import group_of
from understudy.sums import required_fields as required

REQUIRED = required()
SETTINGS = Selection(ratio=0.5)


def slow_mone(routes: Routes, expert: int, gate: str = "all-tokens") -> float:
    """Variance in each dimension with divisor n, summed, rooted; times the mean gate; one half of each."""
    found = routes.of(expert)
    if not found:
        return 0.0
    variance = 0.0
    for d in range(routes.outputs.shape[-1]):
        values = [y[d] for _, y in found]
        middle = sum(values) / len(values)
        variance += sum((v - middle) ** 2 for v in values) / len(values)
    divisor = len(found) if gate == "routed" else len(routes.index)
    return 0.5 * math.sqrt(variance) * (1 - 0.5) * sum(g for g, _ in found) / divisor


def slow_reap(routes: Routes, expert: int) -> float:
    """Mean over routed tokens of gate times norm."""
    found = routes.of(expert)
    return sum(g * norm(y) for g, y in found) / len(found) if found else 0.0


def slow_frequency(routes: Routes, expert: int) -> float:
    """Share of tokens that chose the expert."""
    return sum(expert in row for row in routes.index.tolist()) / len(routes.index)


def slow_ean(routes: Routes, expert: int) -> float:
    """Sum of norms without the gate."""
    return sum((norm(y) for _, y in routes.of(expert)), 0.0)


def slow_man(routes: Routes, expert: int) -> float:
    """Mean of norms without the gate."""
    found = routes.of(expert)
    return slow_ean(routes, expert) / len(found) if found else 0.0


def slow_msan(routes: Routes, expert: int) -> float:
    """Mean of squared norms without the gate."""
    found = routes.of(expert)
    return sum(norm(y) ** 2 for _, y in found) / len(found) if found else 0.0


def slow_gate(routes: Routes, expert: int) -> float:
    """Mean over all tokens of the gate, 0 where the token did not choose the expert."""
    return sum((g for g, _ in routes.of(expert)), 0.0) / len(routes.index)


def slow_lightmoe(routes: Routes, expert: int) -> float:
    """Sum of gates over the sums of all experts."""
    each = [sum((g for g, _ in routes.of(e)), 0.0) for e in range(routes.experts)]
    return each[expert] / sum(each)


def slow_easy_ep(routes: Routes, expert: int) -> float:
    """Sum over tokens of s_t g |y|, s_t by how much the routed experts turn the token."""
    total = 0.0
    for t, row in enumerate(routes.index.tolist()):
        for k, e in enumerate(row):
            if e == expert:
                total += turn(routes, t) * float(routes.gates[t, k]) * norm(routes.outputs[t, k])
    return total


def slow_aimer(routes: Routes, expert: int) -> float:
    """Minus mean|w| / rms(w): the paper prunes the largest ratio."""
    weights = [float(w) for w in routes.weights[expert]]
    rms = math.sqrt(sum(w * w for w in weights) / len(weights))
    return -(sum(abs(w) for w in weights) / len(weights)) / rms


def slow_router_norm_change(routes: Routes, expert: int) -> float:
    """Norm of the router's row now, less the norm it had in the base checkpoint, with its sign."""
    return norm(routes.router[expert]) - norm(routes.base_router[expert])


def slow_shape(routes: Routes, expert: int) -> float:
    """v(A), N_iA and a_i with sets, to the letter."""
    seen = [frozenset(row) for row in routes.index.tolist()]
    v = {A: seen.count(A) for A in set(seen)}
    mine = [A for A in v if expert in A]
    if not mine:
        return 0.0
    N = {A: sum(A - {expert} <= B for B in v) for A in mine}
    a = min(v[A] / N[A] for A in mine)
    return max(0.0, sum((v[A] - a * N[A]) / len(A) for A in mine) / len(mine))


REFERENCES = {
    "mone": slow_mone,
    "reap": slow_reap,
    "frequency": slow_frequency,
    "ean": slow_ean,
    "man": slow_man,
    "msan": slow_msan,
    "gate": slow_gate,
    "lightmoe": slow_lightmoe,
    "easy_ep": slow_easy_ep,
    "aimer": slow_aimer,
    "router_norm_change": slow_router_norm_change,
    "shape": slow_shape,
}


def test_every_score_but_random_has_a_reference() -> None:
    assert set(all_scores()) - set(REFERENCES) == {"random"}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(
    "routes",
    [
        draw_routes(seed=1),
        draw_routes(tokens=7, experts=16, top_k=4, seed=2, silent=(0, 3, 15)),
        draw_routes(tokens=1, experts=4, top_k=1, seed=3),
        draw_routes(tokens=200, experts=5, top_k=5, seed=4),
    ],
    ids=["plain", "silent", "one-token", "all-experts"],
)
def test_score_equals_the_slow_reference(name: str, routes: Routes) -> None:
    got = score_layers(get_score(name), stats_of({"0": routes}), SETTINGS).layers["0"]
    want = [REFERENCES[name](routes, e) for e in range(routes.experts)]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_mone_can_take_the_gate_over_routed_tokens_only() -> None:
    routes = draw_routes(seed=5, silent=(2,))
    got = score_layers(get_score("mone"), stats_of({"0": routes}), Selection(gate="routed")).layers["0"]
    want = [slow_mone(routes, e, "routed") for e in range(routes.experts)]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert got[2] == 0
    assert not np.allclose(got, score_layers(get_score("mone"), stats_of({"0": routes}), SETTINGS).layers["0"])


@pytest.mark.parametrize(("experts", "top_k"), [(6, 3), (9, 4), (300, 2), (5, 1), (4, 4)])
def test_shape_with_many_sets(experts: int, top_k: int) -> None:
    routes = draw_routes(tokens=150, experts=experts, top_k=top_k, seed=experts, silent=(1,) if top_k < experts else ())
    got = score_layers(get_score("shape"), stats_of({"0": routes}), SETTINGS).layers["0"]
    np.testing.assert_allclose(got, [slow_shape(routes, e) for e in range(experts)], rtol=1e-12, atol=1e-12)
    # one set for each expert, or one of all, owes nothing to any expert in particular
    assert (got > 0).any() == (1 < top_k < experts)


def test_shape_takes_seconds_on_real_sizes() -> None:
    tokens, experts, top_k = 65_536, 128, 8
    rng = np.random.default_rng(0)
    sets = np.sort(np.argpartition(rng.random((tokens, experts)), top_k, axis=1)[:, :top_k], axis=1)
    sets, counts = np.unique(sets, axis=0, return_counts=True)
    stats = ExpertStats(**dict.fromkeys(REQUIRED), topk_sets=sets, topk_counts=counts.astype(float))
    facts = facts_of({"0": draw_routes(tokens=1, experts=experts, top_k=top_k)})
    started = time.process_time()
    values = score_layers(get_score("shape"), Stats(facts, {}, {"0": stats}), SETTINGS).layers["0"]
    assert time.process_time() - started < 10
    assert values.shape == (experts,)


@pytest.mark.parametrize("base", [7, 2**20, 2**40])
def test_rows_are_told_apart_however_many_digits_they_have(base: int) -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 3, (200, 6)) * (base // 3)
    where, numbers = same_rows(rows, base)
    want = Counter(map(tuple, rows.tolist()))
    assert [numbers[at] for at in where] == [want[tuple(row)] for row in rows.tolist()]
    first = {at: tuple(row) for at, row in zip(where, rows.tolist(), strict=True)}
    assert [first[at] for at in where] == [tuple(row) for row in rows.tolist()]


def test_an_expert_of_zeros_is_spared_least_by_aimer() -> None:
    routes = draw_routes(seed=3)
    weights = routes.weights.copy()
    weights[2] = 0
    values = score_layers(get_score("aimer"), stats_of({"0": replace(routes, weights=weights)}), SETTINGS).layers["0"]
    assert values.argmin() == 2 and values[2] == -1


def test_random_follows_the_seed_and_the_place_of_the_layer() -> None:
    stats = stats_of({"2": draw_routes(), "10": draw_routes(), "3": draw_routes(seed=1)})
    got = score_layers(get_score("random"), stats, Selection(seed=7)).layers
    for position, key in enumerate(("2", "3", "10")):  # 10 comes last, though not as text
        np.testing.assert_array_equal(got[key], np.random.default_rng([7, position]).random(8))
    assert not np.array_equal(got["2"], score_layers(get_score("random"), stats, Selection(seed=8)).layers["2"])


@pytest.mark.parametrize("score", all_scores().values(), ids=lambda s: s.name)
class TestEveryScore:
    """The contract of a score; a new file comes in by itself."""

    def test_says_where_it_comes_from_and_what_it_reads(self, score: Score) -> None:
        assert len(score.source) > 10
        assert set(score.needs) <= {f.name for f in fields(ExpertStats)}
        assert set(score.options) <= set(Selection.model_fields)
        assert re.fullmatch(r"[a-z][a-z0-9_]*", score.name)

    def test_gives_one_finite_float64_for_each_expert(self, score: Score) -> None:
        layers = {"0": draw_routes(silent=(1,)), "3": draw_routes(experts=5, seed=1), "4": draw_routes(tokens=0)}
        scores = score_layers(score, stats_of(layers), SETTINGS)
        assert (scores.name, scores.source) == (score.name, score.source)
        assert {key: (v.shape, v.dtype) for key, v in scores.layers.items()} == {
            key: ((routes.experts,), np.dtype(np.float64)) for key, routes in layers.items()
        }

    def test_reads_no_more_than_it_says(self, score: Score) -> None:
        stats = stats_of({"0": draw_routes()})
        blank = {f.name: None for f in fields(ExpertStats) if f.name not in score.needs}
        bare = Stats(stats.model, {}, {"0": replace(stats.layers["0"], **blank)})
        want = score_layers(score, stats, SETTINGS).layers["0"]
        np.testing.assert_array_equal(score_layers(score, bare, SETTINGS).layers["0"], want)

    def test_does_not_change_the_statistics(self, score: Score) -> None:
        stats = stats_of({"0": draw_routes()})
        before = {name: value.copy() for name, value in stats.layers["0"].arrays().items()}
        score_layers(score, stats, SETTINGS).layers["0"][:] = -1
        for name, value in stats.layers["0"].arrays().items():
            np.testing.assert_array_equal(value, before[name])

    def test_follows_the_experts_when_they_are_renamed(self, score: Score) -> None:
        if "seed" in score.options:
            pytest.skip("drawn by position")
        routes = draw_routes(seed=6)
        new = np.random.default_rng(0).permutation(routes.experts)
        moved = score_layers(score, stats_of({"0": routes.renamed(new)}), SETTINGS).layers["0"]
        np.testing.assert_allclose(moved[new], score_layers(score, stats_of({"0": routes}), SETTINGS).layers["0"])

    def test_ranks_an_expert_that_saw_no_token_lowest(self, score: Score) -> None:
        if {group_of(name) for name in score.needs} <= {"weights", "base"}:
            pytest.skip("does not look at the routes")
        values = score_layers(score, stats_of({"0": draw_routes(tokens=200, silent=(4,))}), SETTINGS).layers["0"]
        assert values[4] == 0
        assert (np.delete(values, 4) > 0).all()


def test_an_unknown_score_suggests_the_nearest() -> None:
    with pytest.raises(
        PlanError, match=r"no score is named 'frequence' \(did you mean 'frequency'\?\); there is aimer, ean"
    ):
        get_score("frequence")


def test_scores_refuse_what_does_not_fit_the_model() -> None:
    stats = stats_of({"0": draw_routes(), "1": draw_routes()})
    with pytest.raises(StatsError, match="layer 1: the statistics lack this layer"):
        score_layers(get_score("reap"), replace(stats, layers={"0": stats.layers["0"]}), SETTINGS)
    short = sums_of(draw_routes(experts=5))
    with pytest.raises(StatsError, match="layer 1: statistics of 5 experts, the model has 8"):
        score_layers(get_score("reap"), replace(stats, layers={**stats.layers, "1": short}), SETTINGS)
    poisoned = stats.layers["1"].gated_norm_sum.copy()
    poisoned[3] = np.nan
    broken = replace(stats.layers["1"], gated_norm_sum=poisoned)
    with pytest.raises(NumericError, match="layer 1: the reap score of expert 3 is NaN or infinite"):
        score_layers(get_score("reap"), replace(stats, layers={**stats.layers, "1": broken}), SETTINGS)


def test_a_score_in_a_new_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "newcomers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text(
        "from understudy.scores import Score\nFIRST = Score('first', 'nowhere in particular', (), lambda s, c: None)\n"
    )
    (package / "second.py").write_text("from newcomers.first import FIRST\n")  # seen twice, one score
    monkeypatch.syspath_prepend(tmp_path)
    assert list(registry.discover("newcomers", Score)) == ["first"]


# --- the sums themselves ---


def assert_same(a: ExpertStats, b: ExpertStats, rtol: float) -> None:
    for name, value in a.arrays().items():
        np.testing.assert_allclose(value, b.arrays()[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("cuts", [(20,), (1, 2, 39), (0, 13), tuple(range(1, 40))], ids=str)
def test_statistics_of_parts_add_up_to_those_of_the_whole(cuts: tuple[int, ...]) -> None:
    routes = draw_routes(tokens=40, experts=12, seed=8, silent=(5,))
    edges = [0, *cuts, 40]
    parts = [sums_of(routes.part(a, b)) for a, b in itertools.pairwise(edges)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    assert_same(merged, sums_of(routes), 1e-9)
    backwards = parts[-1]
    for part in reversed(parts[:-1]):
        backwards = backwards + part
    assert_same(backwards, sums_of(routes), 1e-9)


def test_merging_keeps_its_digits_far_from_the_origin() -> None:
    routes = draw_routes(tokens=60, seed=9)
    far = replace(routes, outputs=routes.outputs + 1e6)  # a sum of squares would lose every digit of the variance
    merged = sums_of(far.part(0, 30)) + sums_of(far.part(30, 60))
    np.testing.assert_allclose(merged.scatter, sums_of(routes).scatter, rtol=1e-6)
    np.testing.assert_allclose(merged.weighted_scatter, sums_of(routes).weighted_scatter, rtol=1e-6)


def test_merging_an_empty_sample_changes_nothing() -> None:
    routes = draw_routes()
    empty = sums_of(routes.part(0, 0))
    assert_same(sums_of(routes) + empty, sums_of(routes), 0)
    assert_same(empty + sums_of(routes), sums_of(routes), 0)


def test_runs_over_one_model_merge_and_over_two_do_not() -> None:
    routes = draw_routes(tokens=40)
    whole, a, b = (stats_of({"0": r}) for r in (routes, routes.part(0, 9), routes.part(9, 40)))
    assert_same((a + b).layers["0"], whole.layers["0"], 1e-9)
    with pytest.raises(StatsError, match=r"two models cannot be merged: toy \(print-of-toy\) and other \(pri"):
        a + stats_of({"0": routes}, source="other")


def test_statistics_survive_the_file(tmp_path: Path) -> None:
    stats = stats_of({"2": draw_routes(), "10": draw_routes(experts=4, seed=1), "9": draw_routes(seed=2)})
    path = stats.save(tmp_path / "run" / "stats.safetensors")
    loaded = load_stats(path)
    assert loaded.model == stats.model
    assert list(loaded.model.layers) == list(loaded.layers) == ["2", "9", "10"]
    assert loaded.data == stats.data
    for key in stats.layers:
        for name, value in loaded.layers[key].arrays().items():
            want = stats.layers[key].arrays()[name]
            assert value.dtype == np.float64
            assert value.shape == want.shape, name
            # vectors are stored in float32, sums as they are
            np.testing.assert_array_equal(value, want.astype(np.float32) if "mean" in name else want)
    assert file_hash(path) == file_hash(stats.save(tmp_path / "again.safetensors"))


def test_statistics_can_be_read_without_the_vectors(tmp_path: Path) -> None:
    stats = stats_of({"0": draw_routes()})
    path = stats.save(tmp_path / "s")
    layer = load_stats(path, only={"count", "tokens"}).layers["0"]
    np.testing.assert_array_equal(layer.count, stats.layers["0"].count)
    assert layer.tokens == 40
    assert layer.mean is None


def test_bad_statistics_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    with pytest.raises(StatsError, match="no such statistics file; `understudy calibrate` writes one"):
        load_stats(path)
    path.write_text("hello")
    with pytest.raises(StatsError, match="not a statistics file of understudy, or damaged"):
        load_stats(path)
    header = {"format": 99, "model": {}, "data": {}}
    save_file({"x": np.zeros(1)}, path, metadata={"understudy": json.dumps(header)})
    with pytest.raises(StatsError, match="statistics of format 99, this version reads 1"):
        load_stats(path)
    save_file({"x": np.zeros(1)}, path, metadata={"understudy": json.dumps(header | {"format": 1})})
    with pytest.raises(StatsError, match="not a statistics file of understudy, or damaged"):
        load_stats(path)
    facts = facts_of({"0": draw_routes()})
    save_file(
        {"layers.0.count": np.zeros(8)},
        path,
        metadata={"understudy": json.dumps({"format": 1, "model": facts.model_dump(), "data": {}})},
    )
    with pytest.raises(StatsError, match="layer 0 lacks tokens, gate_sum"):
        load_stats(path)
    whole = stats_of({"0": draw_routes()}).save(tmp_path / "whole").read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(StatsError, match="damaged"):
        load_stats(path)


def test_planning_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, understudy.stages.select, understudy.stages.review\n"
        "from understudy.kinds import all_kinds\nfrom understudy.methods import all_methods\n"
        "from understudy.scores import all_scores\nall_kinds(), all_methods(), all_scores()\n"
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
