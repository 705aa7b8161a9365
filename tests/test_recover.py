"""Recover, end to end on tiny models: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
from contract import calibrated, ids_of, load, plan_of, tensors_of, without_understudy
from small import beside, hashes, model_folder, text_file
from understudy.errors import PlanError, UnderstudyError
from understudy.experts import StandInExperts
from understudy.plans import Plan
from understudy.skeleton import Skeleton
from understudy.stages import recover as stage
from understudy.standins import MERGED
from understudy.training import trainable
from understudy.training.fading import set_beta
from understudy.training.whole import keep_originals, load_whole

HOW = {"steps": 6, "batch": 2, "seq_len": 16, "lr": 1e-2, "save_every": 3, "held_out": 0.1, "device": "cpu"}


class Made:
    """A model, statistics of it, and text."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, model_type: str = "olmoe") -> None:
        self.folder, self.model_type = folder, model_type
        self.model = model_folder(folder / "model", model_type, dtype)
        self.text = text_file(folder / "train.txt", 800)
        self.stats = calibrated(self.model, folder / "work", ids_of(), extra=["channels", "dense", "low_rank"])

    def cut(self, name: str, entries: dict[str, Any], **how: Any) -> Path:
        """Replace experts 0 to 3 of every layer."""
        plan = plan_of(self.stats, dict.fromkeys(self.stats.model.layers, entries))
        plan = Plan(**plan.model_dump() | {"how": how or plan.how})
        return understudy.apply(self.model, plan, self.folder / name, stats=self.stats).folder

    def shared(self, name: str = "cut") -> Path:
        return self.cut(name, {"shared_base": [[0, 1], [2, 3, 4]]})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("recover"))


@pytest.fixture(scope="module")
def cut(made: Made) -> Path:
    return made.shared()


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constant": ({"constant": [0, 1, 2]}, {}),
    "slim": ({"slim": {0: 8, 1: 8, 3: 0}}, {"slim": {"constant": True}}),
    "merge": ({"merge": [[0, 1], [2, 3, 4]]}, {}),
    "low_rank": ({"low_rank": {0: 4, 1: 2, 3: 4}}, {}),
    "shared_base": ({"shared_base": [[0, 1], [2, 3, 4]]}, {"shared_base": {"rank": 3}}),
    "adapters": ({"shared_base": [[0, 1, 2]]}, {"shared_base": {"rank": 3, "base": False}}),
    "residual": ({"shared_base": [[0, 1], [2, 3, 4]]}, {"shared_base": {"rank": 3, "start": "residual"}}),
    "several": (
        {"constant": [5], "slim": {6: 8}, "merge": [[0, 1]], "shared_base": [[2, 3]], "low_rank": {4: 3}},
        {"shared_base": {"rank": 2}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("what", ["stand-ins", "stand-ins+lora"])
def test_what_is_written_is_what_was_trained(
    made: Made, name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder gives the logits of the live model at the end; all that was not trained is the source's bytes."""
    entries, how = KINDS[name]
    folder = made.cut(str(tmp_path / "cut"), entries, **how)
    live = _keep_live(monkeypatch)
    understudy.recover(folder, tmp_path / "out", train=made.text, train_what=what, **_unfaded(folder), **HOW)
    ids = ids_of()
    with torch.no_grad():
        got = load(tmp_path / "out", "olmoe")(input_ids=ids, use_cache=False).logits
        expected = live[0].eval()(input_ids=ids, use_cache=False).logits
        before = load(folder, "olmoe")(input_ids=ids, use_cache=False).logits
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (got - before).abs().max() > 1e-3 * before.abs().max(), "nothing was learnt"
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed and all(".experts." in k or "novices" in k for k in changed)
    if what == "stand-ins" and name != "several":
        kept = [e for e in range(8) if e not in {i for x in _flat(entries) for i in x}]
        assert not any(f".experts.{e}." in k for k in changed for e in kept), "a kept expert was trained"


def _unfaded(folder: Path) -> dict[str, Any]:
    """Without an end ratio where there are bases that would fade in."""
    config = json.loads((folder / "config.json").read_text())
    return {"end_ratio": (0.0,)} if '"shared-v1", "into"' in json.dumps(config) else {}


def _flat(entries: dict[str, Any]) -> list[tuple[int, ...]]:
    from understudy.entries import ids_of as ids_in
    from understudy.entries import read_entries

    return [ids_in(entry) for entry in read_entries("0", entries, 8).values()]


def _keep_live(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    live: list[Any] = []
    own = stage.load_whole

    def kept(skeleton: Skeleton) -> Any:
        live.append(own(skeleton))
        return live[-1]

    monkeypatch.setattr(stage, "load_whole", kept)
    return live


def test_in_the_dtype_of_the_source(tmp_path: Path) -> None:
    made = Made(tmp_path, torch.bfloat16)
    understudy.recover(made.shared(), tmp_path / "out", train=made.text, end_ratio=(0.0,), **HOW)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("what", ["lora", "experts", "router", "all"])
def test_an_uncompressed_model_trains_too(made: Made, what: str, tmp_path: Path) -> None:
    understudy.recover(made.model, tmp_path / "out", train=made.text, train_what=what, **HOW)
    old, new = tensors_of(made.model), tensors_of(tmp_path / "out")
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    inside = {"lora": ".experts.", "experts": ".experts.", "router": ".gate.weight", "all": ""}[what]
    assert set(old) == set(new) and changed and all(inside in k for k in changed)
    assert understudy.inspect(tmp_path / "out").facts is not None, "an ordinary model stays one"


def test_at_the_start_of_fading_the_model_is_the_original(made: Made, cut: Path) -> None:
    model = _fading(made, cut)
    ids = ids_of()
    with torch.no_grad():
        original = load(made.model, "olmoe")(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, original)
        set_beta(model, 0.5)
        half = model(input_ids=ids, use_cache=False).logits
        set_beta(model, 0.0)
        gone = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(half, original) and not torch.equal(half, gone)
    with torch.no_grad():
        compressed = load(cut, "olmoe")(input_ids=ids, use_cache=False).logits
    assert (gone - compressed).abs().max() <= 1e-5 * compressed.abs().max()


def _fading(made: Made, cut: Path) -> Any:
    student = Skeleton(cut, dtype="float32", device="cpu")
    model = load_whole(student).eval()
    trainable.prepare(model, student.layers, "stand-ins+lora", 2, 0)
    keep_originals(model, student, Skeleton(made.model, dtype="float32", device="cpu"))
    return model


def test_gone_originals_have_no_influence(made: Made, cut: Path, tmp_path: Path) -> None:
    """What the teacher holds matters while it fades out, and not where it is never there."""
    other = shutil.copytree(made.model, tmp_path / "other")
    _perturb_experts(other)
    outs = {}
    for name, end in (("never", 0.0), ("fading", 0.5)):
        for teacher in (made.model, other):
            model = _with_teacher(cut, teacher, tmp_path)
            out = tmp_path / f"{name}-{teacher.name}"
            given = {} if end == 0 else {"teacher": teacher}
            understudy.recover(model, out, train=made.text, end_ratio=(end,), **given, **HOW)
            outs[name, teacher.name] = tensors_of(out)
    assert _equal(outs["never", "model"], outs["never", "other"])
    assert not _equal(outs["fading", "model"], outs["fading", "other"])


def _perturb_experts(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = {k: v + 0.1 * torch.ones_like(v) if ".experts." in k else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def _with_teacher(cut: Path, teacher: Path, work: Path) -> Path:
    """The compressed model, said to be made from this one."""
    folder = work / f"cut-{teacher.name}"
    if not folder.exists():
        shutil.copytree(cut, folder)
        plan = folder / "understudy" / "plan.yaml"
        old = Skeleton(cut.parent / "model").checkpoint.fingerprint
        plan.write_text(plan.read_text().replace(old, Skeleton(teacher).checkpoint.fingerprint))
    return folder


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_of_several_end_ratios_the_best_is_written_and_all_are_reported(made: Made, cut: Path, tmp_path: Path) -> None:
    found = understudy.recover(cut, tmp_path / "out", teacher=made.model, train=made.text, end_ratio="0,0.5", **HOW)
    assert [run["end_ratio"] for run in found.runs] == [0.0, 0.5]
    losses = [run["held_out"]["loss"] for run in found.runs]
    assert losses[found.chosen] == min(losses) and f"{losses[0]:.4f}" in found.notes[-1]
    end = found.runs[found.chosen]["end_ratio"]
    teacher = {"teacher": made.model} if end else {}
    understudy.recover(cut, tmp_path / "alone", train=made.text, end_ratio=(end,), **teacher, **HOW)
    assert _equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "alone"))
    facts = json.loads((tmp_path / "out" / "understudy" / "recovery.json").read_text())
    assert len(facts["runs"]) == 2 and len(facts["runs"][0]["losses"]) == HOW["steps"]
    assert "## Recovery" in (tmp_path / "out" / "README.md").read_text()


def test_distils_into_constants(made: Made, tmp_path: Path) -> None:
    folder = made.cut(str(tmp_path / "cut"), {"constant": [0, 1, 2, 3]})
    more = HOW | {"steps": 30, "lr": 3e-2}
    found = understudy.recover(folder, tmp_path / "out", teacher=made.model, train=made.text, loss="kd", **more)
    metrics = [
        understudy.eval(f, against=made.model, data=(made.text,), samples=8, seq_len=16, examples=0)
        for f in (folder, tmp_path / "out")
    ]
    assert metrics[1].kl < 0.9 * metrics[0].kl
    assert found.runs[0]["held_out"]["kd"] > 0


def test_an_interrupted_call_goes_on(made: Made, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two runs fails; the next call does that one only, and the result is that of an undisturbed call."""
    from understudy.training import loop

    own, calls = loop.train, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(options["fade"].end_ratio)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*args, **options)

    options: dict[str, Any] = {"teacher": made.model, "train": made.text, "end_ratio": "0.5,0", **HOW}
    before = hashes(cut)
    monkeypatch.setattr(loop, "train", failing)
    with pytest.raises(KeyboardInterrupt):
        understudy.recover(cut, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    understudy.recover(cut, tmp_path / "out", **options)
    assert calls == [0.5, 0.0, 0.0]
    monkeypatch.setattr(loop, "train", own)
    understudy.recover(cut, tmp_path / "whole", **options)
    assert _equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))
    assert beside(tmp_path / "out") == {"whole"} and hashes(cut) == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"train": ()}, "--train"),
    "no teacher to fade from": ({"end_ratio": "0.2"}, "give the original model with --teacher: the originals fade out"),
    "no teacher by default": ({}, "give the original model with --teacher"),
    "no teacher to distil from": ({"end_ratio": "0", "loss": "kd"}, "--loss kd distils from it"),
    "idle teacher": ({"end_ratio": "0", "teacher": "model"}, "--teacher has no effect"),
    "end ratio": ({"end_ratio": "1.5", "teacher": "model"}, "--end-ratio 1.5"),
    "another teacher": ({"teacher": "other"}, "is another model"),
    "a compressed teacher": ({"teacher": "cut"}, "holds stand-ins itself"),
    "what": ({"end_ratio": "0", "train_what": "heads"}, "--train-what heads: there is no such choice"),
    "rank": ({"end_ratio": "0", "rank": 1000}, "--rank 1000 is more than the"),
    "long": ({"end_ratio": "0", "seq_len": 10**6}, "positions of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(made: Made, cut: Path, tmp_path: Path, name: str) -> None:
    if not (made.folder / "other").exists():
        _perturb_experts(shutil.copytree(made.model, made.folder / "other"))
    options, words = REFUSED[name]
    options = {"train": made.text, **HOW, **options}
    if "teacher" in options:
        options["teacher"] = made.folder / options["teacher"]
    with pytest.raises(UnderstudyError) as error:
        understudy.recover(cut, tmp_path / "out", **options)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_starts_near_its_originals_does_not_fade(made: Made, tmp_path: Path) -> None:
    near = made.cut("near", {"shared_base": [[0, 1], [2, 3, 4]]}, shared_base={"rank": 3, "start": "residual"})
    with pytest.raises(UnderstudyError, match="--end-ratio has no effect: what shares bases starts near its originals"):
        understudy.recover(near, tmp_path / "out", teacher=made.model, train=made.text, end_ratio=(0.2,), **HOW)
    found = understudy.recover(near, tmp_path / "out", train=made.text, **HOW)
    assert [run["end_ratio"] for run in found.runs] == [0.0]


def test_what_has_no_effect_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UnderstudyError, match="--end-ratio has no effect"):
        understudy.recover(made.model, tmp_path / "out", train=made.text, end_ratio=(0.2,), **HOW)
    dropped = made.cut(str(tmp_path / "cut"), {"drop": [0, 1]})
    with pytest.raises(UnderstudyError, match="--train-what stand-ins: there is nothing of that kind"):
        understudy.recover(dropped, tmp_path / "out", train=made.text, train_what="stand-ins", **HOW)
    merged = made.cut(str(tmp_path / "merged"), {"merge": [[0, 1]]})
    with pytest.raises(UnderstudyError, match="--weight-decay would shrink"):
        understudy.recover(merged, tmp_path / "out", train=made.text, weight_decay=0.1, **HOW)


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "qwen2_moe"])
def test_condensed_layers_are_trained_and_nothing_else(model_type: str, tmp_path: Path) -> None:
    """Native, folded into a dense layer, and with a gated shared expert (CD-MoE, METHODS 4.6)."""
    made = Made(tmp_path, model_type=model_type)
    layers = {list(made.stats.model.layers)[1]: {"condense": {3: 0.3, 5: 0.2} | dict.fromkeys([0, 1, 2, 4, 6, 7], 0)}}
    folder = understudy.apply(made.model, plan_of(made.stats, layers), tmp_path / "cut", stats=made.stats).folder
    found = understudy.recover(folder, tmp_path / "out", train=made.text, **HOW)
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    (key,) = layers
    assert found.train_what == "stand-ins" and changed
    assert all(f".layers.{key}." in k and ("expert" in k or "mlp." in k) for k in changed)
    assert not any("shared_expert_gate" in k for k in changed)
    assert any("shared_expert." in k for k in changed) == (model_type == "qwen2_moe")


@pytest.mark.parametrize("name", ["shared_base", "merge", "adapters"])
def test_materialised_it_loads_anywhere(made: Made, name: str, tmp_path: Path) -> None:
    entries, how = KINDS[name]
    folder = made.cut(str(tmp_path / "cut"), entries, **how)
    told = {"train": made.text, **_unfaded(folder), **HOW}
    understudy.recover(folder, tmp_path / "native", **told)
    found = understudy.recover(folder, tmp_path / "full", materialise=True, **told)
    assert "nothing is saved" in found.notes[-1]
    assert {k: v.shape for k, v in tensors_of(tmp_path / "full").items()} == {
        k: v.shape for k, v in tensors_of(made.model).items()
    }
    ids = ids_of()
    with torch.no_grad():
        expected = load(tmp_path / "native", "olmoe")(input_ids=ids, use_cache=False).logits
        with without_understudy():
            got = load(tmp_path / "full", "olmoe")(input_ids=ids, use_cache=False).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_vectors_cannot_be_materialised(made: Made, tmp_path: Path) -> None:
    folder = made.cut(str(tmp_path / "cut"), {"constant": [0]})
    with pytest.raises(PlanError, match="becomes a vector"):
        understudy.recover(folder, tmp_path / "out", train=made.text, materialise=True, **HOW)
    assert not list(tmp_path.glob(".out*"))


def test_only_merged_rows_are_trained(made: Made, tmp_path: Path) -> None:
    folder = made.cut(str(tmp_path / "cut"), {"merge": [[0, 1]]})
    skeleton = Skeleton(folder, dtype="float32", device="cpu")
    model = load_whole(skeleton)
    trainable.prepare(model, skeleton.layers, "stand-ins", 1, 0)
    model(input_ids=ids_of(), use_cache=False).logits.square().sum().backward()
    experts = [m for m in model.modules() if isinstance(m, StandInExperts)]
    for module in experts:
        rows = [row for row, e in enumerate(module.kept) if e in module.stand_ins]
        assert [module.stand_ins[module.kept[row]].format for row in rows] == [MERGED]
        gradient = module.down_proj.grad
        assert gradient[rows].abs().sum() > 0
        assert gradient.abs().sum() == gradient[rows].abs().sum()
