"""Inspection: what is found in a model, what can be done with it, and that what is foretold comes true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
import understudy
from contract import tiny_folder
from understudy.checkpoint import Checkpoint
from understudy.errors import CheckpointError, UnsupportedModelError
from understudy.stages.inspect import inspect


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("inspect") / "model")


def test_what_is_found(olmoe: Path) -> None:
    found = inspect(olmoe)
    checkpoint = Checkpoint(olmoe)
    in_experts = sum(e.nbytes for name, e in checkpoint.entries.items() if ".experts." in name)
    assert found.family == "olmoe"
    assert found.architecture == "OlmoeForCausalLM"
    assert found.dtype == "float32"
    assert found.decoder_layers == tiny.LAYERS
    assert list(found.layers) == ["0", "1", "2"]
    layer = found.layers["1"]
    assert (layer.experts, layer.top_k, layer.hidden, layer.width) == (tiny.EXPERTS, tiny.TOP_K, 32, 16)
    assert (layer.groups, layer.shared, layer.stand_ins) == (1, (), 0)
    assert found.bytes["total"] == found.bytes["load"] == checkpoint.nbytes
    assert (found.bytes["routed"], found.bytes["other"]) == (in_experts, checkpoint.nbytes - in_experts)
    assert found.params["total"] == checkpoint.nbytes // 4
    assert found.params["routed"] == in_experts // 4
    idle = (tiny.EXPERTS - tiny.TOP_K) * in_experts // tiny.EXPERTS // 4
    assert found.params["active"] == found.params["total"] - idle
    assert found.vllm is None
    assert not found.has_stand_ins
    assert found.fingerprint == checkpoint.fingerprint


def test_plain_data(olmoe: Path) -> None:
    data = inspect(olmoe).to_dict()
    assert data == json.loads(json.dumps(data, default=list)) | {"layers": data["layers"]}
    assert data["experts"] == tiny.LAYERS * tiny.EXPERTS
    assert "facts" not in data


@pytest.mark.parametrize("kind", ["constant", "drop"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_size_that_is_foretold_is_the_size_that_is_written(
    olmoe: Path, kind: str, ratio: float, tmp_path: Path
) -> None:
    data = tiny.make_text(tmp_path)
    out = tmp_path / "out"
    understudy.compress(olmoe, out, data=data, samples=2, seq_len=16, ratio=ratio, kind=kind)
    foretold = inspect(olmoe).kinds[kind].expected[str(ratio)]
    assert foretold == {"disk": Checkpoint(out).nbytes, "load": Checkpoint(out).nbytes}


def test_what_cannot_be_met_is_not_foretold(olmoe: Path, tmp_path: Path) -> None:
    drop = inspect(olmoe).kinds["drop"]
    assert drop.most == 1 - tiny.TOP_K / tiny.EXPERTS
    wide = tiny_folder("zaya", tmp_path / "zaya")
    kinds = inspect(wide).kinds
    assert kinds["constant"].possible
    assert not kinds["drop"].possible
    assert kinds["drop"].reason
    assert kinds["drop"].expected == {}


def test_groups_and_shared_experts(tmp_path: Path) -> None:
    found = inspect(tiny_folder("deepseek_v3", tmp_path / "model"))
    layer = next(iter(found.layers.values()))
    assert len(found.layers) < found.decoder_layers
    assert layer.groups > 1
    assert [name.rpartition(".")[2] for name in layer.shared] == ["shared_experts"]
    assert found.kinds["drop"].expected["0.25"] is not None


def test_layouts_that_vllm_does_not_read(tmp_path: Path) -> None:
    assert inspect(tiny_folder("mixtral", tmp_path / "single")).vllm is None
    assert "stacked" in str(inspect(tiny_folder("granitemoe", tmp_path / "stacked")).vllm)


def test_what_has_no_place_in_the_model_is_not_loaded(olmoe: Path, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.mtp.weight"] = tensors["lm_head.weight"][:10].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = inspect(folder)
    assert found.bytes["total"] - found.bytes["load"] == 10 * 32 * 4
    expected = found.kinds["constant"].expected["0.5"]
    assert expected is not None
    assert expected["disk"] - expected["load"] == 10 * 32 * 4


def test_a_compressed_folder(olmoe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    understudy.compress(olmoe, out, data=tiny.make_text(tmp_path), samples=2, seq_len=16, ratio=0.25)
    found = inspect(out)
    assert found.has_stand_ins
    assert found.facts is None
    assert {layer.stand_ins for layer in found.layers.values()} == {2}
    assert {layer.experts for layer in found.layers.values()} == {tiny.EXPERTS}
    entries = Checkpoint(out).entries
    assert found.bytes["routed"] == sum(e.nbytes for n, e in entries.items() if ".experts." in n or "novices" in n)
    assert not any(kind.possible for kind in found.kinds.values())


def test_what_is_refused(olmoe: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="not a Mixture-of-Experts model"):
        inspect(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no such model folder"):
        inspect(tmp_path / "none")
