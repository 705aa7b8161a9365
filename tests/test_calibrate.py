"""Calibration: sums that do not depend on how the text is cut up, and one clear line for what cannot be calibrated."""

from __future__ import annotations

import json
import logging
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import small
import zoo
from contract import hooked_stats, plan_of
from understudy import activations
from understudy.activations import ActivationStore
from understudy.errors import CheckpointError, DataError, NumericError, OutputError, StatsError, UnderstudyError
from understudy.held import held
from understudy.layout import model_facts
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stages import calibrate as stage
from understudy.stages.apply import apply
from understudy.stages.calibrate import calibrate, collect
from understudy.stats import ExpertStats, Stats, load_stats
from understudy.tap import batch_stats
from understudy.walk import Walk

TEXT: dict[str, Any] = {"samples": 6, "seq_len": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.model_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.text_file(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def tokens(rows: int, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(
    folder: Path, ids: torch.Tensor, work: Path, *, dtype: str = "auto", experts: str = "auto", **settings: Any
) -> dict[str, ExpertStats]:
    """Sums by streaming, of given tokens."""
    skeleton = Skeleton(folder, dtype=dtype, experts=experts)
    chosen = Calibration(dtype=dtype, experts=experts, **settings)
    layers, probes = collect(skeleton, model_facts(skeleton, "test"), small.blocks_of(ids), chosen, work)
    assert set(probes) == set(layers)
    return layers


def change(folder: Path, name: str, value: Any) -> None:
    """Set a tensor of a checkpoint, or with a function change it."""
    for path in folder.glob("*.safetensors"):
        if name in (tensors := load_file(path)):
            tensors[name] = value(tensors[name]) if callable(value) else value
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise KeyError(name)


def test_halves_add_up_to_the_whole(source: Path, tmp_path: Path) -> None:
    ids = tokens(10)
    whole = run(source, ids, tmp_path / "whole")
    first, second = (run(source, part, tmp_path / str(len(part))) for part in (ids[:7], ids[7:]))
    small.assert_close({key: first[key] + second[key] for key in first}, whole, 1e-6)
    assert all(layer.tokens == ids.numel() for layer in whole.values())


def test_files_of_halves_add_up_to_the_whole(source: Path, tmp_path: Path) -> None:
    facts = model_facts(Skeleton(source), "test")
    ids = tokens(8)
    saved = [
        Stats(facts, {}, run(source, part, tmp_path / f"{n}")).save(tmp_path / f"{n}.safetensors")
        for n, part in enumerate((ids[:4], ids[4:], ids))
    ]
    a, b, whole = (load_stats(path) for path in saved)
    small.assert_close((a + b).layers, whole.layers, 1e-6)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_batches_do_not_matter(batch_size: int, source: Path, tmp_path: Path) -> None:
    ids = tokens(9)
    one = run(source, ids, tmp_path / "one", batch_size=1)
    small.assert_close(run(source, ids, tmp_path / "many", batch_size=batch_size), one, 1e-5)


def test_spilled_activations_give_the_same_bits(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mapped, load = tokens(6), [], activations._load
    monkeypatch.setattr(activations, "_load", lambda path: mapped.append(path.name[5]) or load(path))
    held_in_memory = run(source, ids, tmp_path / "memory", batch_size=2)
    assert not mapped
    for limit, expected in (("0B", {"0", "1", "2"}), ("8KB", {"1", "2"})):  # a batch has 3072 bytes, and is there twice
        mapped.clear()
        spilled = run(source, ids, tmp_path / limit, batch_size=2, activation_memory=limit)
        small.assert_close(spilled, held_in_memory, 0, exact=True)
        assert set(mapped) == expected


def test_spilled_activations_leave_nothing(tmp_path: Path) -> None:
    store = ActivationStore(0)
    folder = store.folder
    for layer in range(3):
        for number in range(4):
            store.put(number, (torch.full((2, 3), float(layer)), {"more": torch.ones(2), "none": None}))
        store.commit(layer)
        assert len(list(folder.rglob("*.safetensors"))) == 4, "an older layer is still there"
        hidden, more = store.get(3)
        assert hidden.eq(layer).all()
        assert more["none"] is None
    del store, hidden, more
    assert not folder.exists()


@pytest.mark.parametrize("groups", [(), ("sets", "dense")])
def test_a_resumed_run_gives_the_same_bits(
    groups: tuple[str, ...], source: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEXT, "collect", groups)
    calibrate(source, tmp_path / "whole.st", data=data, **TEXT)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "out.st", data=data, **TEXT, progress=interrupt)
    assert small.beside(tmp_path / "out.st") == {".out.st.partial", "whole.st"}
    calibrate(source, tmp_path / "out.st", data=data, **TEXT, progress=lambda done, total: seen.append(done))
    assert seen == [2, 3, 4]
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "whole.st").read_bytes()
    assert small.beside(tmp_path / "out.st") == {"whole.st"}


def test_killed_while_it_tidies_up(source: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    calibrate(source, tmp_path / "whole.st", data=data, **TEXT)
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, tmp_path / "out.st", data=data, **TEXT)
    calibrate(source, tmp_path / "out.st", data=data, **TEXT, progress=lambda done, total: seen.append(done))
    assert not seen, "it was all there"
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "whole.st").read_bytes()
    assert small.beside(tmp_path / "out.st") == {"whole.st"}


@pytest.mark.parametrize("broken", ["activations", "sums", "a batch is gone"])
def test_a_damaged_work_folder_is_not_trusted(broken: str, source: Path, data: str, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    calibrate(source, tmp_path / "whole.st", data=data, **TEXT)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "out.st", data=data, **TEXT, progress=interrupt)
    work = tmp_path / ".out.st.partial"
    path = next(work.rglob("stats-1.safetensors" if broken == "sums" else "000001.safetensors"))
    path.unlink() if broken == "a batch is gone" else path.write_bytes(path.read_bytes()[:100])
    seen: list[int] = []
    calibrate(source, tmp_path / "out.st", data=data, **TEXT, progress=lambda done, total: seen.append(done))
    assert seen[0] == 0
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "whole.st").read_bytes()


def test_other_settings_start_anew_and_tidy_up(source: Path, data: str, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    for seed in range(3):
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, tmp_path / "out.st", data=data, **TEXT, seed=seed, progress=interrupt)
        assert len(list((tmp_path / ".out.st.partial").iterdir())) == 1
    seen: list[int] = []
    calibrate(source, tmp_path / "out.st", data=data, **TEXT, seed=9, progress=lambda done, total: seen.append(done))
    assert seen[0] == 0
    assert not small.beside(tmp_path / "out.st")


def test_other_groups_are_another_run(source: Path, data: str, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def note(done: int, total: int) -> None:
        seen.append(done)

    base, seen = shutil.copytree(source, tmp_path / "base"), []
    for more in ({"collect": ("sets",)}, {"collect": ("dense",)}, {"dense_tokens": 5}, {"base": str(base)}):
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, tmp_path / "out.st", data=data, **TEXT, progress=interrupt)
        seen.clear()
        calibrate(source, tmp_path / "out.st", data=data, **TEXT, **more, progress=note)
        assert seen[0] == 0, more
        (tmp_path / "out.st").unlink()


def test_one_run_for_one_output(source: Path, data: str, tmp_path: Path) -> None:
    target = tmp_path / "out.st"
    with held(target) as work:
        for _ in range(2):
            with pytest.raises(OutputError, match=r"out\.st: another run is writing it"):
                calibrate(source, target, data=data, **TEXT)
            assert work.is_dir()
    calibrate(source, target, data=data, **TEXT)
    assert not small.beside(target)


def test_bfloat16_runs_in_its_own_dtype(tmp_path: Path, data: str) -> None:
    folder = small.model_folder(tmp_path / "bf16", dtype=torch.bfloat16)
    ids = tokens(6)
    own, wide = run(folder, ids, tmp_path / "own"), run(folder, ids, tmp_path / "wide", dtype="float32")
    key = "0"  # further up, rounding changes routes
    share = np.abs(own[key].count - wide[key].count).sum() / wide[key].count.sum()
    assert share < 0.05
    np.testing.assert_allclose(own[key].norm_sum.sum(), wide[key].norm_sum.sum(), rtol=0.02)
    assert Skeleton(folder).dtype == torch.bfloat16
    calibrate(folder, tmp_path / "stats.st", data=data, **TEXT)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation(model_type: str, experts: str, tmp_path: Path) -> None:
    """The walk is the whole model's run bit for bit, and the sums are those of hooks on the whole model."""
    folder = small.model_folder(tmp_path / "model", model_type, num_experts_per_tok=3)
    ids = tokens(5)
    whole = zoo.model_class(model_type).from_pretrained(folder, experts_implementation=experts).eval()
    skeleton = Skeleton(folder, experts=experts)
    for observe in (None, "tapped"):
        store = ActivationStore(1 << 30)
        walk = Walk(skeleton, ids.numpy(), 2, store)
        if observe:
            facts, work = model_facts(skeleton, "test"), tmp_path / "work"
            settings = Calibration(experts=experts, batch_size=2)
            got, _ = collect(skeleton, facts, small.blocks_of(ids), settings, work)
            assert walk.store.latest(3) is None
            store = ActivationStore(1 << 30, work / "rank-0")
            assert store.resume(zoo.LAYERS - 1, 3)
            walk.store = store
        with walk.ready():
            if not observe:
                walk.through_layers()
            for number, batch in enumerate(torch.split(ids, 2)):
                with torch.no_grad():
                    assert torch.equal(walk.logits(number), whole(input_ids=batch, use_cache=False).logits)
    names = {layer.key: layer.name for layer in skeleton.layers}
    expected = hooked_stats(whole, names, ids, {layer.key: layer.num_experts for layer in skeleton.layers})
    small.assert_close(got, expected, 1e-5)


def test_variance_of_nearly_constant_experts_with_a_huge_mean() -> None:
    rng = np.random.default_rng(0)
    mean_EH = rng.normal(size=(4, 24)) * 1e4
    total, parts = None, []
    for count in (30, 1, 200, 64):
        ids = np.sort(rng.integers(0, 4, count))
        noise = rng.normal(size=(count, 24)) * 0.05 * (1 + ids[:, None])
        y, g = (mean_EH[ids] + noise).astype(np.float32), rng.random(count).astype(np.float32)
        batch = batch_stats(torch.from_numpy(y), torch.from_numpy(g), torch.from_numpy(ids), 4, count)
        total = batch if total is None else total + batch
        parts.append((y.astype(np.float64), g.astype(np.float64), ids))
    y, g, ids = (np.concatenate([p[n] for p in parts]) for n in range(3))
    assert total is not None
    for e in range(4):
        mine, gate = y[ids == e], g[ids == e]
        weighted = (gate[:, None] ** 2 * mine).sum(0) / (gate**2).sum()
        scatter = ((mine - mine.mean(0)) ** 2).sum()
        weighted_scatter = (gate**2 * ((mine - weighted) ** 2).sum(1)).sum()
        np.testing.assert_allclose(total.scatter[e], scatter, rtol=1e-3)
        np.testing.assert_allclose(total.weighted_scatter[e], weighted_scatter, rtol=1e-3)
        np.testing.assert_allclose(total.mean[e], mine.mean(0), rtol=1e-9)
        np.testing.assert_allclose(total.weighted_mean[e], weighted, rtol=1e-8)


def test_one_vector_for_every_token_has_no_variance() -> None:
    y = torch.full((50, 8), 12345.678)
    stats = batch_stats(y, torch.rand(50, generator=torch.Generator().manual_seed(0)), torch.zeros(50).long(), 2, 50)
    assert np.abs(stats.scatter).max() < 1e-6
    assert np.abs(stats.weighted_scatter).max() < 1e-6
    np.testing.assert_allclose(stats.mean[0], y[0].double().numpy(), rtol=1e-12)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_output_that_is_there_is_left_alone(what: str, source: Path, data: str, tmp_path: Path) -> None:
    target = tmp_path / "out.st"
    target.mkdir() if what == "folder" else target.write_text("mine")
    with pytest.raises(OutputError, match=r"out\.st exists already; choose another --out or remove it"):
        calibrate(source, target, data=data, **TEXT)
    assert target.is_dir() or target.read_text() == "mine"
    assert not small.beside(target)


def test_an_output_that_cannot_be_made(source: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out\.st: cannot be written \(Not a directory\)"):
        calibrate(source, tmp_path / "file" / "out.st", data=data, **TEXT)
    calibrate(source, tmp_path / "new" / "deep" / "out.st", data=data, **TEXT)


NAME = "model.layers.2.mlp.experts.5.up_proj.weight"


def spoil(value: float) -> Any:
    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[3, 4] = value
        return tensor

    return spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NAME, "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_broken_weight_is_named(value: float, name: str, folder: Path, data: str, tmp_path: Path) -> None:
    change(folder, name, spoil(value))
    with pytest.raises(NumericError, match=f"model: tensor {re.escape(name)} holds NaN or infinity; the checkpoint"):
        calibrate(folder, tmp_path / "out.st", data=data, **TEXT)
    assert not small.beside(tmp_path / "out.st") - {"model"}


def test_a_weight_too_large_for_the_dtype(folder: Path, data: str, tmp_path: Path) -> None:
    change(folder, NAME, spoil(1e6))
    with pytest.raises(NumericError, match=r"layers\.2.*overflows in torch\.float16; use another --dtype"):
        calibrate(folder, tmp_path / "out.st", data=data, **TEXT, dtype="float16")
    calibrate(folder, tmp_path / "out.st", data=data, **TEXT)


def test_activations_that_overflow_name_their_layer(folder: Path, data: str, tmp_path: Path) -> None:
    change(folder, "model.layers.1.post_attention_layernorm.weight", lambda t: t * 0 + 6e4)
    with pytest.raises(NumericError, match=r"decoder layer 1 puts out NaN or infinity in torch\.float16; try --dtype"):
        calibrate(folder, tmp_path / "out.st", data=data, **TEXT, dtype="float16")
    assert small.beside(tmp_path / "out.st") == {"model"}, "no rerun goes on from there"
    calibrate(folder, tmp_path / "out.st", data=data, **TEXT, dtype="float32")


def test_too_little_text(source: Path, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stats = calibrate(source, tmp_path / "out.st", data=data, samples=2, seq_len=2)
    unseen = sum(int((layer.count == 0).sum()) for layer in stats.layers.values())
    assert f"{unseen} of {zoo.LAYERS * zoo.EXPERTS} experts saw no token" in caplog.text
    short = small.text_file(tmp_path / "short.txt", words=40)
    stats = calibrate(source, tmp_path / "short.st", data=short, samples=8, seq_len=16)
    assert stats.data["notes"] == ["short has only 2 of the 8 blocks that are its share; all are used"]
    assert stats.data["blocks"] == {"short": 2}
    assert all(layer.tokens == 32 for layer in stats.layers.values())
    (tmp_path / "empty.txt").write_text("")
    for name, seq_len, message in (("empty", 16, "is empty"), ("short", 48, "one block needs 48: give more text")):
        with pytest.raises(DataError, match=message):
            calibrate(source, tmp_path / "none.st", data=str(tmp_path / f"{name}.txt"), samples=8, seq_len=seq_len)
    assert not (tmp_path / ".none.st.partial").exists()


def test_sequences_longer_than_the_model(source: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--seq-len 65 is more than the 64 positions of"):
        calibrate(source, tmp_path / "out.st", data=data, samples=2, seq_len=65)


def test_a_tokenizer_with_more_words_than_the_model(folder: Path, data: str, tmp_path: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {w: i + (100 if w == "w50" else 0) for w, i in tokenizer["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="its tokenizer gives ids past its vocabulary of 97"):
        calibrate(folder, tmp_path / "out.st", data=data, **TEXT)


def test_a_folder_without_tokenizer(folder: Path, data: str, tmp_path: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        calibrate(folder, tmp_path / "out.st", data=data, **TEXT)


def test_a_folder_with_stand_ins(source: Path, data: str, tmp_path: Path) -> None:
    stats = calibrate(source, tmp_path / "out.st", data=data, **TEXT)
    made = apply(source, plan_of(stats, {"1": {"constant": [0, 3]}}), tmp_path / "small", stats=stats).folder
    with pytest.raises(StatsError, match="small holds stand-ins already; calibrate the original model"):
        calibrate(made, tmp_path / "again.st", data=data, **TEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: .*got 0"),
        ({"sample": 3}, "sample: .*got 3"),
        ({"activation_memory": "much"}, "'much' is not a size"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"device": "nowhere"}, "--device nowhere"),
        ({"experts": "nothing"}, "--experts nothing"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str, source: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(UnderstudyError, match=message) as caught:
        calibrate(source, tmp_path / "out.st", **(TEXT | {"data": data} | options))
    assert "\n" not in str(caught.value)
    assert not small.beside(tmp_path / "out.st")


def test_statistics_are_saved_whole_or_not_at_all(
    source: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = calibrate(source, tmp_path / "out.st", data=data, **TEXT)
    again = stats.save(tmp_path / "again.st")
    assert again.read_bytes() == (tmp_path / "out.st").read_bytes()
    (tmp_path / "plain").touch()
    assert again.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()
    with pytest.raises(OutputError, match=r"out\.st/x\.st: cannot be written \(File exists\)"):
        stats.save(tmp_path / "out.st" / "x.st")
    (tmp_path / "taken.st").mkdir()
    with pytest.raises(OutputError, match=r"taken\.st: cannot be written \(Is a directory\)"):
        stats.save(tmp_path / "taken.st")
    assert {p.name for p in tmp_path.iterdir()} == {"out.st", "again.st", "taken.st"}


def test_stats_of_other_versions_and_other_files(source: Path, data: str, tmp_path: Path) -> None:
    path = tmp_path / "out.st"
    calibrate(source, path, data=data, **TEXT)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(StatsError, match=r"out\.st: not a statistics file of understudy, or damaged"):
        load_stats(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(StatsError, match=r"statistics of format 9, this version reads 1"):
        load_stats(path)
    with pytest.raises(StatsError, match="no such statistics file"):
        load_stats(tmp_path / "gone.st")


def test_whole_model_logits_after_calibration_are_untouched(source: Path, tmp_path: Path) -> None:
    """Observation leaves no trace in the classes of transformers."""
    before = AutoModelForCausalLM.from_pretrained(source)
    ids = tokens(2)
    with torch.no_grad(), nullcontext():
        expected = before(input_ids=ids).logits
        run(source, ids, tmp_path / "work")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(source)(input_ids=ids).logits, expected)
