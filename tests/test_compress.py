"""Compression in one go: equal to the three stages by hand, with artefacts and card, and able to go on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import tiny
import understudy
from contract import tiny_folder
from understudy.collectors.subsets import MOST
from understudy.errors import DataError, OutputError, PlanError, StatsError, UnderstudyError
from understudy.facts import ModelFacts
from understudy.methods import Method, all_methods
from understudy.plans import load_plan
from understudy.ranking import planning_needs
from understudy.recipe import Calibration, Selection
from understudy.rehearsal import SUBSETS_OF, made_up
from understudy.stages import compress as module
from understudy.stages.compress import Compressed, compress
from understudy.stages.select import make_plan
from understudy.stats import EXTRA, ExpertStats, file_hash, load_stats

CARD = """---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
datasets: [some/text]
---
# A model
"""
SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": 16, "batch_size": 2, "ratio": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("compress") / "model", CARD)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text(tmp_path_factory.mktemp("data"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Stop(Exception):
    """As a kill would."""


def stop_at(what: str, step: int) -> Any:
    def progress(now: str, done: int, total: int) -> None:
        if now == what and done >= step:
            raise Stop

    return progress


def test_is_the_three_stages(model: Path, data: Path, tmp_path: Path) -> None:
    result = compress(model, tmp_path / "out", data=data, seed=2, max_shard_size="100KB", **SETTINGS)
    assert isinstance(result, Compressed)
    options = {name: SETTINGS[name] for name in ("samples", "seq_len", "batch_size")}
    understudy.calibrate(model, tmp_path / "stats", data=data, seed=2, **options)
    planned = understudy.plan(tmp_path / "stats", tmp_path / "plan.yaml", ratio=0.5, seed=2)
    applied = understudy.apply(
        model, tmp_path / "plan.yaml", tmp_path / "other", stats=tmp_path / "stats", max_shard_size="100KB"
    )
    one, other = files(tmp_path / "out"), files(tmp_path / "other")
    assert one.keys() - other.keys() == {"README.md", "understudy/stats.safetensors", "understudy/recipe.json"}
    assert {name: one[name] for name in other} == other
    assert one["understudy/stats.safetensors"] == (tmp_path / "stats").read_bytes()
    assert result.to_dict() == {
        "out": str(tmp_path / "out"),
        "method": "mone",
        "experts": 24,
        "replaced": 12,
        "bytes": applied.nbytes,
        "load_bytes": planned.load_bytes,
        "source_bytes": applied.source_nbytes,
        "loads": applied.loads,
        "notes": list(planned.notes),
    }


def test_leaves_nothing_but_the_folder(model: Path, data: Path, tmp_path: Path) -> None:
    before = files(model)
    seen: list[tuple[str, int, int]] = []
    compress(model, tmp_path / "out", data=data, progress=lambda *step: seen.append(step), **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files(model) == before
    assert {what for what, _, _ in seen} == {"calibrate", "write", "verify"}
    assert ("calibrate", tiny.LAYERS, tiny.LAYERS) in seen


def test_artefacts(model: Path, data: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", data=data, method="frequency", kind="constant", **SETTINGS)
    kept = tmp_path / "out" / "understudy"
    assert {p.name for p in kept.iterdir()} == {"plan.yaml", "stats.safetensors", "recipe.json", "provenance.json"}
    recipe = json.loads((kept / "recipe.json").read_text())
    assert Calibration(**recipe["calibration"]).data == (str(data),)
    assert Selection(**recipe["selection"]).method == "frequency"
    assert recipe["model"] == str(model)
    parents = json.loads((kept / "provenance.json").read_text())["parents"]
    assert parents == {"plan": file_hash(kept / "plan.yaml"), "stats": file_hash(kept / "stats.safetensors")}
    assert load_plan(kept / "plan.yaml").stats == parents["stats"]


def test_settings_as_objects(model: Path, data: Path, tmp_path: Path) -> None:
    calibration = Calibration(data=(str(data),), samples=2, seq_len=16)
    selection = Selection(method="random", ratio=0.25)
    compress(model, tmp_path / "out", calibration=calibration, selection=selection)
    assert load_plan(tmp_path / "out" / "understudy" / "plan.yaml").method == "random"
    with pytest.raises(UnderstudyError, match="not both"):
        compress(model, tmp_path / "other", calibration=calibration, ratio=0.5, samples=3)


# --- the model card ---


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_card(model: Path, data: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", data=data, **SETTINGS)
    head, text = front_matter(tmp_path / "out")
    assert head == {
        "base_model": "model",
        "library_name": "transformers",
        "tags": ["understudy", "mixture-of-experts", "mone", "constant"],
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
    }
    assert "12 of its 24 routed experts (50.0%)" in text
    assert "import understudy" in text
    assert "vllm serve out" in text
    assert "| notes | 4 |" in text
    assert f"understudy compress {model} --data {data} --samples 4 --seq-len 16 --batch-size 2 --ratio 0.5" in text
    assert "license: apache-2.0" in text


def test_card_of_an_ordinary_checkpoint(data: Path, tmp_path: Path) -> None:
    plain = tiny.make_model(tmp_path / "plain model")
    result = compress(plain, tmp_path / "out", data=data, method="reap", **SETTINGS)
    assert result is not None
    assert result.loads.startswith("stock")
    head, text = front_matter(tmp_path / "out")
    assert head["base_model"] == "plain-model"
    assert "license" not in head
    assert "import understudy" not in text
    assert "The source's card names none" in text
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("card", ["# none at all", "---\n- a list\n---\n", "---\n{broken\n---\n", "---\nlicense: x"])
def test_a_card_that_cannot_be_read_is_no_obstacle(card: str, data: Path, tmp_path: Path) -> None:
    compress(tiny.make_model(tmp_path / "model", card), tmp_path / "out", data=data, **SETTINGS)
    assert "license" not in front_matter(tmp_path / "out")[0]


# --- going on ---


def test_goes_on_after_the_calibration(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(model, tmp_path / "whole", data=data, **SETTINGS)
    with pytest.raises(Stop):
        compress(model, tmp_path / "out", data=data, progress=stop_at("write", 1), **SETTINGS)
    assert not (tmp_path / "out").exists()
    real = module.calibrate
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    compress(model, tmp_path / "out", data=data, **SETTINGS)
    differ = {n for n, content in files(tmp_path / "out").items() if content != files(tmp_path / "whole")[n]}
    assert differ == {"README.md"}  # it holds the name of the folder
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert real is not module.calibrate


def test_goes_on_within_the_calibration(model: Path, data: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "whole", data=data, **SETTINGS)
    with pytest.raises(Stop):
        compress(model, tmp_path / "out", data=data, progress=stop_at("calibrate", 2), **SETTINGS)
    seen: list[tuple[str, int, int]] = []
    compress(model, tmp_path / "out", data=data, progress=lambda *step: seen.append(step), **SETTINGS)
    assert seen[0] == ("calibrate", 2, tiny.LAYERS)
    assert files(tmp_path / "out" / "understudy") == files(tmp_path / "whole" / "understudy")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


@pytest.mark.parametrize("change", ["settings", "text"])
def test_does_not_go_on_with_something_else(model: Path, tmp_path: Path, change: str) -> None:
    data, settings = tiny.make_text(tmp_path), dict(SETTINGS)
    with pytest.raises(Stop):
        compress(model, tmp_path / "out", data=data, progress=stop_at("write", 1), **settings)
    if change == "text":
        tiny.make_text(tmp_path, seed=50)
    else:
        settings["samples"] = 3
    compress(model, tmp_path / "out", data=data, **settings)
    compress(model, tmp_path / "whole", data=data, **settings)
    assert files(tmp_path / "out" / "understudy") == files(tmp_path / "whole" / "understudy")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out", data.name}


def test_another_plan_goes_on_with_the_same_statistics(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        compress(model, tmp_path / "out", data=data, progress=stop_at("verify", 1), **SETTINGS)
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    compress(model, tmp_path / "out", data=data, **(SETTINGS | {"ratio": 0.25}))
    assert load_plan(tmp_path / "out" / "understudy" / "plan.yaml").recipe["ratio"] == 0.25


# --- several processes ---


def test_several_processes_share_the_text(model: Path, data: Path, tmp_path: Path) -> None:
    code = "import sys; from understudy.cli import app; app(sys.argv[1:])"
    words = ["compress", model, "--data", data, "--samples", 4, "--seq-len", 16, "--batch-size", 2, "--ratio", 0.5]
    command = [sys.executable, "-c", code, *map(str, words), "--out", str(tmp_path / "out"), "--json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert json.loads(outputs[0][0])["replaced"] == 12
    assert outputs[1] == ("", "")
    compress(model, tmp_path / "whole", data=data, **SETTINGS)
    assert (
        files(tmp_path / "out")["understudy/plan.yaml"].splitlines()[-3:]
        == (files(tmp_path / "whole")["understudy/plan.yaml"].splitlines()[-3:])
    )
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


# --- what a method needs is collected ---


def test_collects_what_the_method_needs(model: Path, data: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", data=data, method="shape", collect=("subsets",), **SETTINGS)
    recipe = json.loads((tmp_path / "out" / "understudy" / "recipe.json").read_text())
    assert recipe["calibration"]["collect"] == ["sets", "subsets"]
    stats = load_stats(tmp_path / "out" / "understudy" / "stats.safetensors")
    for layer in stats.layers.values():
        assert layer.topk_counts.sum() == layer.tokens
        assert layer.subset_loss.shape == (2**tiny.EXPERTS,)
    plan = load_plan(tmp_path / "out" / "understudy" / "plan.yaml")
    assert understudy.plan(stats, method="shape", ratio=0.5).plan.layers == plan.layers
    assert "--collect sets --collect subsets" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "asked", "expected"), [("ladder", None, 4), ("heapr", None, None), ("ladder", 3, 3)]
)
def test_ladder_walks_back_through_a_share_of_the_blocks(
    method: str, asked: int | None, expected: int | None, model: Path, data: Path, tmp_path: Path
) -> None:
    """An eighth, but no less than four blocks, where nothing else is asked for; the published method through all."""
    given = {} if asked is None else {"gradient_samples": asked}
    compress(model, tmp_path / "out", data=data, method=method, ratio=0.5, samples=12, seq_len=8, **given)
    assert load_stats(tmp_path / "out" / "understudy" / "stats.safetensors").data["gradient_samples"] == expected


def test_compares_with_a_base_checkpoint(model: Path, data: Path, tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", seed=1)
    compress(model, tmp_path / "out", data=data, base=str(base), method="router_norm_change", **SETTINGS)
    plan = load_plan(tmp_path / "out" / "understudy" / "plan.yaml")
    now, then = load_file(model / "model.safetensors"), load_file(base / "model.safetensors")
    for key in plan.layers:
        name = f"model.layers.{key}.mlp.gate.weight"
        change = np.linalg.norm(now[name].astype(float), axis=1) - np.linalg.norm(then[name].astype(float), axis=1)
        assert set(plan.replaced(key)) == set(np.argsort(change)[: tiny.EXPERTS // 2].tolist())


def test_reads_no_text_where_the_weights_are_enough(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(model, tmp_path / "whole", data=data, method="aimer", **SETTINGS)
    options = {"method": "aimer", "ratio": 0.5, "weights_only": True}
    with pytest.raises(Stop):
        compress(model, tmp_path / "out", progress=stop_at("write", 1), **options)
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    compress(model, tmp_path / "out", **options)
    plans = [load_plan(tmp_path / name / "understudy" / "plan.yaml") for name in ("whole", "out")]
    assert plans[0].layers == plans[1].layers
    assert "No text was read" in (tmp_path / "out" / "README.md").read_text()
    assert "| notes | 4 |" in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(StatsError, match=r"method reap needs count, gated_norm_sum, .* so calibrate on text"):
        compress(model, tmp_path / "other", method="reap", ratio=0.5, weights_only=True)
    with pytest.raises(StatsError, match=r"method aimer needs mean, .* they are of the weights alone"):
        compress(model, tmp_path / "other", method="aimer", kind="constant", ratio=0.5, weights_only=True)


@pytest.mark.usefixtures("no_calibration")
def test_a_missing_base_is_said_before_the_calibration(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(StatsError, match="method router_norm_change needs --base MODEL, the checkpoint"):
        compress(model, tmp_path / "out", data=data, method="router_norm_change", **SETTINGS)


@pytest.fixture(scope="module")
def facts(model: Path) -> ModelFacts:
    found = understudy.inspect(model).facts
    assert found is not None
    return found


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda m: m.name)
def test_every_method_can_be_rehearsed(method: Method, facts: ModelFacts) -> None:
    budgets = ({"ratio": 0.25}, {"size": str(facts.nbytes * 9 // 10)}, {"ratio": 0.25, "keep_super": True})
    for more in budgets if method.shrinks else ({}, {"keep_layers": "0"}):
        # experts of a tiny model are small
        small = {name: 1 for name in ("bases", "rank", "keep_experts") if name in method.options}
        selection = Selection(method=method.name, **small, **more)
        stats = made_up(facts, planning_needs(method, selection))
        assert stats is not None
        assert (make_plan(stats, selection).expected_bytes < facts.nbytes) == method.shrinks


def test_made_up_statistics_have_the_shapes_of_real_ones(
    model: Path, data: Path, facts: ModelFacts, tmp_path: Path
) -> None:
    real = understudy.calibrate(
        model, tmp_path / "stats", data=data, samples=4, seq_len=16, collect=EXTRA, dense_tokens=8, base=str(model)
    )
    every = [f.name for f in fields(ExpertStats)]
    made = made_up(facts, every)
    assert made is not None
    for key, layer in real.layers.items():
        sizes = made.layers[key].arrays()
        assert set(layer.arrays()) <= set(sizes) == set(every)
        for name, value in layer.arrays().items():
            if name == "dense_activations":
                assert value.shape == (*sizes[name].shape[:2], 8), "as many tokens as there are"
                continue
            skipped = 1 if name.startswith("topk") else 0  # how many sets there are
            assert value.shape[skipped:] == sizes[name].shape[skipped:], name
    unknown = {key: layer.model_copy(update={"width": None}) for key, layer in facts.layers.items()}
    narrow = facts.model_copy(update={"layers": unknown})
    assert made_up(narrow, ["activation_sum"]) is None
    assert made_up(narrow, ["dense_sum"]) is not None
    assert SUBSETS_OF == MOST


# --- what fails fails early ---


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated before it failed"))


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "give one of --ratio, --size and --model-ratio"),
        ({"ratio": 0.5, "size": "1MB"}, "give one of --ratio, --size and --model-ratio"),
        ({"ratio": 2}, "not a share"),
        ({"ratio": 0.99}, "at least one"),
        ({"ratio": 0.9, "method": "reap"}, "top-k"),
        ({"ratio": 0.5, "method": "magic"}, "no method"),
        ({"ratio": 0.5, "keep_layers": "0,7"}, "no MoE layer 7; those that it has are 0-2"),
        ({"ratio": 0.5, "method": "shape", "keep_layers": "0"}, "--keep-layers would leave layer 0 with more experts"),
        ({"ratio": 0.5, "method": "mone", "scope": "mass"}, "does not select by mass"),
        ({"ratio": 0.5, "kind": "magic"}, "no kind"),
        ({"ratio": 0.5, "method": "reap", "scope": "model"}, "--scope model"),
        ({"size": "1KB"}, "out of reach"),
        ({"size": "1KB", "scope": "model"}, "out of reach"),
        ({"ratio": 0.5, "method": "reap", "gate": "routed"}, "no effect"),
        ({"ratio": 0.5, "max_shard_size": "big"}, "not a size"),
        ({"ratio": 0.5, "colour": "red"}, "colour"),
        ({"ratio": 0.5, "samples": 0}, "samples"),
    ],
)
def test_bad_settings_fail_before_the_calibration(
    model: Path, data: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnderstudyError, match=says):
        compress(model, tmp_path / "out", data=data, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_calibration")
def test_what_else_fails_before_the_calibration(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OutputError, match="exists already"):
        compress(model, tmp_path / "taken", data=data, ratio=0.5)
    zaya = tiny_folder("zaya", tmp_path / "zaya")
    with pytest.raises(PlanError, match="drop is not possible"):
        compress(zaya, tmp_path / "out", data=data, ratio=0.5, kind="drop")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(OutputError, match="are needed, 0 B are free"):
        compress(model, tmp_path / "out", data=data, ratio=0.5)


def test_bad_text_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        compress(model, tmp_path / "out", data=tmp_path / "none.txt", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_folder_is_no_source(model: Path, data: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", data=data, **SETTINGS)
    with pytest.raises(StatsError, match="holds stand-ins already"):
        compress(tmp_path / "out", tmp_path / "again", data=data, ratio=0.5)
