"""Reading model folders: what is there is read as safetensors reads it, and what is wrong gets one clear line."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import small
import zoo
from understudy.checkpoint import INDEX, SINGLE, Checkpoint, resolve
from understudy.errors import CheckpointError, UnderstudyError, UnsupportedModelError
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import calibrate


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.model_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, or the header of a shard without touching the data after it."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        loaded = json.loads(raw)
        path.write_text(json.dumps(change(loaded) or loaded))
        return
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in sorted(header.items()) if k != "__metadata__")


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def point(folder: Path, where: Any) -> None:
    """Let the index name another file for its first tensor."""
    rewrite(folder / INDEX, lambda i: i["weight_map"].update({next(iter(i["weight_map"])): where}))


def overlap(header: dict[str, Any]) -> None:
    spans = sorted((v["data_offsets"], k) for k, v in header.items() if k != "__metadata__")
    size = spans[0][0][1] - spans[0][0][0]
    target = next(k for (a, b), k in spans[1:] if b - a == size)
    header[target]["data_offsets"] = spans[0][0]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "model: no such model folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json, so it is not a model folder"),
    "config is not JSON": (lambda f: cut(f / "config.json", 50), r"config\.json: not valid JSON .*fetch this file"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: not a JSON object"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), r"config\.json: not valid JSON"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        r"config\.json: cannot be read \(Is a directory\)",
    ),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        rf"has neither {SINGLE} nor {INDEX}; only safetensors are read, convert it first",
    ),
    "missing shard": (lambda f: shard(f).unlink(), r"model-00002.*\.safetensors: this shard is missing; fetch"),
    "truncated shard": (lambda f: cut(shard(f), -10), r"model-00002.*: truncated, \d+ bytes where its header"),
    "truncated header": (lambda f: cut(shard(f), 100), r"model-00002.*: truncated \(100 bytes, header missing\)"),
    "truncated length": (lambda f: cut(shard(f), 5), r"model-00002.*: truncated \(5 bytes"),
    "empty shard": (lambda f: cut(shard(f), 0), r"model-00002.*: truncated \(0 bytes"),
    "bytes too many": (lambda f: shard(f).open("ab").write(b"more"), r"model-00002.*: corrupt, \d+ bytes where its"),
    "a web page": (
        lambda f: shard(f).write_bytes((40).to_bytes(8, "little") + b"<!DOCTYPE html>" * 90),
        r"model-00002.*: not a safetensors file \(its header is not JSON\); fetch this file again",
    ),
    "header is a list": (lambda f: rewrite(shard(f), lambda h: [1]), "not a safetensors file"),
    "entry without dtype": (lambda f: rewrite(shard(f), lambda h: first(h).pop("dtype") and None), "corrupt header at"),
    "negative shape": (
        lambda f: rewrite(shard(f), lambda h: first(h).update(shape=[-1, -1])),
        "corrupt header at tensor",
    ),
    "wrong size": (
        lambda f: rewrite(shard(f), lambda h: first(h).update(shape=[3])),
        "corrupt header, the size of tensor .* does not fit its shape",
    ),
    "overlap": (lambda f: rewrite(shard(f), overlap), "corrupt header, its tensors overlap or leave gaps; fetch this"),
    "unknown dtype": (
        lambda f: rewrite(shard(f), lambda h: first(h).update(dtype="F4")),
        "has dtype F4, which is not supported; use the float32, bfloat16 or float16 checkpoint",
    ),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), r"index\.json: has no weight_map"),
    "index is not JSON": (lambda f: cut(f / INDEX, 99), r"index\.json: not valid JSON"),
    "index names a tensor too many": (
        lambda f: rewrite(f / INDEX, lambda i: i["weight_map"].update(ghost=shard(f).name)),
        "1 tensors of the index are in no shard, the first is 'ghost'; fetch the folder again",
    ),
    "index points up": (lambda f: point(f, "../other.safetensors"), r"points outside its folder \('\.\./other"),
    "index points to root": (lambda f: point(f, "/etc/passwd"), r"points outside its folder \('/etc/passwd'\)"),
    "index points down": (lambda f: point(f, "a/b.safetensors"), "points outside its folder"),
    "index points up, Windows": (lambda f: point(f, "..\\other.safetensors"), "points outside its folder"),
    "index points nowhere": (lambda f: point(f, ["x"]), "missing|outside"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_gets_one_clear_line(case: str, folder: Path) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_shard_that_ends_while_it_is_read(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    last = max((e for e in checkpoint.entries.values() if e.file == shard(folder).name), key=lambda e: e.start)
    cut(shard(folder), -1)
    with pytest.raises(CheckpointError, match=f"model-00002.*: ends inside tensor '{re.escape(last.name)}'; fetch"):
        checkpoint.read(last.name)
    shard(folder).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*: cannot be read"):
        checkpoint.read(last.name)


def test_a_shard_that_ends_while_a_layer_is_loaded(folder: Path) -> None:
    skeleton = Skeleton(folder)
    for path in folder.glob("*.safetensors"):
        cut(path, -1)
    with pytest.raises(CheckpointError, match=r"model-0000\d.*: ends inside tensor .*; fetch this file") as caught:
        load_all(skeleton)
    assert "\n" not in str(caught.value)


def load_all(skeleton: Skeleton) -> None:
    for part in range(-1, zoo.LAYERS):
        with skeleton.resident(part):
            pass


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(5, 7, generator=generator),
        "stack": torch.randn(3, 4, 5, generator=generator).bfloat16(),
        "half": torch.randn(3, generator=generator).half(),
        "double": torch.randn(2, 2, generator=generator).double(),
        "ids": torch.arange(6).reshape(2, 3),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    with safe_open(tmp_path / SINGLE, framework="pt") as f:
        assert set(checkpoint.entries) == set(f.keys())
        for name in checkpoint.entries:
            own, lazy = f.get_slice(name), checkpoint.lazy(name)
            assert lazy.get_dtype() == own.get_dtype()
            assert lazy.get_shape() == own.get_shape() == list(checkpoint.entries[name].shape)
            assert checkpoint.entries[name].numel == tensors[name].numel()
            for value in (checkpoint.read(name), lazy[...]):
                assert value.dtype == tensors[name].dtype
                assert torch.equal(value, f.get_tensor(name))
            if tensors[name].ndim and tensors[name].numel():
                assert torch.equal(lazy[1:], own[1:])
    entry = checkpoint.entries["matrix"]
    assert bytes(checkpoint.raw(entry, 28, 28)) == tensors["matrix"][1].numpy().tobytes()


def test_fingerprint_knows_weights_and_not_shards(source: Path, tmp_path: Path) -> None:
    tensors = {k: v for p in source.glob("*.safetensors") for k, v in load_file(p).items()}

    def printed(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / SINGLE)
        shutil.copyfile(source / "config.json", tmp_path / "config.json")
        return Checkpoint(tmp_path).fingerprint

    own = Checkpoint(source).fingerprint
    assert printed(tensors) == own
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    assert printed(tensors | {name: tensors[name] * 1.01}) != own
    assert printed(tensors | {name: tensors[name].half()}) != own
    assert printed(tensors | {name: tensors[name].T.contiguous()}) != own
    assert printed({k.replace("layers.2.", "layers.9."): v for k, v in tensors.items()}) != own
    swapped = {name: tensors[name.replace(".5.", ".6.")], name.replace(".5.", ".6."): tensors[name]}
    assert printed(tensors | swapped) != own


def test_fingerprint_looks_at_every_expert_of_a_stack(tmp_path: Path) -> None:
    folder = small.model_folder(tmp_path / "stacked", "granitemoe")
    name = next(n for n, e in Checkpoint(folder).entries.items() if len(e.shape) == 3 and e.shape[0] == zoo.EXPERTS)
    own, path = Checkpoint(folder).fingerprint, folder / Checkpoint(folder).entries[name].file
    tensors = load_file(path)
    tensors[name][4] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    assert Checkpoint(folder).fingerprint != own


def test_a_single_file_beside_an_index_wins_as_in_transformers(folder: Path) -> None:
    tensors = {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}
    save_file({k: v + 1 for k, v in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})
    loaded = zoo.model_class("olmoe").from_pretrained(folder).state_dict()
    name = "model.norm.weight"
    assert torch.equal(Checkpoint(folder).read(name), loaded[name])


def test_files_that_belong_to_the_model(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name in ("LICENSE", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "modeling_own.py"):
        (folder / name).write_text("x")
    for name in ("README.md", "old.bin", "pytorch_model.bin.index.json", ".gitattributes", "consolidated.safetensors"):
        (folder / name).write_text("x")
    (folder / "runs").mkdir()
    assert {str(p.relative_to(folder)) for p in Checkpoint(folder).other_files} == {
        "LICENSE",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_own.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def nobody(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("touched the network")


def test_a_local_folder_never_touches_the_network(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, nobody)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.chdir(source.parent)
    assert resolve(source) == source
    assert resolve("model") == Path("model")
    data = small.text_file(tmp_path / "text.txt")
    calibrate("model", tmp_path / "stats.safetensors", data=data, samples=2, seq_len=8)


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: no such folder, and the hub could not") as caught:
        resolve("nobody/nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert resolve("somebody/something") == tmp_path


@pytest.mark.parametrize("name", ["gone", "./gone", "/gone/gone", "a/b/c", "~/gone/gone"])
def test_what_is_neither_folder_nor_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nobody)
    with pytest.raises(CheckpointError, match="no such model folder, and not the form of a hub id"):
        resolve(name)


QUANTISED: dict[str, Callable[[Path], Any]] = {
    "fp8": lambda f: rewrite(f / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"})),
    "mxfp4": lambda f: rewrite(
        f / "config.json", lambda c: c.update(text_config={"quantization_config": {"quant_method": "mxfp4"}})
    ),
    "F8_E4M3": lambda f: retype(shard(f), torch.float8_e4m3fn),
    "U8": lambda f: retype(shard(f), torch.uint8),
}


def retype(path: Path, dtype: torch.dtype) -> None:
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_weights_are_refused(how: str, folder: Path) -> None:
    QUANTISED[how](folder)
    message = rf"quantised weights \({how}\) are not supported; use the float32, bfloat16 or float16 checkpoint"
    with pytest.raises(CheckpointError, match=message):
        Skeleton(folder)


def test_weights_that_do_not_fit_the_model(folder: Path) -> None:
    tensors = load_file(shard(folder))
    name = next(k for k in tensors if "experts" in k)
    save_file({k: v for k, v in tensors.items() if k != name}, shard(folder), metadata={"format": "pt"})
    rewrite(folder / INDEX, lambda i: i["weight_map"].pop(name) and None)
    skeleton = Skeleton(folder)
    with pytest.raises(CheckpointError, match=r"layers\.\d.*are incomplete or do not fit") as caught:
        load_all(skeleton)
    assert "\n" not in str(caught.value)
    save_file(tensors | {name: tensors[name][:3].clone()}, shard(folder), metadata={"format": "pt"})
    rewrite(folder / INDEX, lambda i: i["weight_map"].update({name: shard(folder).name}))
    skeleton = Skeleton(folder)
    with pytest.raises(CheckpointError, match=r"layers\.\d.*are incomplete or do not fit") as caught:
        load_all(skeleton)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_moe"}, "transformers cannot read its config"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "not a Mixture-of-Experts model"),
        ({"num_experts": "many"}, "transformers cannot read its config .*num_experts"),
        ({"hidden_act": "no_such_function"}, "no language model class for .*no_such_function"),
    ],
)
def test_configs_that_make_no_model(changes: dict[str, Any], message: str, folder: Path) -> None:
    rewrite(folder / "config.json", lambda c: c.update(changes))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        Skeleton(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "float8_e4m3fn"}, {"device": "nowhere"}])
def test_settings_that_make_no_sense(options: dict[str, str], source: Path) -> None:
    with pytest.raises(UnderstudyError, match=f"--{next(iter(options))}"):
        Skeleton(source, **options)  # type: ignore[arg-type]


def test_an_experts_implementation_that_does_not_exist(source: Path) -> None:
    with pytest.raises(UnderstudyError, match="--experts no_such_way"):
        Skeleton(source, experts="no_such_way")
