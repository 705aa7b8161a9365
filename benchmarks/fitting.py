"""What ladder costs: statistics, choice, fit and repair, against a plain calibration pass over the same tokens.

    python benchmarks/fitting.py [--samples 32] [--seq-len 512] [--layers 16] [--methods A,B]
                                 [--gradient-samples 8] [--repair 8] [--work DIR]

A random OLMoE in bfloat16, hidden 1024, 64 experts of width 512, top-8, run in float32. Prints seconds, how many times
the plain pass they are, and the most that the process held.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from models import olmoe_config, write_random
from understudy.contest import groups_of, read_entrants
from understudy.data import Blocks
from understudy.layout import model_facts
from understudy.recipe import Calibration, Selection, repairing
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.stages.calibrate import collect
from understudy.stages.recover import recover
from understudy.stages.select import make_plan
from understudy.stats import Stats, load_stats


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--gradient-samples", type=int, help="blocks that are also walked back through; default: all")
    parser.add_argument("--repair", type=int, help="rounds of a repair afterwards")
    parser.add_argument("--methods", default="ladder_plain,ladder")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "understudy-benchmark")
    args = parser.parse_args()
    folder = write_random(args.work / f"olmoe-{args.layers}x64", olmoe_config(layers=args.layers), torch.bfloat16)
    skeleton = Skeleton(folder, dtype="float32")
    vocabulary = skeleton.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (args.samples, args.seq_len)).astype(np.int32)
    blocks = Blocks(ids, np.zeros(len(ids), np.int16), ("random",), (), "0" * 64)
    facts, file = model_facts(skeleton, str(folder)), args.work / "stats.safetensors"

    def calibrate(settings: Calibration) -> tuple[Stats, float]:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            layers, probes = collect(skeleton, facts, blocks, settings, Path(work))
        Stats(facts, {}, layers, probes).save(file)
        return load_stats(file), time.perf_counter() - begun

    _, plain = calibrate(Calibration())
    print(
        f"{ids.size} tokens, {args.layers} layers, {torch.get_num_threads()} threads; plain calibration {plain:.1f} s"
    )
    print(
        "| method | calibrate | plan | apply | together, x plain | statistics | most held | repair, x plain |\n"
        + "|---" * 8
        + "|"
    )
    for name in args.methods.split(","):
        groups = groups_of(read_entrants((name,)))
        back = args.gradient_samples if "gradients" in groups else None
        stats, seconds = calibrate(Calibration(collect=groups, gradient_samples=back))
        begun = time.perf_counter()
        plan = make_plan(stats, Selection(method=name, ratio=args.ratio)).plan
        planned = time.perf_counter() - begun
        out = args.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        apply(folder, plan, out, stats=stats)
        applied = time.perf_counter() - begun
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = (seconds + planned + applied) / plain
        size = file.stat().st_size
        repaired = "-"
        if args.repair:
            begun = time.perf_counter()
            shutil.rmtree(args.work / "repaired", ignore_errors=True)
            settings = repairing(Calibration(seq_len=args.seq_len), 0, args.repair)
            recover(out, args.work / "repaired", teacher=folder, settings=settings, blocks=blocks)
            repaired = f"{(time.perf_counter() - begun) / plain:.1f}"
        print(
            f"| {name} | {seconds:.1f} s | {planned:.1f} s | {applied:.1f} s | {total:.2f} "
            f"| {size / 1e9:.2f} GB | {held / 1e9:.2f} GB | {repaired} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
