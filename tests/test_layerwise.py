"""Layer-by-layer distillation: against a slow reference, what it leaves alone, killed and resumed, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import understudy
from contract import ids_of, load, tensors_of
from small import beside, hashes
from test_recover import HOW, KINDS, Made
from understudy.errors import NumericError, PlanError, UnderstudyError
from understudy.tokens import load_tokenizer
from understudy.training.lessons import lessons

STEPS, LR = 8, 1e-3
LAYERS = {k: v for k, v in HOW.items() if k != "save_every"} | {"loss": "layers", "steps": STEPS, "lr": LR}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("layerwise"))


@pytest.fixture(scope="module")
def cut(made: Made) -> Path:
    return made.cut("slim", SLIM)


SLIM = {"slim": {0: 8, 1: 8, 3: 0}}


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "understudy" / "recovery.json").read_text())


def _run_of(folder: Path) -> dict[str, Any]:
    return _record(folder)["runs"][0]


def test_weights_are_those_of_a_slow_reference(made: Made, cut: Path, tmp_path: Path) -> None:
    """Whole models, hooks, and the optimiser as its documentation says it, one layer after the other."""
    understudy.recover(cut, tmp_path / "out", teacher=made.model, train=made.text, **LAYERS)
    student, teacher = load(cut, "olmoe").eval(), load(made.model, "olmoe").eval()
    train, held = lessons(
        (str(made.text),), load_tokenizer(cut, False), seq_len=16, seed=0, held_out=0.1, limit=2 * STEPS
    )
    order = np.random.default_rng([0, 2]).permutation(len(train))
    ids = [torch.from_numpy(train.ids[order[i : i + 2]]).long() for i in range(0, len(order) // 2 * 2, 2)]
    errors = {}
    for index in range(len(student.model.layers)):
        errors[index] = _train_layer(student, teacher, index, ids, torch.from_numpy(held.ids).long())
    told = {entry["layer"]: (entry["before"], entry["after"]) for entry in _run_of(tmp_path / "out")["layers"]}
    assert told.keys() == errors.keys()
    for index, (before, after) in errors.items():
        assert told[index] == pytest.approx((before, after), rel=1e-3)
    assert sum(after < before for before, after in errors.values()) >= len(errors) // 2
    got = load(tmp_path / "out", "olmoe")
    want = dict(student.named_parameters())
    before = dict(load(cut, "olmoe").named_parameters())
    moved = 0
    for name, p in got.named_parameters():
        assert torch.allclose(p, want[name], atol=2e-5), name
        moved += not torch.equal(p, before[name])
    assert moved >= len(errors) // 2
    figures = _run_of(tmp_path / "out")["held_out"]
    with torch.no_grad():
        both = [m(input_ids=torch.from_numpy(held.ids).long()).logits[:, :-1].log_softmax(-1) for m in (got, teacher)]
    kl = float((both[1].exp() * (both[1] - both[0])).sum(-1).mean())
    assert figures["kd"] == pytest.approx(kl, rel=1e-3)


def _train_layer(student: Any, teacher: Any, index: int, ids: list[Any], held: Any) -> tuple[float, float]:
    experts = student.model.layers[index].mlp.experts
    weights = [p for child in experts.slim for p in child.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    drawn, numbers = np.random.default_rng([0, 3, index]), []
    while len(numbers) < STEPS:
        numbers += drawn.permutation(len(ids)).tolist()
    for p in student.parameters():
        p.requires_grad_(any(p is w for w in weights))
    first, start = _missed(student, teacher, index, held).item(), [w.detach().clone() for w in weights]
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = LR * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        missed = _missed(student, teacher, index, ids[numbers[step]])
        optimiser.zero_grad()
        missed.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
    last = _missed(student, teacher, index, held).item()
    if last >= first:
        for weight, was in zip(weights, start, strict=True):
            weight.data.copy_(was)
    return first, min(first, last)


def _missed(student: Any, teacher: Any, index: int, ids: Any) -> Any:
    """Share of what a layer of the teacher adds to its input that the student's misses."""
    seen: dict[str, list[Any]] = {"in": [], "out": []}

    def hook(module: Any, args: Any, output: Any) -> None:
        seen["in"].append(args[0])
        seen["out"].append(output)

    for model in (student, teacher):
        with model.model.layers[index].register_forward_hook(hook):
            model(input_ids=ids, use_cache=False)
    (_, came), (mine, theirs) = seen["in"], [x[0] if isinstance(x, tuple) else x for x in seen["out"]]
    # before the first layer nothing is counted as there
    came = came.detach() if index else torch.zeros_like(came)
    theirs = theirs.detach()
    return (mine - theirs).square().sum() / (theirs - came).square().sum()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_learns_and_the_rest_stays(made: Made, name: str, tmp_path: Path) -> None:
    """What is written loads, only stand-ins differ from before, and no layer is worse than it was."""
    entries, how = KINDS[name]
    folder = made.cut(str(tmp_path / "cut"), entries, **how)
    result = understudy.recover(folder, tmp_path / "out", teacher=made.model, train=made.text, **LAYERS)
    assert result is not None and result.train_what == "stand-ins"
    layers = result.runs[0]["layers"]
    assert len(layers) == 4 and all(x["after"] <= x["before"] for x in layers)
    assert any(x["after"] < x["before"] for x in layers)
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed and all(".experts." in k or "novices" in k for k in changed)
    assert torch.isfinite(load(tmp_path / "out", "olmoe")(input_ids=ids_of(), use_cache=False).logits).all()


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(made: Made, cut: Path, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if what == "train layers" and done == 1:
            raise KeyboardInterrupt

    def count(what: str, done: int, total: int) -> None:
        if what == "train layers":
            seen.append(done)

    how = {"teacher": made.model, "train": made.text, **LAYERS}
    understudy.recover(cut, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        understudy.recover(cut, tmp_path / "out", **how, progress=kill)
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    understudy.recover(cut, tmp_path / "out", **how, progress=count)
    assert seen == [1, 2, 3, 4], "the finished layer was trained again"
    weights = "model.safetensors"
    assert hashes(tmp_path / "out")[weights] == hashes(tmp_path / "whole")[weights]
    assert beside(tmp_path / "out") == {"whole"}


def test_a_layer_that_gets_worse_keeps_its_weights(made: Made, cut: Path, tmp_path: Path) -> None:
    result = understudy.recover(cut, tmp_path / "out", teacher=made.model, train=made.text, **LAYERS | {"lr": 30.0})
    assert result is not None
    assert [x["after"] for x in result.runs[0]["layers"]] == [x["before"] for x in result.runs[0]["layers"]]
    old, new = tensors_of(cut), tensors_of(tmp_path / "out")
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_micro_batches_add_up_to_a_step_of_the_same_size(made: Made, cut: Path, tmp_path: Path) -> None:
    """Two at once, or one after the other (other pairs of sequences): as many steps, errors of the same size."""
    how = {"teacher": made.model, "train": made.text, **LAYERS, "steps": 1}
    for name, micro in (("whole", 2), ("parts", 1)):
        understudy.recover(cut, tmp_path / name, **how, micro_batch=micro)
    whole, parts = (_run_of(tmp_path / name)["losses"] for name in ("whole", "parts"))
    assert [x["layer"] for x in whole] == [x["layer"] for x in parts] == [0, 1, 2, 3]
    assert [x["loss"] for x in parts] == pytest.approx([x["loss"] for x in whole], rel=0.5)


def test_bfloat16_is_near(made: Made, cut: Path, tmp_path: Path) -> None:
    how = {"teacher": made.model, "train": made.text, **LAYERS}
    exact, near = (understudy.recover(cut, tmp_path / p, **how, precision=p) for p in ("no", "bf16"))
    assert exact is not None and near is not None
    assert near.runs[0]["held_out"]["loss"] == pytest.approx(exact.runs[0]["held_out"]["loss"], rel=0.02)


def test_what_cannot_be_done_is_refused_before_anything_is_read(made: Made, cut: Path, tmp_path: Path) -> None:
    def refused(match: str, error: type[UnderstudyError] = UnderstudyError, **more: Any) -> None:
        with pytest.raises(error, match=match):
            understudy.recover(cut, tmp_path / "out", **{"train": made.text, "teacher": made.model} | LAYERS | more)
        assert not (tmp_path / "out").exists()

    refused("--teacher: --loss layers distils", teacher=None)
    refused("not parts that are added", train_what="stand-ins+lora")
    refused("--end-ratio has no effect", end_ratio=(0.2,))
    refused("--gradient-checkpointing has no effect", gradient_checkpointing=True)
    refused("fp16", precision="fp16")
    refused("holds stand-ins itself", teacher=cut)


def test_another_model_is_refused_as_teacher(made: Made, cut: Path, tmp_path: Path) -> None:
    other = Made(tmp_path, model_type="mixtral")
    with pytest.raises(PlanError, match="is another model"):
        understudy.recover(cut, tmp_path / "out", teacher=other.model, train=made.text, **LAYERS)


def test_numbers_that_are_none_are_said_with_their_layer(
    made: Made, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from understudy.layerwise.onelayer import OneLayer

    real = OneLayer.squares

    def broken(self: Any, number: int) -> Any:
        found = real(self, number)
        return found * float("nan") if self.index == 1 and torch.is_grad_enabled() else found

    monkeypatch.setattr(OneLayer, "squares", broken)
    with pytest.raises(NumericError, match=r"decoder layer 1: .* step 1 of 8"):
        understudy.recover(cut, tmp_path / "out", teacher=made.model, train=made.text, **LAYERS)
    assert not (tmp_path / "out").exists()
