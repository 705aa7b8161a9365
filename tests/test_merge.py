"""Merging: groups against slow loops that follow METHODS, averages against loops, permuted copies, and the kind."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import understudy
import zoo
from routes import Routes, draw_routes, facts_of, norm, sums_of
from small import model_folder, text_file
from understudy.channels import channel_width, neurons, rest, set_neurons, set_rest
from understudy.checkpoint import Checkpoint
from understudy.entries import ids_of
from understudy.errors import PlanError, StatsError
from understudy.experts import copied, install
from understudy.grouping import linked
from understudy.kinds import check_plan, expected_bytes, get_kind
from understudy.kinds.merge import MERGE
from understudy.merging import matching, merged, run_merged
from understudy.methods import Choice, Method, Problem, get_method
from understudy.methods import ream as ream_file
from understudy.moe import find_moe_layers
from understudy.plans import Plan, PlanModel, load_plan
from understudy.recipe import Selection
from understudy.scores import get_score, score_layers
from understudy.stages.select import make_plan
from understudy.standins import MERGED, StandIn
from understudy.stats import ExpertStats, Stats

METHODS = ("mc_smoe", "hc_smoe", "group_merge", "ream")
FAMILIES = ["olmoe", "gpt_oss", "mixtral", "nemotron_h", "qwen3_vl_moe"]  # biased and interleaved, ungated, transposed
Partition = set[tuple[int, ...]]


class Seen:
    """What one layer saw: its routes, the router's logits [T, E] and what every expert answers every token."""

    def __init__(self, seed: int, experts: int = 8, tokens: int = 40, hidden: int = 6, silent: tuple[int, ...] = ()):
        rng = np.random.default_rng(seed)
        self.routes: Routes = draw_routes(tokens, experts, 2, seed, silent)
        mixed = rng.normal(size=(experts // 2 + 1, experts))  # experts that are alike to different degrees
        self.logits = rng.normal(size=(tokens, len(mixed))) @ mixed
        answers = np.einsum("tbh,be->teh", rng.normal(size=(tokens, len(mixed), hidden)), mixed)
        self.answers = answers + rng.normal(size=(experts, hidden))  # [T, E, H]

    @property
    def experts(self) -> int:
        return self.routes.experts

    def sums(self) -> ExpertStats:
        """The sums as `sums.py` defines them, by loops over tokens."""
        T, E, _ = self.answers.shape
        gram, cosine, hsic = np.zeros((E, E)), np.zeros((E, E)), np.zeros((E, E))
        centred = self.answers - self.answers.mean(0)
        for i, j in itertools.product(range(E), repeat=2):
            for t in range(T):
                gram[i, j] += self.logits[t, i] * self.logits[t, j]
                cosine[i, j] += slow_cosine(self.answers[t, i], self.answers[t, j])
            hsic[i, j] = float(((centred[:, i].T @ centred[:, j]) ** 2).sum())
        more = {"logit_gram": gram, "dense_tokens": np.float64(T), "dense_sum": self.answers.sum(0)}
        more |= {"dense_cos_sum": cosine, "dense_hsic": hsic, "dense_activations": np.ones((E, 3, 2), np.float32)}
        return replace(sums_of(self.routes), **more)

    def count(self, expert: int) -> int:
        return len(self.routes.of(expert))

    def frequency(self, expert: int) -> float:
        return self.count(expert) / len(self.routes.index)

    def saliency(self, expert: int) -> float:
        found = self.routes.of(expert)
        return sum(g * norm(y) for g, y in found) / len(found) if found else 0.0


def slow_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True))) / (norm(a) * norm(b))


def stats_of_seen(layers: dict[str, Seen], **facts: Any) -> Stats:
    made = facts_of({key: seen.routes for key, seen in layers.items()}, **facts)
    return Stats(made, {"sources": ["synthetic"]}, {key: seen.sums() for key, seen in layers.items()})


def three_layers(silent: tuple[int, ...] = ()) -> dict[str, Seen]:
    return {key: Seen(int(key), silent=silent) for key in ("1", "2", "10")}


def parted(entry: Any, experts: int) -> Partition:
    """The groups of a layer, those of a single expert included, ids ascending."""
    alone = {(i,) for i in range(experts)} - {(i,) for i in ids_of(entry)}
    return {tuple(sorted(group)) for group in entry} | alone


def planned(layers: dict[str, Seen], method: str, ratio: float) -> dict[str, Partition]:
    plan = make_plan(stats_of_seen(layers), Selection(method=method, ratio=ratio)).plan
    return {key: parted(plan.layers.get(key, {}).get("merge", ()), seen.experts) for key, seen in layers.items()}


# --- slow references, from the words of METHODS ---


def slow_linkage(distance: Any, experts: int, groups: int) -> Partition:
    """Join the two clusters whose members are nearest on average, again and again."""
    clusters = [(i,) for i in range(experts)]
    while len(clusters) > groups:
        best, pair = math.inf, (clusters[0], clusters[1])
        for a, b in itertools.combinations(clusters, 2):
            between = sum(distance(i, j) for i in a for j in b) / (len(a) * len(b))
            if between < best:
                best, pair = between, (a, b)
        clusters = [c for c in clusters if c not in pair] + [tuple(sorted(pair[0] + pair[1]))]
    return set(clusters)


def slow_hc_smoe(layers: dict[str, Seen], ratio: float) -> dict[str, Partition]:
    """Average linkage on the Euclidean distance of mean outputs over all tokens."""
    found = {}
    for key, seen in layers.items():
        T, E, _ = seen.answers.shape
        means = [sum(seen.answers[t, i] for t in range(T)) / T for i in range(E)]
        found[key] = slow_linkage(lambda i, j, m=means: norm(m[i] - m[j]), E, E - round(ratio * E))
    return found


def slow_group_merge(layers: dict[str, Seen], ratio: float) -> dict[str, Partition]:
    """Average linkage on 1 - linear CKA of the outputs of all tokens."""
    found = {}
    for key, seen in layers.items():
        centred = [seen.answers[:, i] - seen.answers[:, i].mean(0) for i in range(seen.experts)]

        def apart(i: int, j: int, y: list[np.ndarray] = centred) -> float:
            kernels = [np.linalg.norm(y[a].T @ y[b], "fro") ** 2 for a, b in ((i, j), (i, i), (j, j))]
            return 1 - float(kernels[0] / math.sqrt(kernels[1] * kernels[2]))

        found[key] = slow_linkage(apart, seen.experts, seen.experts - round(ratio * seen.experts))
    return found


def slow_mc_smoe(layers: dict[str, Seen], ratio: float) -> dict[str, Partition]:
    """Global quota of dominants by frequency, one in each layer at least; the others by the cosine of logits."""
    total = sum(seen.experts for seen in layers.values())
    dominant = {key: [max(range(s.experts), key=lambda i, s=s: (s.frequency(i), -i))] for key, s in layers.items()}
    for _ in range(total - round(ratio * total) - len(layers)):
        best, where = -1.0, ("", -1)
        for key, seen in layers.items():
            for i in range(seen.experts):
                if i not in dominant[key] and seen.frequency(i) > best:
                    best, where = seen.frequency(i), (key, i)
        dominant[where[0]].append(where[1])
    found = {}
    for key, seen in layers.items():
        groups = {i: [i] for i in dominant[key]}
        for i in sorted(set(range(seen.experts)) - set(groups)):
            nearest = max(dominant[key], key=lambda d, i=i, s=seen: slow_cosine(s.logits[:, d], s.logits[:, i]))
            groups[nearest].append(i)
        found[key] = {tuple(sorted(group)) for group in groups.values()}
    return found


def slow_ream(layers: dict[str, Seen], ratio: float, absorbs: int = 16) -> dict[str, Partition]:
    """Centroids by REAP; the most salient first, each takes its nearest free ones, up to C; then leftovers theirs."""
    found = {}
    for key, seen in layers.items():
        E = seen.experts

        def alike(i: int, j: int, s: Seen = seen) -> float:
            outputs = sum(slow_cosine(s.answers[t, i], s.answers[t, j]) for t in range(len(s.answers)))
            return (slow_cosine(s.logits[:, i], s.logits[:, j]) + outputs / len(s.answers)) / 2

        order = sorted(range(E), key=lambda i, s=seen: (-s.saliency(i), i))
        centroids, free = order[: E - round(ratio * E)], order[E - round(ratio * E) :]
        groups = {c: [c] for c in centroids}
        for c in centroids:
            for _ in range(min(absorbs, len(free))):
                nearest = max(free, key=lambda i, c=c: alike(c, i))
                free.remove(nearest)
                groups[c].append(nearest)
        for i in free:
            groups[max(centroids, key=lambda c, i=i: alike(c, i))].append(i)
        found[key] = {tuple(sorted(group)) for group in groups.values()}
    return found


SLOW = {"mc_smoe": slow_mc_smoe, "hc_smoe": slow_hc_smoe, "group_merge": slow_group_merge, "ream": slow_ream}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_groups_are_those_of_the_slow_reference(method: str, ratio: float) -> None:
    layers = three_layers()
    expected = SLOW[method](layers, ratio)
    assert planned(layers, method, ratio) == expected
    assert any(len(group) > 1 for groups in expected.values() for group in groups)


def test_ream_absorbs_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ream_file, "ABSORBS", 1)
    layers = three_layers()
    for ratio in (0.25, 0.625, 0.75):  # past one half some are left over
        assert planned(layers, "ream", ratio) == slow_ream(layers, ratio, absorbs=1)
    assert planned(layers, "ream", 0.25) != slow_ream(layers, 0.25)


@pytest.mark.parametrize("seed", range(4))
def test_linkage_is_agglomerative_clustering_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(11, 3))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    for groups in range(1, 12):
        got = {tuple(sorted(c)) for c in linked(distance, range(11), groups)}
        assert got == slow_linkage(lambda i, j: distance[i, j], 11, groups)


def test_linkage_gives_the_number_of_groups_also_where_all_distances_are_equal() -> None:
    same = 1 - np.eye(6)
    for groups in range(1, 7):
        found = linked(same, [0, 2, 3, 5], min(groups, 4))
        assert len(found) == min(groups, 4)
        assert sorted(i for group in found for i in group) == [0, 2, 3, 5]


# --- the methods as planning sees them ---


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return get_method(request.param)


def problem_of(method: Method, stats: Stats, **more: Any) -> Problem:
    settings = Selection(method=method.name, ratio=0.5)
    scores = score_layers(get_score(method.score), stats, settings) if method.score else None
    return Problem(stats, dict(stats.model.layers), settings, get_kind("merge"), scores, **more)


def choose(method: Method, problem: Problem, ratio: float) -> Choice:
    assert method.choose is not None
    return method.choose(problem, ratio)


def away(choice: Choice) -> dict[str, int]:
    """Experts that are no longer there, by layer."""
    return {key: sum(len(g) - 1 for g in kinds["merge"]) for key, kinds in choice.layers.items()}


def test_as_many_go_as_the_ratio_says(method: Method) -> None:
    problem = problem_of(method, stats_of_seen(three_layers()))
    for ratio in (0.1, 0.25, 0.5, 0.75, method.most(problem)):
        gone = away(choose(method, problem, ratio))
        assert sum(gone.values()) == (round(24 * ratio) if method.name == "mc_smoe" else 3 * round(8 * ratio))
        assert all(n <= 7 for n in gone.values())
        if method.name != "mc_smoe":
            assert len(set(gone.values())) == 1
    assert method.most(problem) == pytest.approx(7 / 8)
    nothing = choose(method, problem, 0)
    assert nothing.layers == {}
    assert "merges nothing; one expert" in nothing.notes[0]
    with pytest.raises(PlanError, match=r"ratio 0\.99 would leave .* \(ratio 0\.875\)"):
        choose(method, problem, 0.99)


def test_the_plan_is_what_the_kind_takes_and_comes_back_from_a_file(method: Method, tmp_path: Path) -> None:
    stats = stats_of_seen(three_layers())
    result = make_plan(stats, Selection(method=method.name, ratio=0.5), tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == result.plan
    assert set(result.plan.how) == {"merge"}
    assert all(set(kinds) == {"merge"} for kinds in result.plan.layers.values())
    assert result.expected_bytes == stats.model.nbytes - 12 * 1000
    assert (result.scores is None) == (method.score is None)
    for kinds in result.plan.layers.values():
        MERGE.stand_ins(kinds["merge"], result.plan.how["merge"])  # refuses unknown settings


def test_a_size_is_met_as_closely_as_whole_experts_allow(method: Method) -> None:
    stats = stats_of_seen(three_layers())
    size = stats.model.nbytes - 9 * 1000
    result = make_plan(stats, Selection(method=method.name, size=str(size)))
    assert result.expected_bytes == size  # nine experts: three in each layer, or nine of the model
    with pytest.raises(PlanError, match="out of reach"):
        make_plan(stats, Selection(method=method.name, size="1000"))


def test_the_dominant_is_listed_first(method: Method) -> None:
    layers = three_layers()
    entries = choose(method, problem_of(method, stats_of_seen(layers)), 0.5).layers
    for key, kinds in entries.items():
        value = layers[key].saliency if method.name == "ream" else layers[key].count
        for first, *others in kinds["merge"]:
            assert all(value(first) >= value(i) for i in others)


def test_protected_experts_stay_alone_and_the_others_make_up_for_them(method: Method) -> None:
    stats = stats_of_seen(three_layers())
    stay = {"1": frozenset({0, 5}), "10": frozenset(range(8))} if method.name == "mc_smoe" else {"1": frozenset({0, 5})}
    problem = problem_of(method, stats, protected=stay)
    choice = choose(method, problem, 0.5)
    assert not {0, 5} & set(ids_of(choice.layers["1"]["merge"]))
    assert sum(away(choice).values()) == 12
    assert "10" not in choice.layers or method.name != "mc_smoe"
    assert sum(away(choose(method, problem, method.most(problem))).values()) in (5 + 7, 3 * 5)
    with pytest.raises(PlanError, match="would leave"):
        choose(method, problem, 0.8)


def test_untouched_layers_stay_and_the_ratio_is_of_the_others(method: Method) -> None:
    problem = problem_of(method, stats_of_seen(three_layers()))
    fewer = replace(problem, layers={key: problem.layers[key] for key in ("1", "10")})
    choice = choose(method, fewer, 0.5)
    assert set(choice.layers) == {"1", "10"}
    assert sum(away(choice).values()) == 8


def test_experts_that_saw_nothing_are_counted(method: Method) -> None:
    choice = choose(method, problem_of(method, stats_of_seen(three_layers(silent=(2, 6)))), 0.5)
    merged_ids = [len({2, 6} & set(ids_of(kinds["merge"]))) for kinds in choice.layers.values()]
    said = f"6 of 24 experts saw no token in calibration; {sum(merged_ids)} of them are merged with others"
    assert choice.notes == (f"{said}, {6 - sum(merged_ids)} stay as they are",)


def test_statistics_that_lack_what_is_needed_are_refused(method: Method) -> None:
    stats = stats_of_seen(three_layers())
    bare = replace(stats, layers={key: sums_of(seen.routes) for key, seen in three_layers().items()})
    group = "calibrate again" if method.name == "mc_smoe" else "--collect dense|calibrate again"
    with pytest.raises(StatsError, match=group):
        make_plan(bare, Selection(method=method.name, ratio=0.5))


def test_logits_of_an_expert_that_are_all_zero_do_no_harm() -> None:
    stats = stats_of_seen({"0": Seen(0)})
    gram = stats.layers["0"].logit_gram.copy()
    gram[3], gram[:, 3] = 0, 0
    broken = replace(stats, layers={"0": replace(stats.layers["0"], logit_gram=gram)})
    for name in ("mc_smoe", "ream"):
        assert make_plan(broken, Selection(method=name, ratio=0.5)).plan.layers


# --- averages ---


def experts_of(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    model = zoo.tiny_model(model_type, **changes).to(dtype)
    experts = model.get_submodule(find_moe_layers(model)[-1].name)
    for weight in experts.parameters():
        weight.requires_grad_(False)
    return experts


def hidden_for(experts: Any, count: int = 20) -> Tensor:
    down = experts.down_proj
    size = down.shape[2] if getattr(experts, "is_transposed", False) else down.shape[1]
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(down.dtype)


def answer(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    index = torch.full((len(hidden), 1), expert)
    with torch.no_grad():
        return experts(hidden, index, torch.ones(len(hidden), 1, dtype=hidden.dtype))


def sums_with(count: list[float], gate_sum: list[float], gated_norm_sum: list[float]) -> ExpertStats:
    base = sums_of(draw_routes(experts=len(count)))
    return replace(base, count=np.array(count), gate_sum=np.array(gate_sum), gated_norm_sum=np.array(gated_norm_sum))


@pytest.mark.parametrize("align", ["weights", "directions", "activations"])
def test_the_assignment_is_the_best_of_all_permutations(align: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        lead, own = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
        acts = torch.randn(2, 5, 3, generator=generator)
        best, found = -math.inf, ()
        for order in itertools.permutations(range(5)):
            value = 0.0
            for i, j in enumerate(order):
                a, b = lead[i].numpy(), own[j].numpy()
                value += float(a @ b) if align == "weights" else -norm(a / norm(a) - b / norm(b))
                if align == "activations":
                    a, b = acts[0, i].double().numpy(), acts[1, j].double().numpy()
                    value -= norm(a / norm(a) - b / norm(b))
            if value > best:
                best, found = value, order
        assert tuple(matching(lead, own, align, acts).tolist()) == found
    assert matching(lead, own, "none").tolist() == list(range(5))


def test_the_two_ways_to_align_differ_where_neurons_differ_in_size() -> None:
    lead = torch.tensor([[10.0, 1.0], [1.0, 0.0]])
    own = torch.tensor([[3.0, 0.0], [1.0, 0.1]])
    assert matching(lead, own, "weights").tolist() == [0, 1]
    assert matching(lead, own, "directions").tolist() == [1, 0]


def activations_by_hand(experts: Any, hidden: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Activations [len(ids), I, N] of olmoe's experts on hidden [N, H]."""
    found = []
    for i in ids:
        gate, up = (experts.gate_up_proj[i] @ hidden.T).chunk(2)
        found.append(torch.nn.functional.silu(gate) * up)
    return torch.stack(found)


def noisy_copy(experts: Any, noise: float) -> list[int]:
    """Make expert 5 a permuted copy of expert 2, with noise as large as `noise` times its weights; give the order."""
    generator = torch.Generator().manual_seed(3)
    own = neurons(experts, 2)
    order = torch.randperm(len(own), generator=generator)
    noises = noise * own.std() * torch.randn(own.shape, generator=generator, dtype=own.dtype)
    set_neurons(experts, 5, (own + noises)[order])
    return order.argsort().tolist()


def test_a_noisy_permuted_copy_is_lined_up_by_activations() -> None:
    experts = experts_of("olmoe")
    order = noisy_copy(experts, 0.5)
    acts = activations_by_hand(experts, hidden_for(experts, 64), (2, 5))
    assert matching(neurons(experts, 2), neurons(experts, 5), "activations", acts).tolist() == order
    random = torch.randn(2, channel_width(experts), 7, generator=torch.Generator().manual_seed(0))
    twins = torch.stack((random[0], random[0][order].flip(0)))  # activations that say otherwise, as loud as weights
    found = matching(neurons(experts, 2), neurons(experts, 5), "activations", twins).tolist()
    assert found != order, "both count"


def test_activations_tell_apart_neurons_whose_weights_do_not() -> None:
    lead = own = torch.ones(3, 4)
    acts = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [[0.0, 9.0], [0.3, 0.3], [0.1, 0.0]]])
    assert matching(lead, own, "activations", acts).tolist() == [2, 0, 1]
    silent = acts * torch.tensor([1.0, 0.0, 1.0])[:, None]  # a neuron that never fires has no direction
    assert sorted(matching(lead, own, "activations", silent).tolist()) == [0, 1, 2]


def test_the_kind_gives_each_expert_its_own_activations() -> None:
    source = experts_of("olmoe", torch.float32)
    noisy_copy(source, 0.5)
    hidden, how = hidden_for(source, 30), {"weights": "uniform", "align": "activations"}
    acts = activations_by_hand(source, hidden, tuple(range(8)))
    stats = replace(sums_with([1] * 8, [1] * 8, [1] * 8), dense_activations=acts.numpy())
    entry = ((5, 0, 2), (1, 7))
    made = copied(source)
    install(made, MERGE.stand_ins(entry, how), 8)
    with torch.no_grad():
        MERGE.fill(made, source, entry, how, stats)
    for group in entry:
        lead, expected = neurons(source, group[0]), 0
        for i in group:
            order = matching(lead, neurons(source, i), "activations", acts[[group[0], i]])
            expected = expected + neurons(source, i)[order] / len(group)
        torch.testing.assert_close(neurons(made, made.rows[group[0]]), expected)
        torch.testing.assert_close(
            MERGE.reference(source, hidden, group[1], entry, how, stats), answer(made, group[1], hidden)
        )
        orders = [
            matching(lead, neurons(source, group[1]), align, acts[list(group[:2])])
            for align in ("directions", "activations")
        ]
        assert not torch.equal(*orders)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("align", ["none", "weights", "directions"])
def test_the_average_is_that_of_a_loop(model_type: str, align: str) -> None:
    experts = experts_of(model_type)
    group, weights = (3, 0, 6), (5, 1, 2)
    got, got_rest = merged(experts, group, [w / 8 for w in weights], align)
    lead = neurons(experts, 3)
    orders = [matching(lead, neurons(experts, i), align).tolist() for i in group]
    assert (orders[1] == list(range(len(lead)))) == (align == "none")
    for k in range(len(lead)):
        expected = torch.zeros_like(lead[k])
        for i, weight, order in zip(group, weights, orders, strict=True):
            expected = expected + weight / 8 * neurons(experts, i)[order[k]]
        torch.testing.assert_close(got[k], expected, rtol=1e-12, atol=1e-12)
    expected_rest = (5 * rest(experts, 3) + rest(experts, 0) + 2 * rest(experts, 6)) / 8
    torch.testing.assert_close(got_rest, expected_rest, rtol=1e-12, atol=1e-12)
    assert (len(got_rest) > 0) == (model_type == "gpt_oss")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("align", ["weights", "directions"])
def test_an_expert_and_its_own_permutation_merge_into_the_same_function(model_type: str, align: str) -> None:
    experts = experts_of(model_type, torch.float32)
    hidden = hidden_for(experts)
    before = answer(experts, 2, hidden)
    for seed, copy in enumerate((0, 5)):
        order = torch.randperm(channel_width(experts), generator=torch.Generator().manual_seed(seed))
        set_neurons(experts, copy, neurons(experts, 2)[order])
        set_rest(experts, copy, rest(experts, 2))
    group, shares = (2, 0, 5), (0.25, 0.6, 0.15)
    scale = float(before.abs().max())
    aligned = run_merged(experts, group, shares, align, hidden)
    assert float((aligned - before).abs().max()) < 1e-5 * scale
    blurred = run_merged(experts, group, shares, "none", hidden)
    assert float((blurred - before).abs().max()) > 0.05 * scale


def test_low_precision_is_averaged_in_float32_and_leaves_the_module_alone() -> None:
    experts = experts_of("olmoe", torch.bfloat16)
    before = {name: weight.clone() for name, weight in experts.named_parameters()}
    got, _ = merged(experts, (0, 1, 2), [1 / 3] * 3, "none")
    assert got.dtype == torch.float32
    expected = sum(neurons(experts, i).double() for i in range(3)) / 3
    assert float((got - expected).abs().max()) < 1e-6
    assert run_merged(experts, (0, 1), (0.5, 0.5), "weights", hidden_for(experts)).dtype == torch.float32
    assert all(torch.equal(weight, before[name]) for name, weight in experts.named_parameters())


# --- the kind ---


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("weights", ["count", "gate_sum", "saliency", "uniform"])
def test_a_filled_module_answers_as_the_reference_with_gates_added(model_type: str, weights: str) -> None:
    source = experts_of(model_type, torch.float32)
    stats = sums_with([9, 4, 0, 7, 1, 2, 0, 3], [3, 1, 0, 5, 0.5, 1, 0, 2], [8, 2, 0, 6, 3, 1, 0, 9])
    by_hand = {
        "count": {3: 7, 0: 9, 6: 0},
        "gate_sum": {3: 5, 0: 3, 6: 0},
        "saliency": {3: 6 / 7, 0: 8 / 9, 6: 0},
        "uniform": {3: 1, 0: 1, 6: 1},
    }[weights]
    entry, how = ((3, 0, 6), (2, 5)), {"weights": weights, "align": "weights"}
    made = copied(source)
    install(made, MERGE.stand_ins(entry, how), 8)
    with torch.no_grad():
        MERGE.fill(made, source, entry, how, stats)
    hidden = hidden_for(source, 30)
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(30, 8, generator=generator).argsort(1)[:, :4]  # many tokens have two of a group
    gates = torch.rand(30, 4, generator=generator)
    with torch.no_grad():
        got = made(hidden, index, gates)
    share = sum(by_hand.values())
    average, average_rest = merged(source, (3, 0, 6), [by_hand[i] / share for i in (3, 0, 6)], "weights")
    torch.testing.assert_close(neurons(made, made.rows[6]), average)
    torch.testing.assert_close(rest(made, made.rows[6]), average_rest)
    expected = torch.zeros_like(got)
    for t, k in itertools.product(range(30), range(4)):
        i = int(index[t, k])
        if i in ids_of(entry):
            own = MERGE.reference(source, hidden[t : t + 1], i, entry, how, stats)
        else:
            own = answer(source, i, hidden[t : t + 1])
        expected[t] += gates[t, k] * own[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_group_that_nobody_chose_is_averaged_uniformly() -> None:
    source = experts_of("olmoe")
    stats = sums_with([1, 1, 0, 1, 1, 1, 0, 1], [1.0] * 8, [1.0] * 8)
    made = copied(source)
    install(made, MERGE.stand_ins(((2, 6),), {}), 8)
    with torch.no_grad():
        MERGE.fill(made, source, ((2, 6),), {"align": "none"}, stats)
    torch.testing.assert_close(neurons(made, made.rows[2]), (neurons(source, 2) + neurons(source, 6)) / 2)


def test_every_member_is_declared_to_share_the_dominants_weights() -> None:
    assert MERGE.stand_ins(((5, 0, 2), (1, 3)), {}) == {
        5: StandIn(MERGED, into=5),
        0: StandIn(MERGED, into=5),
        2: StandIn(MERGED, into=5),
        1: StandIn(MERGED, into=1),
        3: StandIn(MERGED, into=1),
    }


def plan_of(groups: Any, **more: Any) -> tuple[Plan, Any]:
    facts = facts_of({"0": draw_routes()})
    return Plan(method="edited", model=PlanModel.of(facts), layers={"0": {"merge": groups}}, **more), facts


def test_a_group_stores_one_expert_and_frees_the_others() -> None:
    plan, facts = plan_of([[5, 0, 2], [1, 3]])
    check_plan(plan, facts)
    assert expected_bytes(plan, facts) == facts.nbytes - 3 * 1000
    everything, _ = plan_of([list(range(8))])
    check_plan(everything, facts)
    assert expected_bytes(everything, facts) == facts.nbytes - 7 * 1000


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[3], [1, 2]], r"layer 0: the group \[3\] holds a single expert, and merge needs two or more"),
        ([3, 4], r"layer 0: merge takes groups of ids, \[\[3, 17\], \[5, 9\]\], not expert ids"),
        ({3: 4}, "layer 0: merge takes groups of ids"),
        ([[3, 4], [4, 5]], "layer 0: expert 4 is named twice under merge"),
    ],
)
def test_what_is_no_merge_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(*plan_of(groups))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(PlanError, match="merge has no setting 'weight'; it has weights and align"):
        MERGE.stand_ins(((0, 1),), {"weight": "count"})
    with pytest.raises(
        PlanError, match="align of merge is one of none, weights, directions, activations, not 'neurons'"
    ):
        MERGE.stand_ins(((0, 1),), {"align": "neurons"})


def test_what_the_kind_needs_depends_on_its_settings() -> None:
    assert MERGE.needs == ("count",)
    assert set(MERGE.having({"weights": "saliency"}).needs) == {"count", "gated_norm_sum"}
    assert MERGE.having({"weights": "uniform", "align": "none"}).needs == ()
    assert MERGE.having({"weights": "uniform", "align": "activations"}).needs == ("dense_activations",)
    source = experts_of("olmoe", torch.float32)
    hidden = hidden_for(source)
    got = MERGE.reference(source, hidden, 6, ((2, 6),), {"weights": "uniform", "align": "none"}, None)
    torch.testing.assert_close(got, run_merged(source, (2, 6), (0.5, 0.5), "none", hidden))


def test_a_layer_whose_neurons_cannot_be_told_apart_is_refused() -> None:
    facts = facts_of({"0": draw_routes()}, width=24, channel_bytes=0)
    plan = Plan(method="edited", model=PlanModel.of(facts), layers={"0": {"merge": [[0, 1]]}})
    with pytest.raises(PlanError, match="layer 0: merge is not possible: nothing tells which weights"):
        check_plan(plan, facts)


# --- end to end ---


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("method", ["hc_smoe", "ream"])
def test_a_merged_folder_is_the_original_with_the_average_in_every_place(
    model_type: str, method: str, tmp_path: Path
) -> None:
    source, text = model_folder(tmp_path / "model", model_type), text_file(tmp_path / "text.txt")
    reading = {"data": (text,), "samples": 6, "seq_len": 16}
    stats = understudy.calibrate(source, tmp_path / "stats", collect=("dense",), dense_tokens=64, **reading)
    result = understudy.plan(tmp_path / "stats", method=method, ratio=0.5)
    understudy.apply(source, result.plan, tmp_path / "merged", stats=tmp_path / "stats")
    assert Checkpoint(tmp_path / "merged").nbytes == result.expected_bytes
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    kind = MERGE.having(result.plan.how["merge"])
    with torch.no_grad():
        for layer in find_moe_layers(original):
            experts = original.get_submodule(layer.name)
            sums = stats.layers[layer.key]
            assert sums.dense_activations.dtype == np.float32, "not widened where it is read"
            for group in result.plan.layers[layer.key]["merge"]:
                acts = torch.from_numpy(sums.dense_activations[list(group)])
                average, average_rest = merged(experts, group, kind._shares(group, sums), kind.align, acts)
                for i in group:
                    set_neurons(experts, i, average)
                    set_rest(experts, i, average_rest)
        inputs = zoo.sample_inputs(original)
        expected, got = original(**inputs).logits, merged_model(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
