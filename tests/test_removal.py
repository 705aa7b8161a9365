"""Layers that go whole: the stream passes a missing sublayer by, and a shallower model is an ordinary one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import understudy
import zoo
from contract import calibrated, ids_of, load, tiny_folder, without_understudy
from understudy.activations import ActivationStore
from understudy.errors import PlanError
from understudy.kinds import expected_bytes
from understudy.plans import Plan, PlanModel
from understudy.recipe import Selection
from understudy.skeleton import Skeleton
from understudy.stages.select import make_plan
from understudy.stats import Stats
from understudy.virtual import planned
from understudy.walk import Walk

Made = tuple[str, Path, Stats]


@pytest.fixture(scope="module", params=["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "lfm2_moe", "granitemoe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, calibrated(folder, tmp_path_factory.mktemp("work"), ids_of())


def plan_of(stats: Stats, kind: str, *keys: str) -> Plan:
    return Plan(method="edited", model=PlanModel.of(stats.model), layers={key: {kind: "all"} for key in keys})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_of(), use_cache=False).logits


def walked(skeleton: Skeleton) -> torch.Tensor:
    walk = Walk(skeleton, ids_of().numpy(), 3, ActivationStore(1 << 30))
    with walk.ready():
        walk.through_layers()
        return walk.logits(0)


def without_sublayer(family: str, stats: Stats, key: str) -> Any:
    """The original with its sublayer's answer multiplied by zero."""
    model = zoo.tiny_model(family).eval()
    block = stats.model.layers[key].name.rpartition(".")[0]
    model.get_submodule(block).register_forward_hook(lambda module, args, output: output * 0)
    return model


def test_layer_drop_is_a_sublayer_that_answers_zero(made: Made, tmp_path: Path) -> None:
    family, folder, stats = made
    key = list(stats.model.layers)[1]
    plan = plan_of(stats, "layer_drop", key)
    applied = understudy.apply(folder, plan, tmp_path / "out")
    assert "import understudy" in applied.loads
    assert applied.nbytes == expected_bytes(plan, stats.model) < stats.model.nbytes
    expected = logits(without_sublayer(family, stats, key))
    loaded = load(tmp_path / "out", family)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(walked(planned(Skeleton(folder), plan, None)), expected, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again", family)), expected, rtol=0, atol=1e-5)


def test_a_stock_loader_stops_at_a_missing_sublayer(made: Made, tmp_path: Path) -> None:
    family, folder, stats = made
    understudy.apply(folder, plan_of(stats, "layer_drop", next(iter(stats.model.layers))), tmp_path / "out")
    with without_understudy(), pytest.raises((RuntimeError, ValueError), match=r"size|shape|mismatch"):
        load(tmp_path / "out", family)


def test_block_drop_is_an_ordinary_shallower_model(made: Made, tmp_path: Path) -> None:
    family, folder, stats = made
    key = list(stats.model.layers)[1]
    plan = plan_of(stats, "block_drop", key)
    try:
        applied = understudy.apply(folder, plan, tmp_path / "out")
    except PlanError as error:
        assert "does not allow block_drop" in str(error)  # noqa: PT017
        assert family in {"lfm2_moe"}
        return
    assert applied.loads == "stock transformers and vLLM"
    assert applied.nbytes == expected_bytes(plan, stats.model)
    model = zoo.tiny_model(family).eval()
    layers = model.get_submodule(Skeleton(folder).stack)
    del layers[int(key)]
    expected = logits(model)
    with without_understudy():
        torch.testing.assert_close(logits(load(tmp_path / "out", family)), expected, rtol=0, atol=1e-5)
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())) > 3


def test_the_most_alike_go_first(made: Made) -> None:
    _, _, stats = made
    for method, field in (("layer_drop", "moe_cos_sum"), ("block_drop", "block_cos_sum")):
        if any(getattr(x, field) is None for x in stats.layers.values()):
            continue
        cosine = {key: float(getattr(x, field) / x.tokens) for key, x in stats.layers.items()}
        plan = make_plan(stats, Selection(method=method, ratio=1 / len(cosine))).plan
        assert list(plan.layers) == [max(cosine, key=lambda key: cosine[key])]
        assert np.isfinite(list(cosine.values())).all()


def test_what_makes_no_sense_is_refused(made: Made, tmp_path: Path) -> None:
    _, folder, stats = made
    first, *others = stats.model.layers
    with pytest.raises(PlanError, match="layer_drop takes whole layers; write `layer_drop: all`"):
        understudy.apply(
            folder,
            Plan(method="x", model=PlanModel.of(stats.model), layers={first: {"layer_drop": [1]}}),
            tmp_path / "out",
        )
    with pytest.raises(PlanError, match="at least one must stay"):
        understudy.apply(folder, plan_of(stats, "block_drop", first, *others), tmp_path / "out")
    mixed = {first: {"block_drop": "all"}, others[0]: {"constant": [1]}}
    with pytest.raises(PlanError, match="block_drop renumbers layers and cannot be in a plan with constant"):
        understudy.apply(
            folder, Plan(method="x", model=PlanModel.of(stats.model), layers=mixed), tmp_path / "out", stats=stats
        )
