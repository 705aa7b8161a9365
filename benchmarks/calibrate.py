"""What the statistics cost: calibration against a plain streamed forward of the same tokens, and against running every
expert on every token as the usual observers do.

    python benchmarks/calibrate.py [--model FOLDER] [--samples 8] [--repeats 5] [--all-experts]

Without --model: a random 16-layer OLMoE, hidden 1024, 64 experts of width 512, in float32. Prints ratios of one run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models import olmoe_config, write_random
from understudy.activations import ActivationStore
from understudy.data import Blocks
from understudy.layout import model_facts
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import collect
from understudy.walk import Walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--all-experts", action="store_true", help="time that, too, once")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "understudy-benchmark")
    args = parser.parse_args()
    folder = args.model or write_random(args.work / "olmoe-16x64", olmoe_config(), torch.bfloat16)
    skeleton = Skeleton(folder, dtype="float32")
    vocabulary = skeleton.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (args.samples, args.seq_len)).astype(np.int32)
    runs: dict[str, Callable[[], None]] = {
        "plain": lambda: plain(skeleton, ids),
        "calibrate": lambda: calibrate(skeleton, ids),
    }
    for run in runs.values():  # warm the page cache and the kernels
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    ratios = [c / p for c, p in zip(seconds["calibrate"], seconds["plain"], strict=True)]
    tokens = ids.size
    print(f"{tokens} tokens, {len(skeleton.layers)} MoE layers, {torch.get_num_threads()} threads, float32")
    for name, values in seconds.items():
        print(f"{name:<12} median {statistics.median(values):7.2f} s  min {min(values):.2f}  max {max(values):.2f}")
    print(f"calibrate / plain: median {statistics.median(ratios):.3f}  min {min(ratios):.3f}  max {max(ratios):.3f}")
    if args.all_experts:
        elapsed = timed(lambda: every_expert(skeleton, ids))
        print(
            f"every expert on every token: {elapsed:.1f} s, {elapsed / statistics.median(seconds['calibrate']):.1f} x"
        )


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def plain(skeleton: Skeleton, ids: np.ndarray) -> None:
    walk = Walk(skeleton, ids, 8, ActivationStore(1 << 34))
    with walk.ready():
        walk.through_layers()


def calibrate(skeleton: Skeleton, ids: np.ndarray) -> None:
    """With everything that `understudy calibrate` does after tokenising, the saved layers for resuming included."""
    facts = model_facts(skeleton, "benchmark")
    blocks = Blocks(ids, np.zeros(len(ids), np.int16), ("random",), (), "0" * 64)
    with tempfile.TemporaryDirectory() as work:
        collect(skeleton, facts, blocks, Calibration(), Path(work))


def every_expert(skeleton: Skeleton, ids: np.ndarray) -> None:
    """The same sums for all experts over all tokens: what calibration is spared."""
    walk = Walk(skeleton, ids, 8, ActivationStore(1 << 34))
    by_index = {layer.index: layer for layer in skeleton.layers}

    @contextmanager
    def observe(index: int, module: nn.Module) -> Iterator[None]:
        layer = by_index.get(index)
        if layer is None:
            yield
            return
        experts = skeleton.model.get_submodule(layer.name)
        own = experts.forward

        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            ones = torch.ones(len(hidden), 1)
            for expert in range(layer.num_experts):
                own(hidden, torch.full((len(hidden), 1), expert), ones).norm(dim=1).sum()
            return own(hidden, top_k_index, top_k_weights)

        experts.forward = forward
        yield
        del experts.forward

    with walk.ready():
        walk.through_layers(observe)


if __name__ == "__main__":
    main()
