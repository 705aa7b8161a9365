"""Ladder with maps of low rank: what each expert could be, the choice at a price, and a trained model end to end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contract import walked
from test_ladder import DEMO
from understudy import apply, plan
from understudy.channel_scores import get_channel_score
from understudy.data import token_blocks
from understudy.errors import StatsError
from understudy.kinds import expected_bytes, get_kind
from understudy.kinds.slim import Slim
from understudy.methods import Problem
from understudy.methods.ladder_affine import RANKS_TRIED, _maps, ranked
from understudy.recipe import Selection
from understudy.rungs import Rungs, beyond_least, rungs_of
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import calibrate
from understudy.stats import Stats, load_stats
from understudy.tokens import load_tokenizer
from understudy.virtual import planned

GROUPS = ("channels", "grams", "gradients", "low_rank")


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Stats:
    file = tmp_path_factory.mktemp("affine") / "stats.safetensors"
    calibrate(DEMO / "model", file, data=(str(DEMO / "train"),), samples=48, seq_len=64, collect=GROUPS, seed=0)
    return load_stats(file)


def problem_of(stats: Stats) -> Problem:
    return Problem(stats, dict(stats.model.layers), Selection(), get_kind("slim"), None)


def rungs(stats: Stats) -> tuple[dict[str, np.ndarray], dict[str, Rungs]]:
    """Scores of the neurons, and what the experts could be."""
    score = get_channel_score("obs")
    scores = {key: score.compute(layer, None) for key, layer in stats.layers.items()}  # type: ignore[arg-type]
    return scores, rungs_of(problem_of(stats), scores, RANKS_TRIED)


def test_rungs_cost_what_the_kinds_say_and_lose_what_the_score_says(stats: Stats) -> None:
    scores, found_in = rungs(stats)
    key, layer = next(iter(stats.model.layers.items()))
    score, found = scores[key], found_in[key]
    slim, width = Slim("obs", constant=True, refit=True), layer.width or 0
    for e, w in itertools.product((0, 3), (0, 1, 17, width - 1)):
        assert found.taken[e, w] == slim.stored_bytes(layer, {e: w})
        assert found.lost[e, w] == pytest.approx(sum(sorted(score[e])[: width - w]))
    assert found.taken[0, width] == layer.expert_bytes
    assert not found.lost[:, width].any()
    for place, rank in enumerate(found.ranks, width + 1):
        assert found.taken[0, place] == get_kind("low_rank").stored_bytes(layer, {0: rank})
        for e in range(layer.experts):
            gained = sum(stats.layers[key].affine_gain[e][:rank]) / stats.layers[key].affine_error[e]
            assert found.lost[e, place] == pytest.approx(found.lost[e, 0] * (1 - gained), rel=1e-6)


@pytest.mark.parametrize("ratio", [0.6, 0.8, 0.9])
def test_the_choice_at_a_price_is_the_best_there_is_for_its_bytes(stats: Stats, ratio: float) -> None:
    """Among all ways to give two experts their rungs, none of as many bytes loses less (Everett 1963)."""
    found = rungs(stats)[1]
    maps = _maps(problem_of(stats), found, ratio)
    x = next(iter(found.values()))
    price = 1e-12
    two = range(2)
    while x.taken[two, x.at(price)[:2]].sum() > (1 - ratio) * 2 * x.taken.max():
        price *= 1.05
    at = x.at(price)[:2]
    lost, taken = (part[two, at].sum() for part in (x.lost, x.taken))
    for pair in itertools.product(range(x.lost.shape[1]), repeat=2):
        if x.taken[two, pair].sum() <= taken:
            assert x.lost[two, pair].sum() >= lost * (1 - 1e-9)
    if ratio == 0.9:
        assert any(maps.values()), "no expert is better off as a map at the smallest budget"
    for key, chosen in maps.items():
        assert len(chosen) < stats.model.layers[key].experts
        assert set(chosen.values()) <= {2, 4, 8, 16, 32}


def test_the_distance_from_the_best_is_that_of_trying_all(stats: Stats) -> None:
    """Two experts: a choice loses no less than the bound, and the best of all for its bytes is next to it."""
    x = next(iter(rungs(stats)[1].values()))
    two = {"0": Rungs(x.lost[:2], x.taken[:2], x.ranks, np.array([True, True]))}
    pairs = list(itertools.product(range(0, x.lost.shape[1], 3), repeat=2))
    for pair in pairs[:: len(pairs) // 7]:
        entries: dict[str, dict[int, int]] = {"slim": {}, "low_rank": {}}
        for e, at in enumerate(pair):
            if at > x.width:
                entries["low_rank"][e] = x.ranks[at - x.width - 1]
            elif at < x.width:
                entries["slim"][e] = at
        lost, taken = two["0"].sums(np.array(pair))
        every = itertools.product(range(x.lost.shape[1]), repeat=2)
        sums = [two["0"].sums(np.array(other)) for other in every]
        best = min(lost for lost, bytes_ in sums if bytes_ <= taken)
        bound = lost / (1 + beyond_least(two, {"0": entries}))  # type: ignore[dict-item]
        assert bound <= best * (1 + 1e-9)
        hull = [lost for lost, bytes_ in sums if bytes_ <= taken * 1.05 + x.taken[0, 1]]
        assert bound >= min(hull) * (1 - 1e-9) or bound == pytest.approx(0)


def test_a_small_budget_is_met_and_loses_less_than_without_maps(stats: Stats, tmp_path: Path) -> None:
    model = DEMO / "model"
    test = token_blocks((str(DEMO / "test"),), load_tokenizer(model, False), seq_len=64, samples=24, seed=0)
    ids, source = torch.from_numpy(test.ids.astype(np.int64)), Skeleton(model, dtype="float32")
    original = walked(source, ids).log_softmax(-1)
    budget = stats.model.nbytes - int(0.95 * stats.model.routed_bytes)
    kl: dict[str, float] = {}
    for method in ("ladder", "ladder_affine"):
        made = plan(stats, method=method, size=f"{budget}B")
        assert made.expected_bytes <= budget
        logits = walked(planned(source, made.plan, stats), ids).log_softmax(-1)
        kl[method] = float((original.exp() * (original - logits)).sum(-1).mean())
    assert any("low_rank" in kinds for kinds in made.plan.layers.values())
    assert any("affine maps" in note for note in made.notes)
    assert kl["ladder_affine"] < kl["ladder"], kl
    done = apply(model, made.plan, tmp_path / "out", stats=stats)  # verifies what it wrote
    assert done.nbytes == expected_bytes(made.plan, stats.model)


def test_every_layer_keeps_an_expert_with_weights_and_protected_ones_stay(stats: Stats) -> None:
    protected = {key: frozenset({1, 2}) for key in stats.model.layers}
    for problem in (problem_of(stats), Problem(stats, dict(stats.model.layers), Selection(), get_kind("slim"), None)):
        for ratio in (0.5, 0.95):
            for guarded in ({}, protected):
                chosen = ranked(_with(problem, guarded), ratio, "obs")
                for key, kinds in chosen.layers.items():
                    widths: Any = kinds.get("slim", {})
                    maps: Any = kinds.get("low_rank", {})
                    assert not set(widths) & set(maps)
                    assert not (set(widths) | set(maps)) & guarded.get(key, frozenset())
                    left = [e for e in range(problem.layers[key].experts) if e not in maps and widths.get(e, 1)]
                    assert left


def _with(problem: Problem, protected: dict[str, frozenset[int]]) -> Problem:
    return Problem(problem.stats, problem.layers, problem.settings, problem.kind, None, protected)


def test_statistics_without_maps_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    calibrate(DEMO / "model", file, data=(str(DEMO / "train"),), samples=4, seq_len=32, collect=GROUPS[:3], seed=0)
    with pytest.raises(StatsError, match="low_rank"):
        plan(file, method="ladder_affine", ratio=0.9)
