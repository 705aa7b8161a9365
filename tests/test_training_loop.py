"""One training run: what it minimises, how it reads, fades, stops, is killed and goes on."""

from __future__ import annotations

import copy
import gc
import json
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from understudy.errors import CheckpointError, NumericError, OutputError, UnderstudyError
from understudy.experts import install
from understudy.moe import find_moe_layers
from understudy.recipe import Recovery
from understudy.standins import SHARED, StandIn
from understudy.training import checkpoints, trainable
from understudy.training.fading import Fade, set_beta
from understudy.training.lessons import Lessons
from understudy.training.loop import Run, batches, train
from understudy.training.trainer import Order

S, EXPERTS, VOCABULARY = 12, 6, 40
STEPS, BATCH, RATIO = 8, 4, 0.5  # of `recovery`, its originals gone after 4 steps
# Forked from a process that has imported everything and computed nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "pytest"])


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Trainer collects garbage before each run: keep it from looking through everything that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def plain_model(**changes: Any) -> Any:
    """A tiny OLMoE; the router of its second layer and the experts' last matrices train."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    counts = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    model = OlmoeForCausalLM(OlmoeConfig(vocab_size=VOCABULARY, **(sizes | counts | changes))).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.7))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts.down_proj" in name or "layers.1.mlp.gate" in name)
    return model


def faded_model() -> Any:
    """The same with bases in place of most experts, low-rank parts on all, and the originals to fade out."""
    model = plain_model()
    layers = find_moe_layers(model)
    whole = copy.deepcopy(model)
    for layer in layers:
        groups = {0: 0, 2: 0, 3: 3, 5: 3}
        install(
            model.get_submodule(layer.name), {e: StandIn(SHARED, into=i, rank=2) for e, i in groups.items()}, EXPERTS
        )
        bases: Any = model.get_submodule(layer.name).bases
        bases.keep_originals(whole.get_submodule(layer.name))
    trainable.prepare(model, layers, "stand-ins+lora", 2, 0)
    return model


def lessons(count: int, seed: int) -> Lessons:
    """Text of which each sequence has its own number of tokens that count."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, (count, S)).astype(np.int32)
    labels = np.where(np.arange(S) < rng.integers(0, S - 2, (count, 1)), -100, ids).astype(np.int32)
    return Lessons(ids, labels, np.ones((count, S), bool), f"digest {count} {seed}")


def recovery(**changes: Any) -> Recovery:
    """Settings of a short run on the CPU."""
    settings = {"steps": STEPS, "batch": BATCH, "micro_batch": 2, "lr": 1e-2, "save_every": 2, "device": "cpu"}
    return Recovery(**(settings | changes))


def run(model: Any, folder: Path, settings: Recovery | None = None, **options: Any) -> Run:
    """Train on 10 sequences, so that an epoch ends within a step."""
    settings = settings or recovery()
    return train(model, settings, lessons(10, 0), lessons(3, 1), folder=folder, **({"fade": None} | options))


def weights(model: Any) -> dict[str, torch.Tensor]:
    """All parameters, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Compare bits."""
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def last(folder: Path) -> Path:
    """The newest checkpoint of the one run in a folder."""
    (work,) = folder.iterdir()
    found = checkpoints.newest(work)
    assert found is not None
    return found


# --- fading


@pytest.mark.parametrize("schedule", ["linear", "exp"])
def test_fades_from_one_to_zero(schedule: Any) -> None:
    fade = Fade(0.25, 40, schedule)
    betas = [fade.beta(step) for step in range(41)]
    assert betas[0] == 1.0
    assert all(betas[step] > betas[step + 1] for step in range(10))
    assert set(betas[10:]) == {0.0}


def test_schedules_are_those_of_the_paper() -> None:
    assert Fade(0.5, 20).beta(3) == pytest.approx(1 - 3 / 10)
    end = math.exp(-3)
    assert Fade(0.5, 20, "exp").beta(3) == pytest.approx((math.exp(-0.9) - end) / (1 - end))
    assert Fade(0.0, 20).beta(0) == 0.0


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan])
def test_end_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(UnderstudyError, match=r"--end-ratio .* from 0 to 1"):
        Fade(ratio, 10)


def test_originals_are_dropped_at_zero() -> None:
    model = faded_model()
    bases = [layer.bases for layer in map(model.get_submodule, (x.name for x in find_moe_layers(model)))]
    assert not set_beta(model, 0.25)
    assert {b.beta for b in bases} == {0.25}
    assert set_beta(model, 0.0)
    assert all(b.originals is None for b in bases)
    assert not any("originals" in name for name in model.state_dict())
    assert not set_beta(model, 0.0), "nothing is left to drop"


# --- what a step is


def reference(model: Any, settings: Recovery, data: Lessons) -> list[float]:
    """Train with torch alone, a whole step at a time."""
    order = list(Order(len(data), settings.steps * settings.batch, settings.seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    losses = []
    for step in range(settings.steps):
        rows = order[step * settings.batch : (step + 1) * settings.batch]
        ids, labels = (torch.from_numpy(x[rows]).long() for x in (data.ids, data.labels))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def test_equals_a_loop_in_plain_torch(tmp_path: Path) -> None:
    model, other = plain_model(), plain_model()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = weights(model)
    found = run(model, tmp_path)
    expected = reference(other.train(), recovery(), lessons(10, 0))
    assert [entry["loss"] for entry in found.losses] == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(weights(model)[name], before[name]) == (name in frozen)


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    losses = [
        [entry["loss"] for entry in run(plain_model(), tmp_path / str(m), recovery(micro_batch=m)).losses]
        for m in (None, 1)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_reads_all_before_it_reads_any_again() -> None:
    order = list(Order(10, 25, seed=3))
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert len(order) == 25
    assert order[:10] != order[10:20]
    assert order == list(Order(10, 25, seed=3)) != list(Order(10, 25, seed=4))


def test_says_what_the_run_was_like(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    model, fade = faded_model(), Fade(RATIO, STEPS)
    found = run(model, tmp_path, recovery(warmup=0.25), fade=fade, progress=lambda *done: steps.append(done))
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    assert steps == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert [entry["step"] for entry in found.losses] == list(range(1, STEPS + 1))
    assert [entry["beta"] for entry in found.losses] == [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    rates = [entry["lr"] for entry in found.losses]
    assert rates[:3] == pytest.approx([0, 0.005, 0.01])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < sum(entry["seconds"] for entry in found.losses) < found.seconds
    assert found.peak_memory_bytes > 1e8
    assert found.peak_memory_of == "resident in the process"
    assert set(found.held_out) == {"loss", "perplexity"}
    assert found.held_out["perplexity"] == pytest.approx(math.exp(found.held_out["loss"]))


def test_held_out_loss_is_that_of_the_model_that_is_left(tmp_path: Path) -> None:
    model = faded_model()
    found = run(model, tmp_path, fade=Fade(1.0, STEPS))  # originals until the very end
    held = lessons(3, 1)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(held.ids).long()).logits[:, :-1]
    target = torch.from_numpy(held.labels).long()[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), target.reshape(-1))
    assert found.held_out["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert not any("originals" in name for name, _ in model.named_parameters())


def test_fading_changes_the_first_steps(tmp_path: Path) -> None:
    with_originals = run(faded_model(), tmp_path / "a", fade=Fade(RATIO, STEPS)).losses
    bare = faded_model()
    set_beta(bare, 0.0)
    without = run(bare, tmp_path / "b", fade=Fade(0.0, STEPS)).losses
    original = run(plain_model(), tmp_path / "c").losses
    assert with_originals[0]["loss"] == pytest.approx(original[0]["loss"], rel=1e-6), "the start is the original"
    assert abs(without[0]["loss"] - original[0]["loss"]) > 0.01


class Answers:
    """A teacher: a model as it was."""

    def __init__(self, model: Any) -> None:
        self.model, self.asked = copy.deepcopy(model).eval(), 0

    @torch.no_grad()
    def logits(self, batch: Any) -> torch.Tensor:
        """Answer a batch."""
        assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
        self.asked += len(batch["index"])
        return self.model(input_ids=batch["input_ids"]).logits


def test_distils(tmp_path: Path) -> None:
    teacher = Answers(plain_model())
    first, held = {}, {}
    for loss in ("lm", "kd", "lm+kd"):
        model = plain_model()
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.mul_(0.5)
        teacher.asked = 0
        options = {} if loss == "lm" else {"teacher": teacher}
        found = run(model, tmp_path, recovery(loss=loss), **options)
        first[loss], held[loss] = found.losses[0]["loss"], found.held_out
        assert teacher.asked == (0 if loss == "lm" else STEPS * BATCH + 3)
        assert set(found.held_out) == {"loss", "perplexity"} | ({"kd"} if "kd" in loss else set())
    assert first["lm+kd"] == pytest.approx(first["lm"] + first["kd"], rel=1e-5)
    assert first["kd"] > 0.05
    assert held["kd"]["kd"] < 0.7 * first["kd"], "it comes nearer to the teacher"
    assert held["kd"]["kd"] < held["lm+kd"]["kd"]
    same = run(plain_model(), tmp_path, recovery(loss="kd", steps=1), teacher=teacher)
    assert same.losses[0]["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}], ids=str)
def test_saves_memory(tmp_path: Path, changes: dict[str, Any]) -> None:
    exact = run(plain_model(), tmp_path / "exact").losses
    model = plain_model()
    found = run(model, tmp_path / "other", recovery(**changes)).losses
    tolerance = 1e-2 if "precision" in changes else 1e-6
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in exact], rel=tolerance)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert ([e["loss"] for e in found] != [e["loss"] for e in exact]) == ("precision" in changes)


def test_leaves_nothing_on_the_model(tmp_path: Path) -> None:
    model = plain_model(output_router_logits=True)
    before = set(vars(model))
    run(model, tmp_path, recovery(gradient_checkpointing=True, precision="bf16"))
    assert set(vars(model)) == before
    assert model.config.use_cache and model.config.output_router_logits
    assert not model.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.float32


# --- checkpoints


def test_checkpoints_hold_only_what_trains(tmp_path: Path) -> None:
    model = faded_model()
    run(model, tmp_path, fade=Fade(RATIO, STEPS))
    (work,) = tmp_path.iterdir()
    assert {path.name for path in work.iterdir()} == {f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"}
    (last(tmp_path) / checkpoints.WEIGHTS).stat()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    from safetensors.torch import load_file

    assert_same(
        load_file(last(tmp_path) / checkpoints.WEIGHTS), {n: t for n, t in weights(model).items() if n in trained}
    )
    assert {p.suffix for p in work.rglob("*") if p.is_file()} == {".safetensors", ".pt", ".pth", ".json"}


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    model, again = plain_model(), plain_model()
    first = run(model, tmp_path, recovery(save_every=3))
    assert last(tmp_path).name == f"checkpoint-{STEPS}", "the last step is saved, too"
    steps: list[int] = []
    second = run(again, tmp_path, recovery(save_every=3), progress=lambda done, _: steps.append(done))
    assert steps == []
    assert_same(weights(model), weights(again))
    assert (first.losses, first.held_out) == (second.losses, second.held_out)
    assert second.seconds > sum(entry["seconds"] for entry in first.losses)


@pytest.mark.parametrize("damage", ["cut short", "not sealed", "missing"])
def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path, damage: str) -> None:
    model, again = plain_model(), plain_model()
    run(model, tmp_path)
    newest = last(tmp_path)
    file = newest / "optimizer.pt"
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:100])
    if damage == "missing":
        file.unlink()
    if damage == "not sealed":
        (newest / "complete.json").unlink()
    assert last(tmp_path).name == f"checkpoint-{STEPS - 2}"
    steps: list[int] = []
    run(again, tmp_path, progress=lambda done, _: steps.append(done))
    assert steps == [STEPS - 1, STEPS]
    assert_same(weights(model), weights(again))


def test_other_settings_text_or_weights_are_another_run(tmp_path: Path) -> None:
    steps: list[int] = []
    other = plain_model()
    with torch.no_grad():
        other.lm_head.weight[5, 5] += 0.1  # not even trained
    run(plain_model(), tmp_path)
    run(plain_model(), tmp_path, recovery(lr=2e-2), progress=lambda done, _: steps.append(done))
    run(plain_model(), tmp_path, fade=Fade(0.0, STEPS), progress=lambda done, _: steps.append(done))
    run(other, tmp_path, progress=lambda done, _: steps.append(done))
    assert steps == 3 * list(range(1, STEPS + 1))


def test_a_checkpoint_of_other_weights(tmp_path: Path) -> None:
    model = plain_model()
    checkpoints.save_trained({"model.layers.0.weight": torch.zeros(3)}, tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"checkpoint-2: holds other weights"):
        checkpoints.load_trained(model, tmp_path / "checkpoint-2")


def slow_run(folder: Path) -> None:
    """Train the model that fades, slowly, to be killed from outside."""
    torch.set_num_threads(1)
    run(faded_model(), folder, fade=Fade(RATIO, STEPS), progress=lambda done, steps: time.sleep(0.2))


def killed(folder: Path, step: int) -> None:
    """Kill -9 a run once it has written the checkpoint of a step, or just before."""
    process = FORKS.Process(target=slow_run, args=(folder,))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob(f"*/checkpoint-{step}/*")):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.join(60)


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    for step in (4, 8):  # while there are originals, and when there are none
        killed(tmp_path / "killed", step)
    undisturbed, resumed = faded_model(), faded_model()
    whole = run(undisturbed, tmp_path / "whole", fade=Fade(RATIO, STEPS))
    steps: list[int] = []
    rest = run(resumed, tmp_path / "killed", fade=Fade(RATIO, STEPS), progress=lambda done, _: steps.append(done))
    assert steps in ([], [7, 8]), "it went on from a checkpoint"
    assert_same(weights(undisturbed), weights(resumed))
    assert whole.held_out == rest.held_out
    for a, b in zip(whole.losses, rest.losses, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


# --- what goes wrong


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_stops_at_numbers_that_are_none(tmp_path: Path, where: str) -> None:
    model = plain_model()
    target = model.lm_head if where == "loss" else model.model.layers[1].mlp
    calls = []

    def poison(module: Any, inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        calls.append(1)
        if len(calls) <= 2 * 4:  # 2 micro-batches in each of 4 steps
            return output
        if where == "loss":
            return output * math.nan
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(lambda gradient: gradient * math.inf)
        return output

    target.register_forward_hook(poison)
    what = "the loss is nan" if where == "loss" else "the gradient is not finite"
    with pytest.raises(NumericError, match=rf"{what} at step 5 of 8; .*checkpoint-4; try a lower --lr than 0\.01"):
        run(model, tmp_path)
    assert last(tmp_path).name == "checkpoint-4"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    model = plain_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.inf
    with pytest.raises(NumericError, match="at step 1 of 8; no checkpoint was written before"):
        run(model, tmp_path)


def test_batches_that_cannot_be_divided(tmp_path: Path) -> None:
    assert batches(recovery(batch=12, micro_batch=2), 3) == (2, 2)
    assert batches(recovery(batch=12, micro_batch=None), 3) == (4, 1)
    with pytest.raises(UnderstudyError, match=r"--batch 12 cannot be divided by 2 \(--micro-batch\) x 4 processes"):
        batches(recovery(batch=12, micro_batch=2), 4)
    with pytest.raises(UnderstudyError, match="--batch 4 cannot be divided by --micro-batch 3"):
        run(plain_model(), tmp_path, recovery(micro_batch=3))


def test_fp16_needs_an_accelerator(tmp_path: Path) -> None:
    with pytest.raises(UnderstudyError, match="--precision fp16 needs an accelerator"):
        run(plain_model(), tmp_path, recovery(precision="fp16"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run(plain_model(), tmp_path / "file")


@pytest.mark.parametrize("limit", [3_000, 12_000])  # bytes: too little for the weights, for the optimiser's state
def test_a_disk_that_fills_up(tmp_path: Path, limit: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match=r"checkpoint-2: cannot be written \("):
            run(plain_model(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    steps: list[int] = []
    run(plain_model(), tmp_path, progress=lambda done, _: steps.append(done))
    assert steps[0] == 1
