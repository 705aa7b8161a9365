"""Time and memory of a training step: LightMoE while the originals fade out, after that, and LoRA on the intact model.

    python benchmarks/recover_step.py MODEL CUT [--batch 8] [--seq-len 128] [--repeats 15] [--threads 1]

MODEL is the original, CUT what `apply` made of it by a `lightmoe` plan. LoRA is peft's, on all experts, of the rank at
which it trains as many parameters. A step is forward, backward and AdamW on random tokens; the variants take turns, and
ratios are medians over turns. The peak of memory is that of a process of its own for each variant: what it holds above
what it held before the model was loaded; that is read where Linux says it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from understudy.skeleton import Skeleton
from understudy.training import trainable
from understudy.training.fading import set_beta
from understudy.training.losses import lm_loss
from understudy.training.whole import keep_originals, load_whole

VARIANTS = ("LoRA (peft)", "fading", "after fading", "LoRA (ours)")


def lora_rank(model: Any, names: list[str], budget: int) -> int:
    """Return the rank at which LoRA on stacked weights trains this number of parameters."""
    each = sum(sum(p.shape[1:]) * p.shape[0] for n, p in model.named_parameters() if n.endswith(tuple(names)))
    return max(round(budget / each), 1)


def built(variant: str, original: Path, cut: Path) -> Any:
    """Make a model ready to train."""
    student, teacher = (Skeleton(folder, dtype="float32", device="cpu") for folder in (cut, original))
    rank = trainable.usual_rank(student.model, student.layers)
    trainable.prepare(student.model, student.layers, trainable.WITH_LORA, rank, 0)
    budget = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    if variant == "LoRA (peft)":
        import peft

        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = load_whole(teacher)
        rank = lora_rank(model, names, budget)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=names)
        return peft.get_peft_model(model, config)
    if variant == "LoRA (ours)":
        model = load_whole(teacher)
        thin = sum(p.shape[0] * (p.shape[1] + p.shape[2]) * 3 for n, p in model.named_parameters() if "down_proj" in n)
        trainable.prepare(model, teacher.layers, trainable.LORA, max(round(budget / thin), 1), 0)
        return model
    clean = Skeleton(cut, dtype="float32", device="cpu")
    model = load_whole(clean)
    trainable.prepare(model, clean.layers, trainable.WITH_LORA, rank, 0)
    if variant == "fading":
        keep_originals(model, clean, teacher)
        set_beta(model, 0.5)
    return model


def stepper(model: Any, ids: torch.Tensor) -> Callable[[], float]:
    """Return a function that makes a step and says how many seconds it took."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        start = time.perf_counter()
        loss = lm_loss(model(input_ids=ids, use_cache=False).logits, ids) / ids.numel()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return time.perf_counter() - start

    return step


def tokens(arguments: argparse.Namespace) -> torch.Tensor:
    """Draw the batch."""
    vocabulary = Skeleton(arguments.model).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (arguments.batch, arguments.seq_len), generator=generator)


def peak(variant: str, arguments: argparse.Namespace) -> int:
    """Return the bytes that a process of its own held at most for a few steps."""
    torch.set_num_threads(arguments.threads)
    before = most_resident()
    step = stepper(built(variant, arguments.model, arguments.cut), tokens(arguments))
    for _ in range(3):
        step()
    return most_resident() - before


def most_resident() -> int:
    """Return the most bytes that this process held so far; unlike `getrusage`, not what its parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("cut", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {variant: built(variant, arguments.model, arguments.cut) for variant in VARIANTS}
    ids = tokens(arguments)
    steps = {variant: stepper(model, ids) for variant, model in models.items()}
    turns = [{variant: step() for variant, step in steps.items()} for _ in range(arguments.repeats + 2)][2:]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = dict(zip(VARIANTS, pool.starmap(peak, [(v, arguments) for v in VARIANTS], chunksize=1), strict=True))
    print("| variant | trained | s a step | x LoRA (peft), median (range) | peak memory |\n|---|---|---|---|---|")
    for variant, model in models.items():
        ratios = [turn[variant] / turn[VARIANTS[0]] for turn in turns]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"| {variant} | {trained / 1e6:.2f}M | {statistics.median(t[variant] for t in turns):.3f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {peaks[variant] / 2**20:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
