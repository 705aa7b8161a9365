"""The command line: every command with --json, what goes where, and one line for everything that can go wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tiny
import understudy
from understudy.cli import app
from understudy.cli.screen import explain
from understudy.recipe import Calibration, Evaluation, Selection

SMALL = ["--samples", "4", "--seq-len", "16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `notes.jsonl`, `stats` and `plan.yaml`; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.make_model(folder / "model")
    data = tiny.make_text(folder)
    understudy.calibrate(folder / "model", folder / "stats", data=data, samples=4, seq_len=16)
    understudy.plan(folder / "stats", folder / "plan.yaml", ratio=0.5)
    return folder


@pytest.fixture(autouse=True)
def _untouched_environment() -> Iterator[None]:
    """Commands silence other packages through the environment, which must not reach other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def answer(*words: Any) -> dict[str, Any]:
    """Run a command with --json; stdout is one object, and on stderr are no more than warnings of ours."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines())
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def table(*words: Any) -> str:
    """Run a command for people; return stdout."""
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*words: Any, says: str) -> None:
    """Run a command that must fail with one line on stderr and code 2."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert says in lines[0]


def shell(*words: Any, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "understudy", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)


# --- every command ---


def test_inspect(place: Path) -> None:
    data = answer("inspect", place / "model")
    assert data["family"] == "olmoe"
    assert data["experts"] == tiny.LAYERS * tiny.EXPERTS
    assert "olmoe" in table("inspect", place / "model")


def test_calibrate(place: Path, tmp_path: Path) -> None:
    words = ["calibrate", place / "model", "--data", place / "notes.jsonl", *SMALL]
    data = answer(*words, "--out", tmp_path / "a")
    assert data["data"]["blocks"] == {"notes": 4}
    assert data["experts"] == tiny.LAYERS * tiny.EXPERTS
    assert set(data["unseen"]) == {"0", "1", "2"}
    assert "notes 4 blocks of 16 tokens" in table(*words, "--out", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_data_can_be_given_several_times(place: Path, tmp_path: Path) -> None:
    more = tiny.make_text(tmp_path, "more", seed=9)
    words = ["--data", f"{place / 'notes.jsonl'}=3", "--data", more, *SMALL, "--out", tmp_path / "a"]
    assert answer("calibrate", place / "model", *words)["data"]["blocks"] == {"notes": 3, "more": 1}


def test_plan(place: Path, tmp_path: Path) -> None:
    words = ["plan", place / "stats", "--ratio", 0.25, "--out"]
    data = answer(*words, tmp_path / "a.yaml")
    assert data["replaced"] == {"constant": 6}
    assert data["expected_bytes"] < data["source_bytes"]
    assert data["load_bytes"] == data["expected_bytes"]
    assert len(data["scores"]["layers"]["1"]) == tiny.EXPERTS
    assert "6 constant of 24 routed experts (25.0%)" in table(*words, tmp_path / "b.yaml")
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


def test_a_size_is_met(place: Path, tmp_path: Path) -> None:
    full = answer("inspect", place / "model")["bytes"]["total"]
    data = answer("plan", place / "stats", "--size", f"{full - 20_000}B", "--out", tmp_path / "plan.yaml")
    assert data["expected_bytes"] <= full - 20_000


def test_show(place: Path) -> None:
    data = answer("show", place / "plan.yaml")
    assert data["method"] == "mone"
    assert data["layers"]["0"]["replaced"]["constant"]["count"] == 4
    ids = data["layers"]["0"]["replaced"]["constant"]["ids"]
    assert " ".join(map(str, ids)) in table("show", place / "plan.yaml")


def test_check(place: Path) -> None:
    assert answer("check", place / "plan.yaml")["unchecked"]
    for against in (["--stats", place / "stats"], ["--model", place / "model"]):
        data = answer("check", place / "plan.yaml", *against)
        assert not data["unchecked"]
        assert data["expected_bytes"] > 0
    assert "sound" in table("check", place / "plan.yaml")
    (place / "second.yaml").write_text((place / "plan.yaml").read_text())
    both = [place / "plan.yaml", place / "second.yaml"]
    assert answer("check", *both)["plans"][str(both[1])] == answer("check", both[1])
    assert table("show", *both).count("method") == 2
    refused("check", place / "plan.yaml", "--stats", "a", "--model", "b", says="give one of --stats and --model")


def test_diff(place: Path, tmp_path: Path) -> None:
    understudy.plan(place / "stats", tmp_path / "b.yaml", ratio=0.25)
    data = answer("diff", place / "plan.yaml", tmp_path / "b.yaml")
    assert data["changed"] == 6
    assert data["agreement"] == 0.75
    assert "constant to kept" in table("diff", place / "plan.yaml", tmp_path / "b.yaml")


def test_apply(place: Path, tmp_path: Path) -> None:
    words = ["apply", place / "model", place / "plan.yaml", "--stats", place / "stats", "--max-shard-size", "100KB"]
    data = answer(*words, "--out", tmp_path / "a")
    assert data["bytes"] < data["source_bytes"]
    assert "vLLM" in data["loads"]
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert "loads in" in table(*words, "--out", tmp_path / "b")


def test_compress_and_eval(place: Path, tmp_path: Path) -> None:
    data = ["--data", place / "notes.jsonl", *SMALL]
    words = ["compress", place / "model", *data, "--ratio", 0.5, "--seed", 3, "--out"]
    found = answer(*words, tmp_path / "a")
    assert found["replaced"] == 12
    assert found["bytes"] < found["source_bytes"]
    recipe = json.loads((tmp_path / "a" / "understudy" / "recipe.json").read_text())
    assert recipe["calibration"]["seed"] == recipe["selection"]["seed"] == 3
    assert "12 of 24 routed experts (50.0%)" in table(*words, tmp_path / "b")

    metrics = answer("eval", tmp_path / "a", "--against", place / "model", *data)
    assert {"perplexity", "kl", "top1_agreement", "bytes", "params", "tasks"} <= set(metrics)
    assert set(metrics["perplexity"]) == {"notes", "all"}
    assert metrics == json.loads((tmp_path / "a" / "understudy" / "metrics.json").read_text())
    assert "perplexity, notes" in table("eval", tmp_path / "a", "--against", place / "model", *data)
    assert "perplexity, all" in table("eval", tmp_path / "a", *data)
    assert "12" not in table("inspect", tmp_path / "a").splitlines()[0]


def test_version() -> None:
    assert run("--version").stdout == f"understudy {understudy.__version__}\n"


# --- flags ---


@pytest.mark.parametrize(
    ("command", "models"),
    [
        ("calibrate", [Calibration]),
        ("plan", [Selection]),
        ("compress", [Calibration, Selection]),
        ("eval", [Evaluation]),
    ],
)
def test_every_setting_is_a_flag_with_its_default(command: str, models: list[type[BaseModel]]) -> None:
    text = " ".join(run(command, "--help").stdout.split())
    for model in models:
        for name, field in model.model_fields.items():
            assert f"--{name.replace('_', '-')} " in text
            assert " ".join(str(field.description).split()) in text
            if field.default not in (None, (), False):
                assert f"[default: {field.default}]" in text


def test_tasks_take_commas(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    seen: list[Evaluation] = []

    def evaluate(model: str, *, settings: Evaluation, **_: Any) -> Any:
        seen.append(settings)
        raise understudy.errors.DataError("enough")

    monkeypatch.setattr("understudy.stages.evaluate.evaluate", evaluate)
    refused("eval", place / "model", "--tasks", "a,b", "--limit", 3, says="enough")
    assert ",".join(seen[0].tasks) == "a,b"
    assert seen[0].limit == 3


# --- bad input ---


def test_missing_files(place: Path, tmp_path: Path) -> None:
    refused("inspect", tmp_path / "none", says="no such model folder")
    refused("inspect", tmp_path, says="config.json")
    refused("plan", tmp_path / "none", "--ratio", 0.5, "--out", tmp_path / "p", says="no such statistics file")
    refused("show", tmp_path / "none", says="no such plan")
    refused("plan", place / "notes.jsonl", "--ratio", 0.5, "--out", tmp_path / "p", says="not a statistics file")


def test_not_a_moe(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    refused("inspect", tmp_path / "dense", says="not a Mixture-of-Experts model")
    refused("compress", tmp_path / "dense", "--ratio", 0.5, "--out", tmp_path / "o", says="not a Mixture-of-Experts")


def test_impossible_plans(place: Path, tmp_path: Path) -> None:
    words = ["plan", place / "stats", "--out", tmp_path / "p"]
    refused(*words, says="give one of --ratio, --size and --model-ratio")
    refused(*words, "--ratio", 1.5, says="ratio 1.5 is not a share")
    refused(*words, "--ratio", 0.99, says="constant needs at least one")
    refused(*words, "--ratio", 0.9, "--method", "reap", says="top-k")
    refused(*words, "--size", "1KB", says="out of reach")
    refused(*words, "--size", "much", says="is not a size")
    refused(*words, "--ratio", 0.5, "--method", "magic", says="no method is named 'magic'")
    refused(*words, "--ratio", 0.5, "--kind", "magic", says="no kind is named 'magic'")
    refused(*words, "--ratio", 0.5, "--scope", "world", says="scope")
    refused(*words, "--ratio", 0.5, "--method", "reap", "--scope", "model", says="--scope model")
    assert not (tmp_path / "p").exists()


def test_bad_data(place: Path, tmp_path: Path) -> None:
    words = ["calibrate", place / "model", "--out", tmp_path / "s", "--seq-len", 16]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    refused(*words, "--data", tmp_path / "none.txt", says="no such file")
    refused(*words, "--data", tmp_path / "empty.txt", says="is empty")
    refused(*words, "--data", tmp_path / "short.txt", says="give more text")
    refused(*words, "--data", "", says="a data spec is empty")
    refused(*words[:-1], 100, "--data", place / "notes.jsonl", says="more than the 64 positions")
    refused(*words, "--samples", 0, says="samples")
    refused(*words, "--dtype", "int8", says="--dtype int8")
    refused(*words, "--device", "abacus", says="--device abacus")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "short.txt"]


def test_taken_outputs(place: Path, tmp_path: Path) -> None:
    tiny.make_text(tmp_path)
    refused("calibrate", place / "model", "--out", tmp_path / "notes.jsonl", says="exists already")
    words = [place / "model", place / "plan.yaml", "--stats", place / "stats"]
    refused("apply", *words, "--out", tmp_path, says="exists already and is not empty")
    refused("compress", place / "model", "--ratio", 0.5, "--out", tmp_path, says="exists already and is not empty")


def test_files_of_another_model(place: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", seed=1)
    words = ["apply", other, place / "plan.yaml", "--stats", place / "stats", "--out", tmp_path / "o"]
    refused(*words, says="was made for")
    refused("check", place / "plan.yaml", "--model", other, says="was made for")
    understudy.calibrate(other, tmp_path / "stats", data=place / "notes.jsonl", samples=2, seq_len=16)
    words = ["apply", place / "model", place / "plan.yaml", "--out", tmp_path / "o"]
    refused(*words, "--stats", tmp_path / "stats", says="these statistics are of")
    refused(*words, says="give --stats")
    assert not (tmp_path / "o").exists()


def test_damaged_models(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(place / "model", broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    calibrate = ["calibrate", broken, "--data", place / "notes.jsonl", *SMALL, "--out", tmp_path / "s"]

    weights.write_bytes(whole[:-100])
    refused("inspect", broken, says="truncated")
    weights.write_bytes(b"\xff" * 1000)
    refused("inspect", broken, says="truncated")
    weights.unlink()
    refused("inspect", broken, says="model.safetensors")

    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("inspect", broken, says="points outside its folder")
    (broken / "model.safetensors.index.json").unlink()

    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(*calibrate, says="model.layers.1")

    weights.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (broken / "config.json").write_text(json.dumps(config))
    refused("inspect", broken, says="gptq")
    refused(*calibrate, says="not supported")
    (broken / "config.json").write_text("{")
    refused("inspect", broken, says="not valid JSON")


def test_a_folder_with_stand_ins_is_no_source(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    understudy.apply(place / "model", place / "plan.yaml", out, stats=place / "stats")
    assert answer("inspect", out)["has_stand_ins"]
    assert "start from the original model" in table("inspect", out)
    refused("calibrate", out, "--data", place / "notes.jsonl", "--out", tmp_path / "s", says="holds stand-ins already")
    refused("compress", out, "--ratio", 0.5, "--out", tmp_path / "o", says="holds stand-ins already")
    refused("check", place / "plan.yaml", "--model", out, says="holds stand-ins already")


def test_errors_become_one_line(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    assert explain(full) == ("disk full, /disk/file cannot be written; free some space and run this again", 2)
    assert explain(RuntimeError("I/O error: No space left on device (os error 28)"))[1] == 2
    assert explain(MemoryError())[0].startswith("out of memory")
    assert explain(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))[1] == 2
    assert explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))[1] == 2
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/a/x")) == ("/a/x: Permission denied", 2)
    assert explain(KeyboardInterrupt()) == ("interrupted", 130)
    text, code = explain(ZeroDivisionError("division\nby zero"))
    assert code == 1
    assert text.startswith("ZeroDivisionError: division by zero")


@pytest.mark.filterwarnings("ignore:more chatter")
def test_what_was_not_foreseen_shows_no_traceback(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        print("chatter")
        warnings.warn("more chatter", stacklevel=1)
        logging.getLogger("somebody.else").warning("and more")
        logging.getLogger("understudy.somewhere").warning("of\nours")
        raise raised

    monkeypatch.setattr("understudy.stages.inspect.inspect", broken)
    raised: BaseException = ZeroDivisionError("division by zero")
    result = run("inspect", place / "model")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[0] == "warning: of ours"
    assert result.stderr.splitlines()[1].startswith("error: ZeroDivisionError")
    assert len(result.stderr.splitlines()) == 2
    raised = KeyboardInterrupt()
    result = run("inspect", place / "model")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[1:] == ["error: interrupted"]
    monkeypatch.setenv("UNDERSTUDY_DEBUG", "1")
    raised = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run("inspect", place / "model")


def test_only_the_first_process_speaks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run("show", place / "plan.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    result = run("show", place / "none")
    assert result.exit_code == 2
    assert result.stderr.startswith("error (process 1): ")


# --- in a process of its own ---


def test_planning_waits_for_no_torch(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    code = (
        "import sys\nfrom understudy.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'\n"
    )
    for words in (["--help"], ["compress", "--help"], ["plan", place / "stats", "--ratio", 0.5, "--out", out]):
        command = [sys.executable, "-c", code, *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert out.exists()


def test_planning_is_quick(place: Path, tmp_path: Path) -> None:
    times = []
    for number in range(3):
        start = time.perf_counter()
        assert shell("plan", place / "stats", "--ratio", 0.5, "--out", tmp_path / f"{number}").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 3, "under one second where nothing else runs"


def test_streams_of_a_real_run(place: Path, tmp_path: Path) -> None:
    words = ["compress", "model", "--data", "notes.jsonl", *SMALL, "--ratio", "0.5", "--out", tmp_path / "out"]
    result = shell(*words, "--json", folder=place)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["replaced"] == 12
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines())
    result = shell(*words, folder=place)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Usage" in shell("calibrate", "model", folder=place).stderr


def test_a_closed_pipe_is_no_error(place: Path) -> None:
    command = f"{sys.executable} -m understudy show {place / 'plan.yaml'} --json | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr
