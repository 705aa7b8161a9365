"""LightMoE and its baselines against slow loops that follow the words of METHODS 1; sizes of the paper's model."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from routes import draw_routes, stats_of
from test_select import chosen
from tiny import make_model, make_text
from understudy.budgets import in_parameters
from understudy.errors import PlanError, StatsError, UnderstudyError
from understudy.facts import LayerFacts, ModelFacts
from understudy.grouping import clustered
from understudy.kinds import added_bytes, check_plan
from understudy.kinds.shared_base import SHARED_BASE
from understudy.layout import model_facts
from understudy.methods import get_method
from understudy.methods.lightmoe import group
from understudy.plans import load_plan
from understudy.ranking import planning_needs
from understudy.recipe import Selection
from understudy.rehearsal import made_up
from understudy.scores import get_score
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import calibrate
from understudy.stages.select import PlanResult, make_plan, plan
from understudy.stats import Stats
from understudy.weights import TensorEntry, Weights

METHODS = {"lightmoe": 2, "replace_shared": 1, "replace_adapters": 0}  # with the bases of a layer, of lightmoe as asked
HIDDEN, WIDTH, RANK = 6, 16, 1
EXPERT, ADAPTER = 2 * 3 * HIDDEN * WIDTH, 2 * 3 * RANK * (HIDDEN + WIDTH)  # bytes
SIZES = {"expert_params": EXPERT // 2, "expert_bytes": EXPERT, "width": WIDTH, "channel_bytes": 2 * 3 * HIDDEN}
SEQUENCES, LENGTH = 5, 8


def toy(experts: int = 12, silent: tuple[int, ...] = (), layers: int = 4) -> tuple[Stats, dict[str, np.ndarray]]:
    """Return statistics of drawn routes, and the router's logits `[B, S, E]` that they are of."""
    drawn = {
        str(n): draw_routes(tokens=SEQUENCES * LENGTH, experts=experts, seed=n, silent=silent) for n in range(layers)
    }
    stats, found, logits = stats_of(drawn, **SIZES), {}, {}
    for key, routes in drawn.items():
        series = routes.logits.reshape(SEQUENCES, LENGTH, experts)
        cosines, gram = np.zeros((experts, experts)), np.zeros((experts, experts))
        for a in range(experts):
            for b in range(experts):
                cosines[a, b] = sum(cosine(block[:, a], block[:, b]) for block in series)
                gram[a, b] = sum(float(row[a] * row[b]) for row in routes.logits)
        more = {"sequences": np.float64(SEQUENCES), "logit_cos_sum": cosines, "logit_gram": gram}
        found[key], logits[key] = replace(stats.layers[key], **more), series
    return replace(stats, layers=found), logits


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def settings(method: str = "lightmoe", **more: Any) -> Selection:
    bases = {"bases": METHODS["lightmoe"]} if method == "lightmoe" else {}
    return Selection(**({"method": method, "rank": RANK} | bases | more))


def planned(stats: Stats, method: str = "lightmoe", **more: Any) -> PlanResult:
    return make_plan(stats, settings(method, **more))


def freed(count: int, bases: int) -> int:
    """Return the bytes that replacing so many experts of a layer saves (METHODS 1.7); 0 where it would cost some."""
    return max(0, count * EXPERT - min(count, bases) * EXPERT - count * ADAPTER)


# --- selection ---


def slow_prefixes(stats: Stats, p_hat: float, alpha: float = 0.3) -> dict[str, list[int]]:
    """METHODS 1.3: in each layer the shortest prefix by G whose sum exceeds p_j; an expert stays in any case."""
    norms = {key: float(layer.logit_norm_sum) / float(layer.tokens) for key, layer in stats.layers.items()}
    mean, found = sum(norms.values()) / len(norms), {}
    for key, layer in stats.layers.items():
        G = [float(g) / float(sum(layer.gate_sum)) for g in layer.gate_sum]
        p_j = p_hat * math.exp(-alpha * (norms[key] / mean - 1))
        p_j = min(max(p_j, 0.8 * p_hat), 1.2 * p_hat)
        prefix: list[int] = []
        for i in sorted(range(len(G)), key=lambda i: (G[i], i))[:-1]:
            if sum(G[j] for j in prefix) > p_j:
                break
            prefix.append(i)
        found[key] = prefix
    return found


def slow_grid(stats: Stats, alpha: float) -> list[tuple[float, dict[str, list[int]]]]:
    """Try many thresholds, and return those at which something changes."""
    found: list[tuple[float, dict[str, list[int]]]] = []
    for step in range(3500):
        prefixes = slow_prefixes(stats, step / 2500, alpha)
        if not found or prefixes != found[-1][1]:
            found.append((step / 2500, prefixes))
    return found


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_the_threshold_is_the_smallest_that_frees_the_bytes(alpha: float | None) -> None:
    stats, _ = toy()
    grid, routed, same = slow_grid(stats, 0.3 if alpha is None else alpha), stats.model.routed_bytes, 0
    for method, bases in METHODS.items():
        ratios = [n / 40 for n in range(1, 40) if n / 40 <= 4 * freed(11, bases) / routed]
        for ratio in ratios:
            result = planned(stats, method, ratio=ratio, alpha=alpha)
            total = {p: sum(freed(len(ids), bases) for ids in x.values()) for p, x in grid}
            p_hat, prefixes = next((p, x) for p, x in grid if total[p] >= ratio * routed)
            want = {key: sorted(ids) if freed(len(ids), bases) else [] for key, ids in prefixes.items()}
            got = chosen(result.plan)
            assert all(set(got[key]) <= set(want[key]) for key in want)
            removed = stats.model.nbytes - result.expected_bytes
            assert removed == sum(freed(len(ids), bases) for ids in got.values())
            assert ratio * routed <= removed < ratio * routed + freed(bases + 1, bases) + EXPERT
            if got == want:  # else two layers gave up an expert within one step of the grid
                same += 1
                found = float(re.search(r"the threshold is ([0-9.e-]+);", result.notes[0])[1])
                assert p_hat - 1 / 2500 - 1e-3 * p_hat <= found <= p_hat + 1e-3 * p_hat
                lost = [len(ids) for ids in want.values()]
                assert result.notes[0].endswith(f"layers lose {min(lost)} to {max(lost)} experts")
        assert same >= 0.9 * len(ratios)
        same = 0


def test_a_layer_with_large_logits_loses_less_unless_told_otherwise() -> None:
    stats, _ = toy()
    alike = dict.fromkeys(stats.layers, stats.layers["0"])
    loud = replace(alike["0"], logit_norm_sum=3 * alike["0"].logit_norm_sum)
    stats = replace(stats, layers=alike | {"2": loud})
    ratio = 4 * freed(7, 2) / stats.model.routed_bytes
    for options in ({"alpha": 0.0}, {"scope": "layer"}):
        assert [len(ids) for ids in chosen(planned(stats, ratio=ratio, **options).plan).values()] == [7] * 4
    lost = [len(ids) for ids in chosen(planned(stats, ratio=ratio).plan).values()]
    assert lost[2] < 7 < max(lost)


def test_by_layer_every_layer_gives_up_the_same_number() -> None:
    stats, _ = toy()
    routed = stats.model.routed_bytes
    for method, bases in METHODS.items():
        for ratio in (0.05, 0.2, 0.4):
            result = planned(stats, method, ratio=ratio, scope="layer")
            count = next(n for n in range(12) if 4 * freed(n, bases) >= ratio * routed)
            G = {key: get_score("lightmoe").compute(x, None) for key, x in stats.layers.items()}
            assert chosen(result.plan) == {key: sorted(np.argsort(g, kind="stable")[:count]) for key, g in G.items()}
            assert result.notes[0] == f"layers lose {count} to {count} experts"
            assert result.plan.recipe["scope"] == "layer"


def test_the_score_is_the_share_of_the_gates() -> None:
    stats, _ = toy()
    result = planned(stats, ratio=0.3)
    assert result.scores is not None
    assert result.scores.name == "lightmoe"
    for key, layer in stats.layers.items():
        np.testing.assert_allclose(result.scores.layers[key], layer.gate_sum / layer.gate_sum.sum())


def test_experts_that_saw_no_token_go_first() -> None:
    stats, _ = toy(silent=(1, 4, 7, 10))
    result = planned(stats, ratio=0.05)
    assert all(set(ids) <= {1, 4, 7, 10} for ids in chosen(result.plan).values())
    assert any(note.startswith("16 of 48 experts saw no token in calibration; ") for note in result.notes)
    result = planned(stats, "replace_adapters", ratio=0.6)
    assert all(set(ids) >= {1, 4, 7, 10} for ids in chosen(result.plan).values())
    assert any("16 of them become parts of low rank like the others" in note for note in result.notes)


def test_a_layer_in_which_bases_cost_more_than_they_free_stays() -> None:
    stats, _ = toy()
    uniform, steep = np.ones(12), np.array([1000.0, *np.arange(1, 12)])
    layers = {key: replace(x, gate_sum=steep if key != "1" else uniform) for key, x in stats.layers.items()}
    result = planned(replace(stats, layers=layers), ratio=0.3)
    assert set(result.plan.layers) == {"0", "2", "3"}
    assert any(note.startswith("layers 1 stay as they are: bases for so few") for note in result.notes)
    assert stats.model.nbytes - result.expected_bytes >= 0.3 * stats.model.routed_bytes
    assert "layers lose 0 to " in result.notes[0]


def test_more_is_never_less() -> None:
    stats, _ = toy()
    for method in METHODS:
        plans = [planned(stats, method, ratio=n / 100) for n in range(0, 35)]
        sizes = [plan.expected_bytes for plan in plans]
        assert sizes == sorted(sizes, reverse=True)
        for less, more in pairwise(plans):
            assert all(set(less.plan.replaced(key)) <= set(more.plan.replaced(key)) for key in stats.layers)
        assert plans[0].plan.layers == {}
        assert plans[0].notes == ("ratio 0 replaces nothing",)


@pytest.mark.parametrize("method", METHODS)
def test_sizes_and_shares_of_the_parameters_are_met_by_one_expert(method: str) -> None:
    stats, _ = toy()
    unit = freed(METHODS[method] + 1, METHODS[method]) + EXPERT
    for share in (0.05, 0.15, 0.25):
        most = (1 - share) * stats.model.nbytes
        for more in ({"size": f"{math.floor(most)}B"}, {"model_ratio": share}):
            result = planned(stats, method, **more)
            assert most - unit < result.expected_bytes <= most
            assert result.ratio is not None
            assert planned(stats, method, ratio=result.ratio).plan.layers == result.plan.layers
        gone = 1 - result.expected_bytes / stats.model.nbytes
        assert any(note.startswith(f"{gone:.2%} of the parameters of the whole model go") for note in result.notes)


def test_what_is_to_stay_stays() -> None:
    stats, _ = toy()
    largest = {key: np.ones(12) for key in stats.layers}
    lowest = int(np.argmin(stats.layers["2"].gate_sum))
    largest["2"][lowest] = 1e6
    layers = {key: replace(x, output_max=largest[key]) for key, x in stats.layers.items()}
    result = planned(replace(stats, layers=layers), ratio=0.3, keep_super=True, keep_layers="1")
    assert "1" not in result.plan.layers
    assert len(result.plan.replaced("2")) >= 3
    assert lowest not in result.plan.replaced("2")
    routed = 3 * 12 * EXPERT  # of the layers that may be touched
    assert stats.model.nbytes - result.expected_bytes >= 0.3 * routed


# --- groups ---


def slow_groups(logits: np.ndarray, G: np.ndarray, ids: list[int], bases: int) -> list[list[int]]:
    """METHODS 1.4, steps 1 and 2."""
    dominants = sorted(ids, key=lambda i: (-G[i], i))[:bases]
    groups = {d: [d] for d in dominants}
    for i in sorted(set(ids) - set(dominants)):
        alike = [sum(cosine(block[:, i], block[:, d]) for block in logits) / len(logits) for d in dominants]
        groups[dominants[int(np.argmax(alike))]].append(i)
    return list(groups.values())


def slow_means(series: np.ndarray, ids: list[int], centres: list[int]) -> list[list[int]]:
    """k-means in the space of the series `[T, E]` itself."""
    points = {i: series[:, i] for i in ids}
    means = [points[i] for i in centres]
    for _ in range(200):
        nearest = {i: int(np.argmin([((points[i] - mean) ** 2).sum() for mean in means])) for i in ids}
        clusters = [[i for i in ids if nearest[i] == c] for c in range(len(means))]
        means = [np.mean([points[i] for i in members], axis=0) for members in clusters]
    return clusters


@pytest.mark.parametrize("grouping", ["dominants", "kmeans"])
@pytest.mark.parametrize("bases", [1, 2, 3])
def test_groups_are_those_of_the_slow_loops(grouping: str, bases: int) -> None:
    stats, logits = toy(experts=16)
    result, differ = planned(stats, ratio=0.2, bases=bases, grouping=grouping), False
    for key, kinds in result.plan.layers.items():
        G, ids = np.asarray(stats.layers[key].gate_sum), sorted(result.plan.replaced(key))
        want = slow_groups(logits[key], G, ids, bases)
        if grouping == "kmeans":
            plain = want
            want = slow_means(logits[key].reshape(-1, 16), ids, [x[0] for x in want])
            want = [sorted(x, key=lambda i: (-G[i], i)) for x in want]
            differ |= {frozenset(x) for x in want} != {frozenset(x) for x in plain}
        assert kinds["shared_base"] == tuple(sorted((first, *sorted(others)) for first, *others in want))
        for first, *others in kinds["shared_base"]:
            assert all(G[first] >= G[i] for i in others)
    assert len(result.plan.layers) == 4
    assert differ == (grouping == "kmeans" and bases > 1)
    assert result.plan.how == {"shared_base": {"rank": RANK, "seed": 0}}


def test_the_baselines_have_one_group() -> None:
    stats, _ = toy()
    for method, how in (("replace_shared", {"seed": 7}), ("replace_adapters", {"base": False})):
        plan = planned(stats, method, ratio=0.2, seed=7).plan
        assert plan.how == {"shared_base": {"rank": RANK} | how}
        assert plan.layers
        for key, kinds in plan.layers.items():
            (only,) = kinds["shared_base"]
            assert stats.layers[key].gate_sum[only[0]] == max(stats.layers[key].gate_sum[list(only)])
    assert chosen(planned(stats, "replace_shared", ratio=0.2).plan) == chosen(planned(stats, ratio=0.2, bases=1).plan)


def test_a_residual_start_changes_what_experts_become_alone() -> None:
    stats, _ = toy()
    for method in ("lightmoe", "replace_shared"):
        near, far = (planned(stats, method, ratio=0.2, start=start).plan for start in ("residual", "zero"))
        assert near.how == {"shared_base": {"rank": RANK, "start": "residual"}}
        assert near.layers == far.layers
    with pytest.raises(PlanError, match="start of shared_base is zero or residual, not 'near'"):
        SHARED_BASE.having({"start": "near"})
    with pytest.raises(UnderstudyError, match="--start has no effect on method replace_adapters"):
        planned(stats, "replace_adapters", ratio=0.2, start="residual")


def test_fewer_experts_than_bases_are_a_group_each() -> None:
    stats, _ = toy()
    layer = stats.layers["0"]
    for grouping in ("dominants", "kmeans"):
        groups = group(layer, np.arange(12.0), [2, 5], 3, grouping)
        assert sorted(groups) == [[2], [5]]


def test_no_cluster_is_lost() -> None:
    same = np.ones((6, 6))  # six equal vectors
    groups = clustered(same, [0, 2, 3, 5], [3, 0, 5])
    assert sorted(i for members in groups for i in members) == [0, 2, 3, 5]
    assert len(groups) == 3
    assert all(groups)


# --- the paper's model ---


class OnMeta(Weights):
    """Weights of a model that was built from its config alone, in bfloat16."""

    fingerprint = "meta"

    def __init__(self, config: OlmoeConfig) -> None:
        with torch.device("meta"):
            model = OlmoeForCausalLM(config)
        self.folder, self.config = Path("nowhere"), config.to_dict()
        self.entries = {
            name: TensorEntry(name, "none", "BF16", tuple(tensor.shape), 0, 2 * tensor.numel())
            for name, tensor in model.state_dict().items()
        }

    def fill(self, entry: TensorEntry, start: int, view: memoryview) -> None:
        raise AssertionError("planning reads no weights")


@pytest.fixture(scope="module")
def olmoe() -> ModelFacts:
    """OLMoE-1B-7B."""
    config = OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    facts = model_facts(Skeleton(OnMeta(config), config_class=OlmoeConfig), "olmoe")
    assert round(facts.params / 1e9, 2) == 6.92
    return facts


@pytest.mark.parametrize(("count", "billions", "share"), [(24, 4.86, 0.3), (31, 4.17, 0.4), (38, 3.49, 0.5)])
def test_sizes_are_the_papers(olmoe: ModelFacts, count: int, billions: float, share: float) -> None:
    counting, how = in_parameters(olmoe), {"shared_base": {"rank": 16}}
    groups = ((0,), (1,), tuple(range(2, count)))
    layers = {key: {"shared_base": groups} for key in olmoe.layers}
    assert round((counting.nbytes + added_bytes(layers, counting, how)) / 1e9, 2) == billions
    assert added_bytes(layers, olmoe, how) == 2 * added_bytes(layers, counting, how)  # bfloat16

    def trained(layer: LayerFacts) -> int:
        """Bases, low-rank parts of the replaced, and the same on the kept."""
        stand_ins, alone = SHARED_BASE.having({"rank": 16}), SHARED_BASE.having({"rank": 16, "base": False})
        return stand_ins.stored_bytes(layer, groups) + alone.stored_bytes(layer, (tuple(range(count, 64)),))

    assert round(sum(map(trained, counting.layers.values())) / 1e9, 3) == 0.453

    stats = made_up(olmoe, lightmoe_needs())
    assert stats is not None
    result = make_plan(stats, Selection(method="lightmoe", model_ratio=share))
    assert 1 - result.expected_bytes / olmoe.nbytes == pytest.approx(share, abs=1e-3)
    mean = sum(len(result.plan.replaced(key)) for key in olmoe.layers) / 16
    assert abs(mean - count) < 1  # the paper's means are rounded, and its sizes somewhat smaller


def lightmoe_needs() -> set[str]:
    return planning_needs(get_method("lightmoe"), Selection(method="lightmoe"))


# --- of a real calibration, and bad input ---


def test_a_model_is_calibrated_and_planned(tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "model"), make_text(tmp_path)
    calibrate(str(model), tmp_path / "stats", data=(str(text),), samples=8, seq_len=16)
    for method in METHODS:
        result = make_plan(tmp_path / "stats", settings(method, ratio=0.2), tmp_path / method)
        plan = load_plan(tmp_path / method)
        assert plan == result.plan
        check_plan(plan, result.facts)
        assert plan.layers
        removed = result.facts.nbytes - result.expected_bytes
        assert removed >= 0.2 * result.facts.routed_bytes
        known = {
            "scope": "mass",
            "rank": RANK,
            **({"bases": 2, "grouping": "dominants"} if method == "lightmoe" else {}),
        }
        assert known.items() <= plan.recipe.items()
        assert ("bases" in plan.recipe) == (method == "lightmoe")


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "give one of --ratio, --size and --model-ratio"),
    ({"ratio": 0.3, "model_ratio": 0.3}, "give one of --ratio, --size and --model-ratio"),
    ({"model_ratio": -0.1}, r"model ratio -0\.1 is not a share of the parameters"),
    (
        {"ratio": 0.3, "rank": 7},
        "layer 0: rank 7 is more than the 6 that matrices of 6 by 16 have; give a lower --rank",
    ),
    ({"ratio": 0.3, "rank": 5}, r"ratio 0\.3 is out of reach: 2 bases a layer and rank 5 leave 0\.000000 of the bytes"),
    ({"ratio": 0.9}, r"ratio 0\.9 is out of reach: 2 bases a .* 0\.539930 of .*; lower --ratio or --rank or --bases$"),
    ({"ratio": 0.9, "method": "replace_shared"}, r"ratio 0\.9 is out of reach: 1 base a layer .* --ratio or --rank$"),
    (
        {"ratio": 0.9, "method": "replace_adapters"},
        r"ratio 0\.9 is out of reach: no bases a layer and rank 1 leave 0\.",
    ),
    ({"size": "100B"}, r"100 B is out of reach: lightmoe brings toy from .* at ratio 0\.539931"),
    (
        {"model_ratio": 0.8},
        r"model ratio 0\.8 is out of reach: lightmoe removes 0\.\d+ of the parameters of toy at best",
    ),
    ({"ratio": 0.3, "scope": "model"}, "lightmoe does not select by model; use --scope mass or layer"),
    ({"ratio": 0.3, "kind": "merge"}, "lightmoe cannot make merge; use --kind shared_base"),
    (
        {"ratio": 0.3, "method": "replace_shared", "bases": 2},
        "--bases has no effect on method replace_shared; leave it",
    ),
    (
        {"ratio": 0.3, "method": "replace_adapters", "grouping": "kmeans"},
        "--grouping has no effect on method replace_ad",
    ),
    ({"ratio": 0.3, "scope": "layer", "alpha": 0.1}, "--alpha has no effect where .* by mass; give --scope mass, too"),
    ({"ratio": 0.3, "width_classes": 2}, "--width-classes has no effect on method lightmoe"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[str(more) for more, _ in BAD])
def test_bad_settings_get_one_clear_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UnderstudyError, match=message) as caught:
        planned(toy()[0], more.pop("method", "lightmoe"), **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"grouping": "cosine"}, {"bases": 0}, {"rank": 0}, {"alpha": -1}, {"alpha": float("nan")}]
)
def test_values_that_no_setting_takes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnderstudyError, match=f"^{next(iter(options))}: "):
        plan(toy()[0], method="lightmoe", ratio=0.3, **options)


def test_the_best_that_is_named_can_be_had() -> None:
    stats, _ = toy()
    for name in ("ratio", "model_ratio"):
        with pytest.raises(PlanError, match="out of reach") as caught:
            planned(stats, **{name: 0.9})
        best = float(re.search(r"(?:leave|removes) ([0-9.]+) of", str(caught.value))[1])
        assert planned(stats, **{name: best}).plan.layers
        with pytest.raises(PlanError, match="out of reach"):
            planned(stats, **{name: best + 2e-6})


def test_statistics_without_logits_say_what_is_missing() -> None:
    stats, _ = toy()
    for name, method in (("logit_cos_sum", "lightmoe"), ("logit_norm_sum", "replace_shared")):
        blind = replace(stats, layers={key: replace(x, **{name: None}) for key, x in stats.layers.items()})
        with pytest.raises(StatsError, match=f"method {method} needs {name}, which the statistics of layer 0 lack"):
            planned(blind, method, ratio=0.2)
    assert planned(blind, "replace_shared", ratio=0.2, alpha=0.0).plan.layers
