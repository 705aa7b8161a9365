"""Peak memory of `calibrate` and `apply` on a checkpoint larger than they may hold; the speed of `apply` against cp.

    python benchmarks/memory.py [--layers 22 --hidden 1024 --width 512] [--work FOLDER]

Makes a random OLMoE in shards (4.65 GB as it stands; 13.4 GB with --layers 16 --hidden 2048 --width 1024, which is the
size of OLMoE-1B-7B), runs each command in a process of its own, reads the peak resident set
from the kernel and compares it with 1.5 x (largest layer + embeddings and head) + activations + 0.9 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from models import olmoe_config, write_random
from understudy.checkpoint import Checkpoint

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "understudy-benchmark")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    config = olmoe_config(args.layers, args.hidden, width=args.width, vocab_size=args.vocabulary)
    folder = write_random(args.work / f"olmoe-{args.layers}x64-{args.hidden}", config, torch.bfloat16)
    checkpoint = Checkpoint(folder)
    layer, outside = parts(checkpoint)
    activations = 2 * args.samples * 512 * args.hidden * 2  # read and written generation, bfloat16
    bound = 1.5 * (layer + outside) + activations + 0.9e9
    print(
        f"checkpoint {checkpoint.nbytes / 1e9:.2f} GB, largest layer {layer / 1e6:.0f} MB, outside the layers "
        f"{outside / 1e6:.0f} MB, activations {activations / 1e6:.0f} MB; bound {bound / 1e6:.0f} MB"
    )
    stats, out = args.work / "stats.safetensors", args.work / "out"
    stats.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    report("calibrate", bound, run("calibrate", folder, stats, args.samples))
    applied = run("apply", folder, stats, out)
    report("apply", bound, applied)
    copied = copy_speed(out, args.work / "copy")
    written = Checkpoint(out).nbytes
    ours = written / applied["write_seconds"]
    print(
        f"apply writes {ours / 1e9:.2f} GB/s, cp of the same files {copied / 1e9:.2f} GB/s, ratio {ours / copied:.2f}"
    )
    shutil.rmtree(out)


def parts(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of the largest decoder layer, and of everything outside the layers."""
    layers: dict[str, int] = {}
    outside = 0
    for name, entry in checkpoint.entries.items():
        pieces = name.split(".layers.")
        if len(pieces) == 2:
            index = pieces[1].split(".")[0]
            layers[index] = layers.get(index, 0) + entry.nbytes
        else:
            outside += entry.nbytes
    return max(layers.values()), outside


def run(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(name: str, bound: float, result: dict[str, float]) -> None:
    peak = result["peak"]
    print(f"{name:<10} peak {peak / 1e6:7.0f} MB  ({peak / bound:.2f} of the bound)  {result['seconds']:.1f} s")


def child(stage: str, folder: str, *rest: str) -> None:
    start = time.perf_counter()
    extra = {}
    if stage == "calibrate":
        calibrate(Path(folder), Path(rest[0]), int(rest[1]))
    else:
        extra["write_seconds"] = apply(Path(folder), Path(rest[0]), Path(rest[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start, **extra}))


def calibrate(folder: Path, stats: Path, samples: int) -> None:
    """As `understudy calibrate`, with random token ids: the checkpoint has no tokenizer."""
    from understudy.data import Blocks
    from understudy.layout import model_facts
    from understudy.recipe import Calibration
    from understudy.skeleton import Skeleton
    from understudy.stages.calibrate import collect
    from understudy.stats import Stats

    skeleton = Skeleton(folder)
    ids = np.random.default_rng(0).integers(0, 8192, (samples, 512)).astype(np.int32)
    blocks = Blocks(ids, np.zeros(samples, np.int16), ("random",), (), "0" * 64)
    facts = model_facts(skeleton, "random")
    with tempfile.TemporaryDirectory() as work:
        layers, probes = collect(skeleton, facts, blocks, Calibration(), Path(work))
    Stats(facts, {}, layers, probes).save(stats)


def apply(folder: Path, stats: Path, out: Path) -> float:
    """Seconds that writing took, the verification apart."""
    from understudy.stages.apply import apply as run_apply
    from understudy.stages.select import plan

    marks: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        marks.setdefault("start", now)
        if what == "write":
            marks["written"] = now

    run_apply(folder, plan(stats, method="mone", ratio=0.5).plan, out, stats=stats, progress=progress)
    return marks["written"] - marks["start"]


def copy_speed(source: Path, target: Path) -> float:
    """Bytes a second of cp for the written files."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    shutil.rmtree(target)
    return size / seconds


if __name__ == "__main__":
    main()
