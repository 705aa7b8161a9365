"""Two processes, as torchrun starts them, give the statistics of one, gradients among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import small
from understudy.stages.calibrate import calibrate
from understudy.stats import load_stats

# Each process stops elsewhere in layer 2, forth or back, as if killed: the first has it on disk, the other has not.
SCRIPT = """
import os, sys
import torch
from understudy.activations import ActivationStore
from understudy.processes import Processes
from understudy.stages.calibrate import calibrate

model, data, undisturbed, forth, back = sys.argv[1:]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
options = dict(data=data, samples=5, seq_len=16, batch_size=1, collect=("gradients",))


class Killed(BaseException):
    pass


def dying(own, after):
    calls = iter(range(after))

    def call(*args):
        if next(calls, None) is None:
            raise Killed
        return own(*args)

    return call


def run(out):
    seen = []
    stats = calibrate(model, out, progress=lambda done, total: seen.append(done), **options)
    assert float(stats.layers["0"].tokens) == 80
    return seen


assert run(undisturbed) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
for interrupted, after, left in ((forth, 2, [2, 3, 4, 5, 6, 7, 8]), (back, 6, [4, 6, 7, 8])):
    owner, name = (Processes, "wait") if rank == 0 else (ActivationStore, "commit")
    own = getattr(owner, name)
    setattr(owner, name, dying(own, after))
    try:
        run(interrupted)
    except Killed:
        setattr(owner, name, own)
    else:
        raise AssertionError("ran through")
    assert run(interrupted) == left
print(f"rank {rank} of {torch.distributed.get_world_size()} done", flush=True)
torch.distributed.destroy_process_group()
"""


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_give_the_statistics_of_one(tmp_path: Path) -> None:
    model, data = small.model_folder(tmp_path / "model"), small.text_file(tmp_path / "text.txt")
    options = {"data": data, "samples": 5, "seq_len": 16, "batch_size": 1, "collect": ("gradients",)}
    one = calibrate(model, tmp_path / "one.safetensors", **options)
    script, out = tmp_path / "run.py", [tmp_path / "out" / name for name in ("undisturbed", "forth", "back")]
    script.write_text(SCRIPT)
    done = launch(script, model, data, *out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} of 2 done" in done.stdout for rank in (0, 1))
    for path in out:
        two = load_stats(path)
        small.assert_close(two.layers, one.layers, 1e-6)
        assert (two.data, two.model.fingerprint) == (one.data, one.model.fingerprint)
    assert out[0].read_bytes() == out[1].read_bytes() == out[2].read_bytes()
    assert {p.name for p in out[0].parent.iterdir()} == {"undisturbed", "forth", "back"}
