"""The search over per-layer counts: the total stays, limits hold, seeds repeat, and small problems are solved."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import understudy
from understudy.activations import ActivationStore
from understudy.data import token_blocks
from understudy.errors import PlanError
from understudy.evolution import Counts, Evolution, evolve
from understudy.plans import load_plan
from understudy.skeleton import Skeleton
from understudy.stats import load_stats
from understudy.tokens import load_tokenizer
from understudy.virtual import planned
from understudy.walk import Walk

MOST = (7, 3, 7, 5)
START = (3, 3, 3, 3)


def bowl(counts: Counts) -> float:
    """Highest at (6, 1, 4, 1)."""
    return -float(np.square(np.array(counts) - (6, 1, 4, 1)).sum())


def test_finds_the_best_of_all_counts() -> None:
    best = evolve(START, MOST, bowl, Evolution(generations=30, population=12))
    every = itertools.product(*(range(n + 1) for n in MOST))
    assert best == max((c for c in every if sum(c) == sum(START)), key=bowl)


@pytest.mark.parametrize("seed", range(5))
def test_keeps_the_total_and_the_limits_and_asks_once(seed: int) -> None:
    asked: list[Counts] = []

    def fitness(counts: Counts) -> float:
        asked.append(counts)
        return bowl(counts)

    evolve(START, MOST, fitness, Evolution(generations=6, population=10, seed=seed))
    assert len(asked) == len(set(asked)) > 10
    assert asked[0] == START
    assert all(sum(c) == sum(START) and all(0 <= n <= m for n, m in zip(c, MOST, strict=True)) for c in asked)


def test_never_ends_below_its_start_and_repeats_itself() -> None:
    def steps(seed: int) -> list[tuple[int, Counts, float]]:
        seen: list[tuple[int, Counts, float]] = []
        evolve(START, MOST, bowl, Evolution(generations=5, seed=seed), lambda *args: seen.append(args))
        return seen

    seen = steps(1)
    assert seen == steps(1)
    assert seen != steps(2)
    assert [number for number, _, _ in seen] == list(range(6))
    assert all(later[2] >= earlier[2] >= bowl(START) for earlier, later in itertools.pairwise(seen))


def test_a_single_layer_has_nothing_to_search() -> None:
    assert evolve((3,), (7,), bowl_of_one, Evolution(generations=2)) == (3,)


def bowl_of_one(counts: Counts) -> float:
    """Whatever."""
    return float(counts[0])


DEMO = Path(__file__).parents[1] / "examples" / "demo"
TEXT: dict[str, Any] = {"data": (f"{DEMO}/train/math.jsonl.xz",), "samples": 4, "seq_len": 64}
SHORT: dict[str, Any] = {"method": "reap", "kind": "constant", "ratio": 0.5, "generations": 2, "population": 5}


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    understudy.calibrate(DEMO / "model", path, **TEXT)
    return path


def test_a_found_plan_is_as_large_and_shares_more(stats: Path, tmp_path: Path) -> None:
    found = understudy.search(DEMO / "model", stats, tmp_path / "plan.yaml", **TEXT, **SHORT)
    equal = understudy.plan(stats, method="reap", kind="constant", ratio=0.5)
    assert found.expected_bytes == equal.expected_bytes
    assert 0 < found.start_fitness <= found.fitness < 1
    assert load_plan(tmp_path / "plan.yaml") == found.plan
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.yaml"]
    source, known = Skeleton(DEMO / "model"), load_stats(stats)
    assert slow_overlap(source, planned(source, found.plan, known)) == pytest.approx(found.fitness, rel=1e-4)
    assert slow_overlap(source, planned(source, equal.plan, known)) == pytest.approx(found.start_fitness, rel=1e-4)


def slow_overlap(source: Skeleton, smaller: Skeleton) -> float:
    """Token by token, from whole logits."""
    blocks = token_blocks(TEXT["data"], load_tokenizer(DEMO / "model", False), seq_len=64, samples=4, seed=0)
    both = []
    for model in (source, smaller):
        walk = Walk(model, blocks.ids, 4, ActivationStore(1 << 30))
        with walk.ready():
            walk.through_layers()
            both.append(walk.logits(0).double().softmax(-1))
    shared = [float(torch.minimum(p, q).sum()) for a, b in zip(*both, strict=True) for p, q in zip(a[:-1], b[:-1])]
    return sum(shared) / len(shared)


def test_an_interrupted_search_goes_on(stats: Path, tmp_path: Path) -> None:
    whole = understudy.search(DEMO / "model", stats, tmp_path / "whole.yaml", **TEXT, **SHORT)

    def stop(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        understudy.search(DEMO / "model", stats, tmp_path / "plan.yaml", progress=stop, **TEXT, **SHORT)
    left = tmp_path / ".plan.yaml.search.json"
    known = json.loads(left.read_text())
    assert not (tmp_path / "plan.yaml").exists()
    known["known"][0][1] = 2.0  # what was evaluated is believed, not evaluated again: equal layers would now win
    left.write_text(json.dumps(known))
    again = understudy.search(DEMO / "model", stats, tmp_path / "plan.yaml", **TEXT, **SHORT)
    assert again.fitness == again.start_fitness == 2.0
    assert not left.exists()
    (tmp_path / "plan.yaml").unlink()
    assert understudy.search(DEMO / "model", stats, tmp_path / "plan.yaml", **TEXT, **SHORT) == whole


def test_what_cannot_be_searched_is_refused(stats: Path, tmp_path: Path) -> None:
    for more, message in (
        ({"kind": "drop"}, "drop needs the same number in every layer; search with --kind constant"),
        ({"method": "layer_drop", "kind": None}, "layer_drop does not rank single experts"),
        ({"ratio": 1.5}, "--ratio, more than 0 and less than 1"),
        ({"keep_super": True}, "--keep-super has no effect on a search"),
        ({"scope": "model"}, "--scope has no effect on a search"),
    ):
        with pytest.raises(PlanError, match=message):
            understudy.search(DEMO / "model", stats, tmp_path / "plan.yaml", **TEXT, **(SHORT | more))
