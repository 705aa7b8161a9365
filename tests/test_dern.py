"""DERN: neurons of dropped experts against slow loops, copies that change nothing, and folders that load anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import small
import zoo
from contract import calibrated, close, ids_of, load, one_expert, plan_of, tensors_of, walked, without_understudy
from understudy.channels import channel_views, channel_width, neurons, set_neurons, set_rest
from understudy.errors import PlanError, StatsError
from understudy.kinds import check_plan, expected_bytes, get_kind
from understudy.kinds.regroup import REGROUP
from understudy.moe import find_moe_layers
from understudy.plans import Plan
from understudy.recipe import Selection
from understudy.regrouping import clustered, destinations, regrouped
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.stages.select import make_plan
from understudy.virtual import planned

FAMILIES = ["olmoe", "mixtral", "gpt_oss"]
IDS = ids_of()
DROPPED, KEPT = (1, 4, 6), (0, 2, 3, 5, 7)


def related(model_type: str = "olmoe", seed: int = 0) -> Any:
    """A tiny model whose experts have neurons in common: each is another's, turned by some angle, or its own."""
    model = zoo.tiny_model(model_type)
    rng = torch.Generator().manual_seed(seed)
    for layer in find_moe_layers(model):
        experts: Any = model.get_submodule(layer.name)
        first = neurons(experts, 0).clone()
        scale = first.norm(dim=1).mean() / first.shape[1] ** 0.5
        with torch.no_grad():
            for row in range(zoo.EXPERTS):
                noise = torch.randn(first.shape, generator=rng) * scale
                angle = torch.rand(len(first), 1, generator=rng) * 1.4
                order = torch.randperm(len(first), generator=rng)
                set_neurons(experts, row, (angle.cos() * first + angle.sin() * noise)[order])
    return model


def experts_of(model: Any) -> Any:
    return model.get_submodule(find_moe_layers(model)[0].name)


# --- the slow way: one neuron after the other, in float64 ---


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def slow_regrouped(experts: Any, importance: list[float], threshold: float, rounds: int) -> dict[int, np.ndarray]:
    """New neurons of every kept expert that receives some, by expert."""
    sizes = {role: view.shape[2] for role, view in channel_views(experts).items()}
    gate = sizes.get("gate", 0)
    vectors = gate + sizes["up"] + sizes["down"]
    own = {row: neurons(experts, row).double().numpy() for row in range(zoo.EXPERTS)}
    pools = {row: [(n, importance[row]) for n in own[row]] for row in KEPT}
    for source in DROPPED:
        for neuron in own[source]:
            best, where = threshold, None
            for row in KEPT:
                for other in own[row]:
                    if (near := cosine(neuron[gate:vectors], other[gate:vectors])) > best:
                        best, where = near, row
            if where is not None:
                pools[where].append((neuron, importance[source]))
    made = {}
    for row, pool in pools.items():
        if len(pool) > len(own[row]):
            made[row] = slow_clusters(pool, gate or sizes["up"], vectors, len(own[row]), rounds)
    return made


def slow_clusters(pool: list[Any], first: int, vectors: int, count: int, rounds: int) -> np.ndarray:
    largest = sorted(range(len(pool)), key=lambda p: -np.linalg.norm(pool[p][0][:first]))[:count]
    centres = [pool[p][0][:vectors] for p in sorted(largest)]
    members: list[list[int]] = []
    for _ in range(rounds):
        members = [[] for _ in range(count)]
        for p, (neuron, _) in enumerate(pool):
            members[int(np.argmax([cosine(neuron[:vectors], c) for c in centres]))].append(p)
        assert all(members)
        centres = []
        for cluster in members:
            units = [pool[p][1] * pool[p][0][:vectors] / np.linalg.norm(pool[p][0][:vectors]) for p in cluster]
            centres.append(np.sum(units, axis=0))
    made = []
    for cluster, centre in zip(members, centres, strict=True):
        total = sum(pool[p][1] for p in cluster)
        norm = sum(pool[p][1] * np.linalg.norm(pool[p][0][:vectors]) for p in cluster) / total
        biases = np.sum([pool[p][1] * pool[p][0][vectors:] for p in cluster], axis=0) / total
        made.append(np.concatenate((norm * centre / np.linalg.norm(centre), biases)))
    return np.array(made)


IMPORTANCE = [0.5, 0.1, 0.9, 0.4, 0.2, 0.6, 0.15, 0.8]


@pytest.mark.parametrize("model_type", [*FAMILIES, "nemotron_h"])
def test_neurons_go_where_slow_loops_send_them(model_type: str) -> None:
    experts = experts_of(related(model_type))
    before = {row: neurons(experts, row).clone() for row in range(zoo.EXPERTS)}
    made = regrouped(experts, DROPPED, IMPORTANCE, 0.6, 3)
    expected = slow_regrouped(experts, IMPORTANCE, 0.6, 3)
    received = sum(len(x) for found in destinations(experts, DROPPED, 0.6).values() for _, x, _ in found)
    assert 0 < received < len(DROPPED) * channel_width(experts), "some are sent, some are lost"
    assert expected
    for row in range(zoo.EXPERTS):
        assert torch.equal(neurons(experts, row), before[row]), "the original was changed"
        if row in expected:
            np.testing.assert_allclose(neurons(made, row).numpy(), expected[row], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(neurons(made, row), before[row])


def test_the_gate_row_does_not_tell_where_a_neuron_goes() -> None:
    experts = experts_of(zoo.tiny_model("olmoe"))
    gate = channel_views(experts)["gate"].shape[2]
    copy = neurons(experts, 3).clone()
    copy[:, :gate] *= -1
    set_neurons(experts, 1, copy)
    sent = destinations(experts, [1], 0.6)
    assert list(sent) == [3]
    ((source, places, nearest),) = sent[3]
    assert source == 1
    assert places.tolist() == nearest.tolist() == list(range(channel_width(experts)))
    assert regrouped(experts, [1], IMPORTANCE, 0.6, 10) is not experts
    assert destinations(experts, [1], 1.0) == {}


def test_clusters_by_hand() -> None:
    """Gate, up and down of one number each, and a bias; two clusters."""
    long, short = [3.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 4.0]  # the same direction
    other, near = [0.0, 2.0, 0.0, 5.0], [0.1, 2.0, 0.0, 7.0]
    made = clustered(torch.tensor([long, other, short]), torch.tensor([2.0, 1.0, 1.0]), 1, 3, 2, rounds=5)
    # seeds are the two largest gates, both of one direction; the empty cluster takes what is least like its centre
    torch.testing.assert_close(made, torch.tensor([[(2 * 3 + 1) / 3, 0, 0, 2], other]))
    pool = torch.tensor([long, near, other])
    heavy = clustered(pool, torch.tensor([1.0, 1e6, 1.0]), 1, 3, 2, rounds=5)
    assert heavy[0].tolist() == long
    assert heavy[1].tolist() == pytest.approx(near, rel=1e-4)
    assert torch.equal(heavy, clustered(pool, torch.tensor([1.0, 1e6, 1.0]), 1, 3, 2, rounds=50))


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_a_copy_is_absorbed(model_type: str) -> None:
    """Its neurons in any order; the kept expert answers as before, to the bit, whatever the copy weighs."""
    experts = experts_of(zoo.tiny_model(model_type))
    order = torch.randperm(channel_width(experts), generator=torch.Generator().manual_seed(0))
    set_neurons(experts, 1, neurons(experts, 5)[order])
    x = torch.randn(zoo.HIDDEN, generator=torch.Generator().manual_seed(1))
    before = one_expert(experts, x, 5)
    made = regrouped(experts, [1], IMPORTANCE, 0.6, 10)
    assert sum(len(p) for _, p, _ in destinations(experts, [1], 0.6)[5]) == channel_width(experts)
    assert torch.equal(one_expert(made, x, 5), before)
    assert torch.equal(neurons(made, 5), neurons(experts, 5))


@torch.no_grad()
def test_what_takes_in_a_copy_and_more_is_made_anew() -> None:
    """Beside exact copies, one neuron comes that is like another and longer in its gate."""
    experts = experts_of(zoo.tiny_model("olmoe"))
    own = neurons(experts, 5).clone()
    copy = own.clone()
    copy[7] = own[7] * 2
    set_neurons(experts, 1, copy)
    made = neurons(regrouped(experts, [1], [0.25] * 8, 0.6, 10), 5)
    merged = own[7] * 1.5  # the pair's one direction, its mean norm
    for neuron in (
        *own[:7],
        *own[8:],
        merged,
    ):  # the pair has two seeds at first; a neuron without one takes the second
        assert float((made - neuron).norm(dim=1).min()) < 1e-6


def test_experts_that_saw_nothing_still_count() -> None:
    experts = experts_of(related())
    silent = regrouped(experts, DROPPED, [0.0] * 8, 0.6, 4)
    assert torch.equal(neurons(silent, 0), neurons(regrouped(experts, DROPPED, [1.0] * 8, 0.6, 4), 0))
    assert all(torch.isfinite(p).all() for p in silent.parameters())
    again = regrouped(experts, DROPPED, [0.0] * 8, 0.6, 4)
    assert all(torch.equal(a, b) for a, b in zip(silent.parameters(), again.parameters(), strict=True))


# --- the kind, in folders ---


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """A tiny folder of a family with related experts, its statistics and DERN's plan, made when first asked for."""

    @functools.cache
    def made(model_type: str) -> SimpleNamespace:
        root = tmp_path_factory.mktemp(model_type)
        model, folder = related(model_type), root / "source"
        model.save_pretrained(folder, max_shard_size="100KB")
        small.save_tokenizer(folder)
        stats = calibrated(folder, root / "work", IDS)
        plan = make_plan(stats, Selection(method="dern", ratio=0.5)).plan
        return SimpleNamespace(root=root, folder=folder, stats=stats, plan=plan, model=model, model_type=model_type)

    return made


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_folder_loads_anywhere_and_is_what_was_planned(
    model_type: str, sources: Callable[[str], SimpleNamespace]
) -> None:
    one = sources(model_type)
    applied = apply(one.folder, one.plan, one.root / "out", stats=one.stats)
    assert applied.nbytes == expected_bytes(one.plan, one.stats.model) < applied.source_nbytes
    assert applied.loads == "stock transformers and vLLM"
    with without_understudy(), torch.no_grad():
        loaded = load(applied.folder, model_type)
        got = loaded(input_ids=IDS, use_cache=False).logits
    virtual = planned(Skeleton(one.folder), one.plan, one.stats)
    assert torch.equal(walked(virtual, IDS), walked(Skeleton(applied.folder), IDS))
    assert close(walked(virtual, IDS), got)
    for name, tensor in tensors_of(applied.folder).items():
        assert torch.equal(virtual.checkpoint.read(name), tensor), name
    changed = 0
    for layer in find_moe_layers(one.model):
        before, after = one.model.get_submodule(layer.name), loaded.get_submodule(layer.name)
        importance = one.stats.layers[layer.key].gate_sum.tolist()
        gone = list(one.plan.replaced(layer.key))
        remade = regrouped(before, gone, importance, 0.6, 10)
        for new, old in enumerate(one.plan.kept(layer.key, zoo.EXPERTS)):
            assert torch.equal(neurons(after, new), neurons(remade, old))
            changed += not torch.equal(neurons(after, new), neurons(before, old))
    assert changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropping_copies_is_dropping_nothing_more(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same bytes as by `drop`, where dropped experts are copies of kept ones."""
    model = zoo.tiny_model("olmoe").to(dtype)
    for layer in find_moe_layers(model):
        experts: Any = model.get_submodule(layer.name)
        with torch.no_grad():
            for row in range(4, 8):
                set_neurons(experts, row, neurons(experts, row - 4))
                set_rest(experts, row, torch.zeros(0, dtype=dtype))
    model.save_pretrained(tmp_path / "source")
    stats = calibrated(tmp_path / "source", tmp_path / "work", IDS)
    for kind in ("drop", "regroup"):
        plan = plan_of(stats, {key: {kind: [4, 5, 6, 7]} for key in stats.model.layers})
        apply(tmp_path / "source", plan, tmp_path / kind, stats=stats)
    kept, others = tensors_of(tmp_path / "regroup"), tensors_of(tmp_path / "drop")
    assert kept.keys() == others.keys()
    assert all(torch.equal(kept[name], others[name]) for name in kept)


def test_settings_of_a_plan(sources: Callable[[str], SimpleNamespace], tmp_path: Path) -> None:
    one = sources("olmoe")

    def with_how(**how: Any) -> Plan:
        return one.plan.model_copy(update={"how": {"regroup": how}})

    strict = planned(Skeleton(one.folder), with_how(threshold=1.0), one.stats)
    drop = plan_of(one.stats, {key: {"drop": list(one.plan.replaced(key))} for key in one.plan.layers})
    assert torch.equal(walked(strict, IDS), walked(planned(Skeleton(one.folder), drop, None), IDS))
    default = walked(planned(Skeleton(one.folder), one.plan, one.stats), IDS)
    assert torch.equal(
        walked(planned(Skeleton(one.folder), with_how(threshold=0.6, rounds=10), one.stats), IDS), default
    )
    assert not torch.equal(walked(planned(Skeleton(one.folder), with_how(rounds=1), one.stats), IDS), default)
    for how, message in (
        ({"similarity": 0.5}, "how: regroup has no setting 'similarity'; it has threshold and rounds"),
        ({"threshold": 2}, "how: threshold of regroup is a cosine, -1 to 1, not 2"),
        ({"threshold": "high"}, "is a cosine, -1 to 1, not 'high'"),
        ({"rounds": 0}, "how: rounds of regroup is a whole number, 1 or more, not 0"),
        ({"rounds": True}, "1 or more, not True"),
    ):
        with pytest.raises(PlanError, match=message):
            apply(one.folder, with_how(**how), tmp_path / "out", stats=one.stats)
    with pytest.raises(StatsError, match="the plan has regroup, made of statistics; give --stats"):
        apply(one.folder, one.plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_regroup_demands(sources: Callable[[str], SimpleNamespace]) -> None:
    facts = sources("olmoe").stats.model
    layers = {key: {"regroup": [1, 2]} for key in facts.layers}
    uneven = plan_of(sources("olmoe").stats, layers | {"1": {"regroup": [1]}})
    with pytest.raises(PlanError, match="regroup takes 2 experts from layer 0 and 1 from layer 1; stock loaders need"):
        check_plan(uneven, facts)
    mixed = plan_of(sources("olmoe").stats, layers | {"1": {"regroup": [1], "constant": [2]}})
    with pytest.raises(PlanError, match="layer 1: regroup cannot share a layer with constant: it renumbers"):
        check_plan(mixed, facts)
    layer = facts.layers["0"]
    assert REGROUP.refuses(layer) is None
    assert REGROUP.refuses(layer.model_copy(update={"removable": "a hash table"})) == "a hash table"
    assert "neuron" in (REGROUP.refuses(layer.model_copy(update={"channel_bytes": 0})) or "")
    assert get_kind("regroup").freed_bytes(layer, (1, 2)) == get_kind("drop").freed_bytes(layer, (1, 2))


def test_dern_keeps_the_experts_with_the_most_gate(sources: Callable[[str], SimpleNamespace]) -> None:
    one = sources("mixtral")
    for key, layer in one.stats.layers.items():
        gone = sorted(np.argsort(layer.gate_sum, kind="stable")[: zoo.EXPERTS // 2].tolist())
        assert one.plan.layers[key] == {"regroup": tuple(gone)}
