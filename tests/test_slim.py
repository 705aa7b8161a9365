"""Experts of fewer neurons: the right ones stay, they answer as the whole expert without the others, and bytes fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from contract import ids_of, load
from understudy.channel_scores import get_channel_score
from understudy.channels import channel_views, channel_width
from understudy.data import Blocks
from understudy.entries import Entry
from understudy.errors import NumericError, PlanError, StatsError
from understudy.experts import copied, install
from understudy.kinds import check_plan, expected_bytes, get_kind, stand_ins_of
from understudy.kinds.slim import Slim
from understudy.layout import model_facts
from understudy.plans import Plan, PlanModel
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.stages.calibrate import collect
from understudy.standins import StandIn
from understudy.stats import Stats

TYPES = ["olmoe", "gpt_oss", "nemotron_h", "mixtral", "granitemoe", "qwen3_vl_moe", "muse_spark"]


def calibrated(model_type: str, folder: Path, **changes: Any) -> Stats:
    """A tiny folder and its statistics with channels."""
    zoo.tiny_model(model_type, **changes).save_pretrained(folder / "model")
    skeleton = Skeleton(folder / "model")
    facts = model_facts(skeleton, "tiny")
    ids = ids_of(rows=6, length=16).numpy().astype(np.int32)
    blocks = Blocks(ids, np.zeros(len(ids), np.int16), ("test",), (), "0" * 64)
    settings = Calibration(batch_size=3, collect=("channels",))
    layers, probes = collect(skeleton, facts, blocks, settings, folder / "work")
    return Stats(facts, {}, layers, probes)


def slim_plan(stats: Stats, layers: dict[str, Entry], **how: Any) -> Plan:
    plan = {key: {"slim": entry} for key, entry in layers.items()}
    return Plan(method="edited", model=PlanModel.of(stats.model), layers=plan, how={"slim": how} if how else {})


def uneven(stats: Stats) -> dict[str, Entry]:
    """Several widths in every layer, awkward ones and none at all among them; one layer has no whole expert left."""
    layers: dict[str, Entry] = {}
    for number, (key, layer) in enumerate(stats.model.layers.items()):
        width = layer.width or 0
        widths = [width - 1, 8, 0, 5, width // 2, 8, 3, 8]
        layers[key] = dict(list(enumerate(widths))[: 8 if number == 0 else 6])
    return layers


def best(score: np.ndarray, width: int) -> list[int]:
    """The neurons with the highest score, of equals the first, ascending; by a plain sort of pairs."""
    ranked = sorted(range(len(score)), key=lambda k: (-score[k], k))
    return sorted(ranked[:width])


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stats]:
    folder = tmp_path_factory.mktemp("olmoe")
    return folder / "model", calibrated("olmoe", folder)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("constant", [False, True])
def test_a_written_folder_answers_as_the_original_without_the_dropped_columns(
    model_type: str, constant: bool, tmp_path: Path
) -> None:
    stats = calibrated(model_type, tmp_path)
    plan = slim_plan(stats, uneven(stats), order="camera", constant=constant)
    if constant and model_type == "muse_spark":
        with pytest.raises(PlanError, match="MuseSparkExperts normalises what an expert puts out"):
            apply(tmp_path / "model", plan, tmp_path / "out", stats=stats)
        return
    done = apply(tmp_path / "model", plan, tmp_path / "out", stats=stats)
    assert done.nbytes == expected_bytes(plan, stats.model) < stats.model.nbytes
    got = load(tmp_path / "out", model_type)
    whole = load(tmp_path / "model", model_type)
    with torch.no_grad():
        for key, layer in stats.model.layers.items():
            mask(whole.get_submodule(layer.name), plan.layers[key]["slim"], stats, key, constant)
        ids = ids_of(rows=2, length=8, seed=4)
        torch.testing.assert_close(got(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-4)


def mask(experts: Any, entry: Entry, stats: Stats, key: str, constant: bool) -> None:
    """Zero the dropped down columns of live experts, and add what they answer on average."""
    assert isinstance(entry, dict)
    sums, down = stats.layers[key], channel_views(experts)["down"]
    scored = get_channel_score("camera").compute(sums, None)  # type: ignore[arg-type]  (it does not look)
    vectors = torch.zeros(zoo.EXPERTS, down.shape[2])
    for expert, width in entry.items():
        dropped = [k for k in range(down.shape[1]) if k not in best(scored[expert], width)]
        for k in dropped:
            if constant and sums.count[expert]:
                vectors[expert] += float(sums.activation_sum[expert, k] / sums.count[expert]) * down[expert, k]
        down[expert, dropped] = 0
    if constant:
        own = experts.forward

        def forward(hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            return own(hidden, index, gates) + (gates[:, :, None] * vectors[index]).sum(1)

        experts.forward = forward


def test_the_family_own_forward_runs_whatever_the_implementation(tmp_path: Path) -> None:
    stats = calibrated("gpt_oss", tmp_path)
    folder = apply(tmp_path / "model", slim_plan(stats, uneven(stats)), tmp_path / "out", stats=stats).folder
    ids, logits = ids_of(rows=2, length=8, seed=4), []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        with torch.no_grad():
            logits.append(load(folder, "gpt_oss", experts_implementation=implementation)(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["camera", "tenp", "flap", "moe_slimming"])
def test_the_best_of_an_expert_by_the_order_stay(order: str, olmoe: tuple[Path, Stats]) -> None:
    folder, stats = olmoe
    key, layer = list(stats.model.layers.items())[1]
    entry = {0: 10, 3: 1, 6: 47}
    kept = Slim(order)._kept(experts_of(folder, layer.name), entry, stats.layers[key])
    scored = get_channel_score(order).compute(stats.layers[key], None)  # type: ignore[arg-type]
    assert {e: ids.tolist() for e, ids in kept.items()} == {e: best(scored[e], w) for e, w in entry.items()}


def test_of_equals_the_first_stay(olmoe: tuple[Path, Stats]) -> None:
    folder, stats = olmoe
    key, layer = next(iter(stats.model.layers.items()))
    sums = replace(stats.layers[key], projection_sum=np.zeros((zoo.EXPERTS, layer.width)))
    sums.projection_sum[2, 40] = 1
    kept = Slim("tenp")._kept(experts_of(folder, layer.name), {2: 3, 4: 3}, sums)
    assert {e: ids.tolist() for e, ids in kept.items()} == {2: [0, 1, 40], 4: [0, 1, 2]}


def experts_of(folder: Path, name: str) -> Any:
    return load(folder, "olmoe").get_submodule(name)


def test_reference_is_the_expert_with_columns_zeroed(olmoe: tuple[Path, Stats]) -> None:
    folder, stats = olmoe
    key, layer = next(iter(stats.model.layers.items()))
    experts, entry, sums = experts_of(folder, layer.name), {5: 7, 1: 0}, stats.layers[key]
    hidden = torch.randn(4, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    before = experts.down_proj.clone()
    with torch.no_grad():
        got = get_kind("slim").reference(experts, hidden, 5, entry, {"constant": True}, sums)
        nothing = get_kind("slim").reference(experts, hidden, 1, entry, {}, sums)
        gate, up = (hidden @ experts.gate_up_proj[5].T).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        mean = torch.from_numpy(sums.activation_sum[5] / sums.count[5]).float()
        kept = best(get_channel_score("camera").compute(sums, None)[5], 7)  # type: ignore[arg-type]
        h_or_mean = torch.stack([h[:, k] if k in kept else mean[k].expand(4) for k in range(layer.width or 0)], 1)
        torch.testing.assert_close(got, h_or_mean @ experts.down_proj[5].T, rtol=1e-4, atol=1e-5)
    assert not nothing.any()
    assert torch.equal(experts.down_proj, before)


def test_bytes_by_hand(olmoe: tuple[Path, Stats]) -> None:
    stats = olmoe[1]
    layer = stats.model.layers["0"]
    assert (layer.width, layer.channel_bytes, layer.expert_bytes) == (48, 3 * 32 * 4, 48 * 3 * 32 * 4)
    entry: Entry = {0: 10, 1: 0, 2: 47}
    assert get_kind("slim").stored_bytes(layer, entry) == 57 * layer.channel_bytes
    assert Slim(constant=True).stored_bytes(layer, entry) == 57 * layer.channel_bytes + 3 * 32 * 4
    biased = layer.model_copy(update={"expert_bytes": layer.expert_bytes + 32 * 4})
    assert get_kind("slim").stored_bytes(biased, entry) == 57 * layer.channel_bytes + 3 * 32 * 4
    assert Slim(constant=True).stored_bytes(biased, entry) == 57 * layer.channel_bytes + 5 * 32 * 4
    assert get_kind("slim").freed_bytes(layer, entry) == 3 * layer.expert_bytes
    for constant in (False, True):
        plan = slim_plan(stats, {"1": entry}, constant=constant)
        gone = (3 * 48 - 57) * layer.channel_bytes - constant * 3 * 32 * 4
        assert expected_bytes(plan, stats.model) == stats.model.nbytes - gone


def test_what_is_declared(olmoe: tuple[Path, Stats]) -> None:
    stats = olmoe[1]
    layer = stats.model.layers["0"]
    biased = layer.model_copy(update={"expert_bytes": layer.expert_bytes + 32 * 4})
    entry: Entry = {4: 0, 2: 7}
    plain, constant = slim_plan(stats, {"0": entry}), slim_plan(stats, {"0": entry}, constant=True)
    assert stand_ins_of(plain, "0", layer) == {2: StandIn("slim-v1", width=7), 4: StandIn("absent-v1")}
    assert stand_ins_of(plain, "0", biased) == {2: StandIn("slim-v1", width=7), 4: StandIn("constant-v1")}
    assert stand_ins_of(constant, "0", layer) == {
        2: StandIn("slim-v1", width=7, constant=True),
        4: StandIn("constant-v1"),
    }


def test_needs_follow_the_settings() -> None:
    kind = get_kind("slim")
    assert set(kind.having({"order": "heapr"}).needs) == set(get_channel_score("heapr").needs)
    assert set(kind.having({"order": "tenp", "constant": True}).needs) == {"activation_sum", "count", "projection_sum"}
    assert set(kind.needs) == set(get_channel_score("camera").needs)


@pytest.mark.parametrize(
    ("entry", "how", "message"),
    [
        ({1: 48}, {}, "layer 0: slim keeps 48 neurons of expert 1, which has 48; give fewer, or leave the expert out"),
        ({1: 900}, {}, "layer 0: slim keeps 900 neurons of expert 1, which has 48"),
        (dict.fromkeys(range(8), 0), {}, "layer 0: none of the 8 experts keeps a neuron"),
        ({1: 8}, {"ordr": "camera"}, "how: slim has no setting 'ordr'; it has order, constant and refit"),
        ({1: 8}, {"order": "camra"}, r"no channel score is named 'camra' \(did you mean 'camera'\?\)"),
        ({1: 8}, {"constant": 1}, "how: constant of slim is true or false, not 1"),
        ({1: 8}, {"order": True}, "how: order of slim is the name of a channel score, not True"),
        ((1, 2), {}, r"layer 0: slim takes \{3: 512\}, not expert ids"),
    ],
)
def test_an_impossible_plan_gets_one_clear_line(
    entry: Entry, how: dict[str, Any], message: str, olmoe: tuple[Path, Stats]
) -> None:
    stats = olmoe[1]
    with pytest.raises(PlanError, match=message) as caught:
        check_plan(slim_plan(stats, {"0": entry}, **how), stats.model)
    assert "\n" not in str(caught.value)


def test_a_model_whose_neurons_cannot_be_told_apart_is_refused(olmoe: tuple[Path, Stats]) -> None:
    facts = olmoe[1].model
    layers = {key: layer.model_copy(update={"channel_bytes": 0}) for key, layer in facts.layers.items()}
    plan = slim_plan(olmoe[1], {"0": {1: 8}})
    check_plan(plan)
    with pytest.raises(PlanError, match="slim is not possible: nothing tells which weights of its experts make up"):
        check_plan(plan, facts.model_copy(update={"layers": layers}))


def test_statistics_that_do_not_do(olmoe: tuple[Path, Stats], tmp_path: Path) -> None:
    folder, stats = olmoe
    sums, experts = stats.layers["0"], experts_of(folder, stats.model.layers["0"].name)
    bare = replace(stats, layers={**stats.layers, "0": replace(sums, gated_activation_sq_max=None)})
    with pytest.raises(StatsError, match=r"slim needs .*calibrate with --collect channels"):
        apply(folder, slim_plan(stats, {"0": {1: 8}}), tmp_path / "a", stats=bare)
    with pytest.raises(StatsError, match=r"statistics of \(8, 48\) experts and neurons, the model has \(8, 40\)"):
        Slim()._kept(narrowed(experts, 40), {1: 8}, sums)
    with pytest.raises(NumericError, match="the camera score of a neuron is NaN or infinite"):
        Slim()._kept(experts, {1: 8}, replace(sums, down_sq_norm=np.full((8, 48), np.nan)))


def narrowed(experts: Any, width: int) -> Any:
    made = copied(experts)
    install(made, {e: StandIn("slim-v1", width=width) for e in range(zoo.EXPERTS)}, zoo.EXPERTS)
    assert channel_width(made) == width
    return made
