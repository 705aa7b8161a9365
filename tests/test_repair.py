"""Repairing layers in closed form: against a slow reference, in every kind and family, in compress and compare."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import understudy
import zoo
from contract import ids_of, load, tensors_of
from small import beside, hashes, text_file
from test_recover import KINDS, Made
from understudy.data import token_blocks
from understudy.errors import NumericError, PlanError, UnderstudyError
from understudy.layerwise import repairing
from understudy.tokens import load_tokenizer
from understudy.training.lessons import lessons

REPAIR = {"loss": "repair", "rounds": 6, "batch": 48, "seq_len": 16, "held_out": 0.1, "device": "cpu"}
SLIM = {"slim": {0: 8, 1: 8, 3: 0}}
ANSWERS = ("down_proj", "constants", "novices", "w2", "thin", "output_linear", ".b", "bias")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _with_text(Made(tmp_path_factory.mktemp("repair")))


def _with_text(made: Made) -> Made:
    """Give more tokens than a layer has neurons."""
    made.text = text_file(made.folder / "more.txt", 3200)
    return made


@pytest.fixture(scope="module")
def cut(made: Made) -> Path:
    return made.cut("slim", SLIM, slim={"constant": True})


def _run_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "understudy" / "recovery.json").read_text())["runs"][0]


def test_what_is_left_is_what_least_squares_leave(
    made: Made, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of every neuron written out, gates included, and numpy's lstsq, one layer after the other."""
    monkeypatch.setattr(repairing, "RIDGE", 0.0)
    monkeypatch.setattr(repairing, "_LEAST", 1e-12)
    monkeypatch.setattr(repairing, "_PATIENCE", 1000)
    understudy.recover(cut, tmp_path / "out", teacher=made.model, train=made.text, **REPAIR | {"rounds": 60})
    train, held = lessons((str(made.text),), load_tokenizer(cut, False), seq_len=16, seed=0, held_out=0.1, limit=512)
    student, teacher = load(cut, "olmoe").eval(), load(made.model, "olmoe").eval()
    told, size, got = _run_of(tmp_path / "out"), int(REPAIR["batch"]), load(tmp_path / "out", "olmoe")
    order = np.random.default_rng([0, 2]).permutation(len(train))[: len(train) // size * size]
    for index, layer in enumerate(student.model.layers):
        before, left = _missed(student, teacher, index, held.ids), _least(student, teacher, index, train.ids[order])
        losses = [entry["loss"] for entry in told["losses"] if entry["layer"] == index]
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
        assert losses[-1] == pytest.approx(left, rel=2e-3)
        layer.load_state_dict(got.model.layers[index].state_dict())
        after = _missed(student, teacher, index, held.ids)
        assert told["layers"][index]["before"] == pytest.approx(before, rel=1e-3)
        assert told["layers"][index]["after"] == pytest.approx(after, rel=1e-3)
        tried = [x["missed"] for x in told["losses"] if x["layer"] == index]
        assert told["layers"][index]["after"] == pytest.approx(min(before, *tried), rel=1e-5), "the best round counts"


@torch.no_grad()
def _least(student: Any, teacher: Any, index: int, ids: Any) -> float:
    """Return the share that a layer must miss of text, whatever its last matrices and constants are."""
    block = student.model.layers[index].mlp
    x, mine, theirs, came = _at(student, teacher, index, ids)
    _, gates, chosen = block.gate(x.float())
    features = []
    for holder in (block.experts, *block.experts.slim):
        for row, expert in enumerate(holder.kept):
            gate, up = holder.gate_up_proj[row].double().chunk(2)
            h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            features.append(h * (gates * (chosen == expert)).sum(-1, keepdim=True))
    features += [(gates * (chosen == expert)).sum(-1, keepdim=True) for expert in block.experts.replaced]
    phi, missing = torch.cat(features, 1).double(), theirs - mine
    found = torch.linalg.lstsq(phi, missing, driver="gelsy").solution
    return float((missing - phi @ found).square().sum() / (theirs - came).square().sum())


@torch.no_grad()
def _at(student: Any, teacher: Any, index: int, ids: Any) -> tuple[torch.Tensor, ...]:
    """What enters the student's experts, what both layers put out, and what came to the teacher's."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[f"{name} in"], seen[name] = args[0], output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [student.model.layers[index].mlp.register_forward_hook(keep("mlp"))]
    hooks += [m.model.layers[index].register_forward_hook(keep(n)) for n, m in (("mine", student), ("his", teacher))]
    for model in (student, teacher):
        model(input_ids=torch.as_tensor(ids).long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    came = seen["his in"] if index else torch.zeros_like(seen["his in"])
    found = (seen["mlp in"], seen["mine"], seen["his"], came)
    return tuple(x.reshape(-1, x.shape[-1]).double() for x in found)


def _missed(student: Any, teacher: Any, index: int, ids: Any) -> float:
    _, mine, theirs, came = _at(student, teacher, index, ids)
    return float((theirs - mine).square().sum() / (theirs - came).square().sum())


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_repaired_and_only_what_is_linear_changes(made: Made, name: str, tmp_path: Path) -> None:
    entries, how = KINDS[name]
    folder = made.cut(str(tmp_path / "cut"), entries, **how)
    result = understudy.recover(folder, tmp_path / "out", teacher=made.model, train=made.text, **REPAIR)
    assert result is not None and result.train_what == "answers"
    layers = result.runs[0]["layers"]
    assert len(layers) == 4 and all(x["after"] <= x["before"] for x in layers)
    assert any(x["after"] < x["before"] for x in layers)
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed and not [k for k in changed if not any(part in k for part in ANSWERS)]
    assert torch.isfinite(load(tmp_path / "out", "olmoe")(input_ids=ids_of(), use_cache=False).logits).all()


@pytest.mark.parametrize("family", [f for f in zoo.DISTINCT if f != "olmoe"])
def test_every_family_is_repaired(family: str, tmp_path: Path) -> None:
    """Where a family norms what experts put out, a layer may keep what it has; elsewhere some get better."""
    made = _with_text(Made(tmp_path, model_type=family))
    folder = made.cut("cut", {"slim": {0: 4, 1: 4}} if family == "muse_spark" else {"constant": [0, 1]})
    result = understudy.recover(folder, tmp_path / "out", teacher=made.model, train=made.text, **REPAIR)
    assert result is not None
    layers = result.runs[0]["layers"]
    assert layers and all(x["after"] <= x["before"] for x in layers)
    assert any(x["after"] < x["before"] for x in layers)
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert not [k for k in changed if any(part in k for part in ("router", "attn", "norm", "embed"))]
    if any("shared" in k for k in old):
        assert any("shared" in k for k in changed), "shared experts take over what they can"


def test_fewer_experts_are_repaired_too(made: Made, tmp_path: Path) -> None:
    """What stock engines load, without stand-ins at all."""
    folder = made.cut(str(tmp_path / "cut"), {"drop": [0, 1]})
    result = understudy.recover(folder, tmp_path / "out", teacher=made.model, train=made.text, **REPAIR)
    assert result is not None and all(x["after"] < x["before"] for x in result.runs[0]["layers"])
    assert "compression_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(made: Made, cut: Path, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if what == "train layers" and done == 2:
            raise KeyboardInterrupt

    how = {"teacher": made.model, "train": made.text, **REPAIR}
    understudy.recover(cut, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        understudy.recover(cut, tmp_path / "out", **how, progress=kill)
    understudy.recover(cut, tmp_path / "out", **how)
    assert hashes(tmp_path / "out")["model.safetensors"] == hashes(tmp_path / "whole")["model.safetensors"]
    assert beside(tmp_path / "out") == {"whole"}


def test_a_whole_model_has_nothing_to_repair(made: Made, tmp_path: Path) -> None:
    """The original against itself: not a bit changes."""
    folder = made.cut(str(tmp_path / "cut"), {})
    result = understudy.recover(folder, tmp_path / "out", teacher=made.model, train=made.text, **REPAIR)
    assert result is not None and all(x["before"] == x["after"] == 0 for x in result.runs[0]["layers"])
    old, new = tensors_of(made.model), tensors_of(tmp_path / "out")
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_what_has_no_effect_is_refused(made: Made, cut: Path, tmp_path: Path) -> None:
    for name, value in (("lr", 1e-3), ("steps", 3), ("train_what", "all"), ("dtype", "bfloat16"), ("rank", 4)):
        with pytest.raises(UnderstudyError, match=f"--{name.replace('_', '-')} has no effect with --loss repair"):
            understudy.recover(cut, tmp_path / "out", teacher=made.model, train=made.text, **REPAIR | {name: value})
    with pytest.raises(UnderstudyError, match="--rounds has no effect without --loss repair"):
        understudy.recover(cut, tmp_path / "out", train=made.text, rounds=3, seq_len=16)
    with pytest.raises(UnderstudyError, match="--teacher: --loss repair distils"):
        understudy.recover(cut, tmp_path / "out", train=made.text, **REPAIR)
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_said_with_their_layer(
    made: Made, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = repairing._system

    def broken(layer: Any, *rest: Any) -> Any:
        left, diagonal, error = own(layer, *rest)
        return left, diagonal, error * (float("nan") if layer.index == 2 else 1)

    monkeypatch.setattr(repairing, "_system", broken)
    with pytest.raises(NumericError, match="decoder layer 2"):
        understudy.recover(cut, tmp_path / "out", teacher=made.model, train=made.text, **REPAIR)
    assert not (tmp_path / "out").exists()


# --- in one go with the rest ---

GO = {"samples": 160, "seq_len": 16, "batch_size": 48}


def test_compress_repairs_on_the_blocks_of_its_calibration(made: Made, tmp_path: Path) -> None:
    """The same bytes as apply and then recover; card and recipe say it, and nothing else is left behind."""
    out = tmp_path / "out"
    done = understudy.compress(made.model, out, data=made.text, method="mone", ratio=0.5, repair=6, **GO)
    assert done is not None and any("missed on held-out text" in note for note in done.notes)
    understudy.compress(made.model, tmp_path / "plain", data=made.text, method="mone", ratio=0.5, **GO)
    blocks = token_blocks((str(made.text),), load_tokenizer(made.model, False), seq_len=16, samples=160)
    how = {k: v for k, v in REPAIR.items() if k not in ("held_out", "device")}
    understudy.recover(tmp_path / "plain", tmp_path / "other", teacher=made.model, blocks=blocks, **how)
    assert hashes(out)["model.safetensors"] == hashes(tmp_path / "other")["model.safetensors"]
    assert hashes(out)["model.safetensors"] != hashes(tmp_path / "plain")["model.safetensors"]
    assert beside(out) == {"plain", "other"}
    card = (out / "README.md").read_text()
    assert "was solved for layer by\nlayer in 6 rounds over 152 sequences of 16 tokens" in card
    assert "--repair 6" in card and "To train it again" not in card and card.startswith("---\n")
    assert json.loads((out / "understudy" / "recipe.json").read_text())["repair"] == 6


def test_compress_goes_on_where_the_repair_was_killed(made: Made, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if what == "train layers" and done == 2:
            raise KeyboardInterrupt

    how = {"data": made.text, "method": "mone", "ratio": 0.5, "repair": 3, "max_shard_size": "50KB", **GO}
    understudy.compress(made.model, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        understudy.compress(made.model, tmp_path / "out", **how, progress=kill)
    assert not (tmp_path / "out").exists()
    understudy.compress(made.model, tmp_path / "out", **how)
    weights = [name for name in hashes(tmp_path / "whole") if name.endswith(".safetensors") and "stats" not in name]
    assert len(weights) > 1
    assert all(hashes(tmp_path / "out")[name] == hashes(tmp_path / "whole")[name] for name in weights)
    assert beside(tmp_path / "out") == {"whole"}


def test_compress_refuses(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnderstudyError, match="--repair -1 is below 0"):
        understudy.compress(made.model, tmp_path / "out", data=made.text, repair=-1, **GO)
    with pytest.raises(PlanError, match="block_drop leaves some out"):
        understudy.compress(made.model, tmp_path / "out", method="block_drop", ratio=0.5, repair=2, **GO)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnderstudyError, match="--repair runs in one process"):
        understudy.compress(made.model, tmp_path / "out", data=made.text, repair=2, **GO)


def test_compare_repairs_who_asks_for_it(made: Made, tmp_path: Path) -> None:
    """Figures are those of compress and eval with the same settings; folders are gone afterwards."""
    results = understudy.compare(
        made.model, tmp_path / "out", methods="mone,mone:repair=4", ratios=0.5, seeds=0, data=made.text,
        test=made.text, test_samples=8, test_seq_len=16, no_speed=True, examples=0, dtype="float32", **GO,
    )  # fmt: skip
    plain, repaired = results.results
    assert repaired.options == {"repair": "4"} and plain.bytes == repaired.bytes
    assert repaired.kl is not None and plain.kl is not None and repaired.kl < plain.kl
    assert not list((tmp_path / "out").glob(".model-*"))
    size = f"{plain.budget_bytes}B"
    how = {"data": made.text, "method": "mone", "size": size, "repair": 4, "dtype": "float32", **GO}
    done = understudy.compress(made.model, tmp_path / "model", **how)
    assert done is not None
    told = understudy.eval(
        done.folder, against=made.model, data=made.text, samples=8, seq_len=16, dtype="float32", batch_size=48
    )
    assert told.kl is not None and told.kl == pytest.approx(repaired.kl, rel=1e-4)
    with pytest.raises(PlanError, match="0 is no number of rounds"):
        understudy.compare(made.model, tmp_path / "bad", methods="mone:repair=0", data=made.text, test=made.text)
