"""Two processes, as `accelerate launch` starts them, train as one: with weights replicated (DDP) or spread (FSDP2).

On a machine without accelerators this starts two processes, which then find each other over gloo:

    accelerate launch --multi_gpu --num_processes 2 script.py

With `--cpu` instead of `--multi_gpu`, accelerate 1.15 starts one, whatever `--num_processes` says. On a CPU it passes
over `--use_fsdp` and replicates; a few lines below make it spread the weights, and the rest is what runs elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import test_training_loop as one
from understudy.training.fading import Fade

SCRIPT = """
import gc, hashlib, json, os, sys
from pathlib import Path

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import test_training_loop as one
from understudy.errors import NumericError
from understudy.training.fading import Fade
from understudy.training.sharded import trained

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
gc.freeze()  # Trainer collects garbage before each run


class Killed(BaseException):
    pass


def run(name, until=None, buffers=False, **changes):
    def progress(done, steps):
        seen.append(done)
        if any(isinstance(p, DTensor) for p in model.parameters()):
            managed = [len(group.fsdp_params) for group in groups(model)]
            spread.append([len(managed), sum(managed), len(list(model.parameters()))])
        if done == until:
            raise Killed

    seen, spread, model = [], [], one.faded_model()
    if buffers:
        model.register_buffer("saved", torch.ones(3))
    if "ddp" not in name and rank == 1:  # as loaded there: only the first process reads the weights
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    settings = one.recovery(**({"micro_batch": 1} | changes))
    found = one.run(model, folder / name, settings, fade=Fade(one.RATIO, one.STEPS), progress=progress)
    weights = {name: tensor.double().sum().item() for name, tensor in trained(model).items()}
    bits = hashlib.sha256(b"".join(t.numpy().tobytes() for t in trained(model).values())).hexdigest()
    held, losses = found.held_out, [entry["loss"] for entry in found.losses]
    return {"seen": seen, "spread": spread, "losses": losses, "held": held, "weights": weights, "bits": bits}


def groups(model):
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    found = [group for module in sharded for group in module._get_fsdp_state()._fsdp_param_groups]
    return {id(group): group for group in found}.values()  # norm and head share one


def runs(name, untils):
    found = {"whole": run(name)}
    for until in untils:
        try:
            run(f"{name}-killed", until)
        except Killed:
            pass
    return found | {"resumed": run(f"{name}-killed")}


def poisoned():
    model = one.plain_model()
    if rank == 1:
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    try:
        one.run(model, folder / "poisoned")
    except NumericError as error:
        return str(error)


def spread_out():
    made = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what the launcher sets
    os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    found = runs("fsdp", (3, 7))  # while there are originals, and when there are none
    found["checkpointing"] = run("checkpointing", gradient_checkpointing=True)
    found["buffers"] = run("buffers", buffers=True)
    return found


found = {"ddp": runs("ddp", (7,)), "poisoned": poisoned(), "fsdp": spread_out()}
(folder / f"rank-{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "run.py"
    script.write_text(SCRIPT)
    launch = "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
    quiet = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, "-m", *launch.split(), *quiet.split(), str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(found: list[dict], how: str, tmp_path: Path) -> None:
    model = one.faded_model()
    expected = one.run(model, tmp_path, fade=Fade(one.RATIO, one.STEPS))
    for rank in (0, 1):
        got = found[rank][how]["whole"]
        assert got["losses"] == pytest.approx([entry["loss"] for entry in expected.losses], rel=1e-5)
        assert got["held"] == pytest.approx(expected.held_out, rel=1e-5)
        sums = {name: tensor.double().sum().item() for name, tensor in one.weights(model).items()}
        assert got["weights"] == pytest.approx({name: sums[name] for name in got["weights"]}, rel=1e-3, abs=1e-3)
    assert found[0][how]["whole"] == found[1][how]["whole"], "both hold the same weights"


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_resume_to_the_same_bits(found: list[dict], how: str) -> None:
    for rank in (0, 1):
        whole, resumed = found[rank][how]["whole"], found[rank][how]["resumed"]
        assert resumed["seen"] == [7, 8]
        assert {**resumed, "seen": whole["seen"], "spread": whole["spread"]} == whole


def test_weights_are_spread_and_what_is_dropped_is_forgotten(found: list[dict]) -> None:
    assert found[0]["ddp"]["whole"]["spread"] == []
    groups, managed, present = zip(*found[0]["fsdp"]["whole"]["spread"], strict=True)
    assert min(groups) >= 4, "each decoder layer, the embeddings, and norm and head are gathered on their own"
    assert managed == present
    assert managed[3] > managed[4] == managed[-1], "the originals, gone after step 4"


@pytest.mark.parametrize("other", ["checkpointing", "buffers"])
def test_other_ways_to_spread_weights(found: list[dict], other: str) -> None:
    for rank in (0, 1):
        whole = found[rank]["fsdp"]["whole"]
        assert found[rank]["fsdp"][other]["losses"] == pytest.approx(whole["losses"], rel=1e-6)


def test_both_stop_where_one_meets_nan(found: list[dict]) -> None:
    for rank in (0, 1):
        assert "the loss is nan at step 1 of 8" in found[rank]["poisoned"]
