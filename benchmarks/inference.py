"""How fast models made by plans run beside their original, in the same turns on the same machine.

    python benchmarks/inference.py ORIGINAL FOLDER... [--device cpu] [--threads 1] [--dtype float32]
    python benchmarks/inference.py [--layers 4 --hidden 1024 --width 512 --experts 64] [--kinds constant,shared_base]

Without folders: a random OLMoE, top-8, and what half of its experts, or of all neurons, become under each kind:
`constant`, `drop`, `merge` in pairs, `slim`, and `shared_base` with three bases and rank 16.

Measured are tokens a second of whole models (one forward over --seq-len tokens; one token at a time with a cache), and
one MoE layer alone, its router included, on the same hidden states: those that enter it in the original. Prints a
Markdown table for each device; a number after x is how many times as fast as the original, the median over turns in
which each ran once, with the lowest and highest of the layer's. With --threads 1 on a CPU the layer's is processor
time, which others on the machine disturb less.

Letters: T tokens, H hidden size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import olmoe_config, write_random
from understudy.data import Blocks
from understudy.entries import Entry
from understudy.errors import UnderstudyError
from understudy.layout import model_facts
from understudy.moe import MoELayer
from understudy.plans import Plan, PlanModel
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.speed import measure_speed, whole
from understudy.stages.calibrate import collect
from understudy.stats import Stats
from understudy.virtual import planned

KINDS = ("constant", "drop", "merge", "slim", "shared_base")
HOW: dict[str, dict[str, Any]] = {
    "merge": {"weights": "uniform", "align": "none"},
    "slim": {"order": "flap"},
    "shared_base": {"rank": 16},
}
BASES, ALONE = 3, 16  # groups of shared_base; tokens that pass a layer one at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="the original, then models made of it")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--decoded", type=int, default=32, help="tokens that are generated one at a time")
    parser.add_argument("--repeats", type=int, default=5, help="turns of whole models")
    parser.add_argument("--layer-repeats", type=int, default=15, help="turns of one layer")
    parser.add_argument("--layer", help="decoder layer that is measured alone; default: the first with experts")
    parser.add_argument("--device", help="default: cpu, and cuda where there is one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--experts-implementation", default="auto", help="of transformers, the original's, too")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0: as torch has it")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "understudy-benchmark")
    args = parser.parse_args()
    if len(args.folders) == 1:
        parser.error("name models made of the original, too, or no folder at all")
    if args.threads:
        torch.set_num_threads(args.threads)
    both = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in [args.device] if args.device else both:
        report(args, device)


def report(args: argparse.Namespace, device: str) -> None:
    """Print the table of one device, line by line as it is measured."""
    options = {"dtype": args.dtype, "device": device, "experts": args.experts_implementation}
    if args.folders:
        source = Skeleton(args.folders[0], **options)
        made: dict[str, Callable[[], Skeleton]] = {p.name: opener(p, options) for p in args.folders[1:]}
    else:
        config = olmoe_config(args.layers, args.hidden, args.experts, args.width, eos_token_id=None)
        name = f"olmoe-{args.layers}x{args.experts}-{args.hidden}-{args.width}"
        source = Skeleton(write_random(args.work / name, config, torch.bfloat16), **options)
        stats = random_stats(source)
        made = {kind: planner(source, kind, stats) for kind in args.kinds.split(",")}
    layer = next((x for x in source.layers if args.layer in (None, x.key)), None)
    if layer is None:
        raise SystemExit(f"--layer {args.layer}: no layer with experts; there are {[x.key for x in source.layers]}")
    vocabulary = source.config.get_text_config().vocab_size
    ids_S = np.random.default_rng(0).integers(3, vocabulary, args.seq_len).astype(np.int32)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    print(f"\n{source.checkpoint.folder.name}, {args.dtype}, {where}, torch {torch.__version__}\n")
    T = args.seq_len
    print(f"| model | GB | prefill of {T}, tokens/s | decode, tokens/s | layer {layer.key}, T=1, ms | T={T}, ms |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, open_model in made.items():
        model = open_model()
        speed = measure_speed(model, source, ids_S, decoded=args.decoded, repeats=args.repeats)
        alone = layer_cells(model, source, layer, ids_S, args.layer_repeats)
        cells = [
            f"{model.checkpoint.nbytes / 1e9:.2f} of {source.checkpoint.nbytes / 1e9:.2f}",
            f"{speed.prefill:.1f}, x{speed.prefill_ratio:.2f}",
            f"{speed.decode:.1f}, x{speed.decode_ratio:.2f}",
            *alone,
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def opener(folder: Path, options: dict[str, str]) -> Callable[[], Skeleton]:
    return lambda: Skeleton(folder, **options)


def planner(source: Skeleton, kind: str, stats: Stats) -> Callable[[], Skeleton]:
    layers = {key: {kind: half(kind, layer.experts, layer.width or 0)} for key, layer in stats.model.layers.items()}
    how = {kind: HOW[kind]} if kind in HOW else {}
    plan = Plan(method="benchmark", model=PlanModel.of(stats.model), how=how, layers=layers)
    return lambda: planned(source, plan, stats)


def half(kind: str, experts: int, width: int) -> Entry:
    """Take half of what a layer has, spread evenly: every other expert, all in pairs, or half of all neurons."""
    others = tuple(range(1, experts, 2))
    if kind == "merge":
        return tuple(zip(range(0, experts, 2), others, strict=True))
    if kind == "slim":
        return dict.fromkeys(range(experts), width // 2)
    if kind == "shared_base":
        return tuple(others[first::BASES] for first in range(BASES))
    return others


def random_stats(source: Skeleton) -> Stats:
    """Statistics of a few random tokens: what stands in for experts has to be made of something."""
    vocabulary = source.config.get_text_config().vocab_size
    ids = np.random.default_rng(1).integers(3, vocabulary, (8, 64)).astype(np.int32)
    blocks = Blocks(ids, np.zeros(len(ids), np.int16), ("random",), (), "0" * 64)
    facts = model_facts(source, source.checkpoint.folder.name)
    with tempfile.TemporaryDirectory() as work:
        layers, probes = collect(source, facts, blocks, Calibration(collect=("channels",)), Path(work))
    return Stats(facts, {}, layers, probes)


@torch.no_grad()
def layer_cells(model: Skeleton, source: Skeleton, layer: MoELayer, ids_S: np.ndarray, repeats: int) -> list[str]:
    """Time a layer of both on one token at a time and on all at once: milliseconds of the model's, and the ratio."""
    with whole(source), whole(model):
        blocks = [skeleton.model.get_submodule(layer.block) for skeleton in (model, source)]
        x_1TH = entering(source, blocks[1], ids_S)
        apart = list(x_1TH[:, :: max(1, x_1TH.shape[1] // ALONE)].split(1, 1))[:ALONE]
        found = []
        for inputs, more in ((apart, 4), ([x_1TH], 1)):
            try:
                found.append(compare(blocks, inputs, repeats * more, source.device))
            except TypeError:  # a family whose blocks want more than hidden states
                found.append("-")
    return found


def entering(source: Skeleton, block: torch.nn.Module, ids_S: np.ndarray) -> torch.Tensor:
    """Return the hidden states that enter a block: `[1, T, H]`."""
    seen: list[torch.Tensor] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        ids = torch.from_numpy(ids_S[None]).long().to(source.device)
        source.model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0].reshape(1, -1, seen[0].shape[-1]).clone()


def compare(blocks: list[Any], inputs: list[torch.Tensor], repeats: int, device: torch.device) -> str:
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    turns = []
    for turn in range(repeats + 1):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            synchronise(device)
            start = clock()
            for x_1TH in inputs:
                blocks[which](x_1TH)
            synchronise(device)
            seconds[which] = (clock() - start) / len(inputs)
        turns.append(seconds)
    turns = turns[1:]  # the first warms up
    ratios = [theirs / mine for mine, theirs in turns]
    median = statistics.median(mine for mine, _ in turns) * 1e3
    return f"{median:.2f}, x{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    try:
        main()
    except UnderstudyError as error:
        raise SystemExit(str(error)) from None
