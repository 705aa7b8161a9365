"""Two processes, as torchrun starts them, give the statistics of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import small
from understudy.stages.calibrate import calibrate
from understudy.stats import load_stats

# Each process stops elsewhere in layer 2, as if killed: the first has it on disk, the other has not.
SCRIPT = """
import os, sys
import torch
from understudy.activations import ActivationStore
from understudy.processes import Processes
from understudy.stages.calibrate import calibrate

model, out, data, mode = sys.argv[1:]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
options = dict(data=data, samples=5, seq_len=16, batch_size=1)


class Killed(BaseException):
    pass


def dying(own, after):
    calls = iter(range(after))

    def call(*args):
        if next(calls, None) is None:
            raise Killed
        return own(*args)

    return call


if mode == "interrupted":
    owner, name = (Processes, "wait") if rank == 0 else (ActivationStore, "commit")
    own = getattr(owner, name)
    setattr(owner, name, dying(own, 2))
    try:
        calibrate(model, out, **options)
    except Killed:
        pass
    else:
        raise AssertionError("ran through")
    setattr(owner, name, own)
seen = []
stats = calibrate(model, out, progress=lambda done, total: seen.append(done), **options)
assert seen[0] == (2 if mode == "interrupted" else 0), seen
assert float(stats.layers["0"].tokens) == 80
print(f"rank {rank} of {torch.distributed.get_world_size()} done", flush=True)
torch.distributed.destroy_process_group()
"""


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("mode", ["undisturbed", "interrupted"])
def test_two_processes_give_the_statistics_of_one(mode: str, tmp_path: Path) -> None:
    model = small.model_folder(tmp_path / "model")
    data, out = small.text_file(tmp_path / "text.txt"), tmp_path / "out" / "two.safetensors"
    one = calibrate(model, tmp_path / "one.safetensors", data=data, samples=5, seq_len=16, batch_size=1)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    done = launch(script, model, out, data, mode)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n"))[1:] == ["rank 0 of 2 done", "rank 1 of 2 done"]
    two = load_stats(out)
    small.assert_close(two.layers, one.layers, 1e-6)
    assert (two.data, two.model.fingerprint) == (one.data, one.model.fingerprint)
    assert not small.beside(out)
