"""Kill -9 at random moments of `calibrate` and `apply`: no partial output, the source untouched, the rerun bit-equal.

    python benchmarks/kill.py [--model FOLDER] [--data SPEC] [--kills 10] [--seed 0]

Each run is a fresh process; the time that an undisturbed one works, imports apart, is cut into as many parts as there
are kills, with a random moment in each. Without --model: the demo's, or a random small OLMoE where that
is not there.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models import olmoe_config, write_random

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "model"
CHILD = "--child"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="understudy-kill-") as temporary:
        work = Path(temporary)
        model, data = args.model, args.data
        if model is None:
            model = DEMO if (DEMO / "config.json").exists() else random_model(work / "model")
        if model == work / "model":
            words = np.random.default_rng(0).integers(0, 500, 40_000)
            (work / "text.txt").write_text(" ".join(f"w{n}" for n in words))
            data = data or str(work / "text.txt")
        print(
            f"{model}, {args.samples} blocks of {args.seq_len} tokens, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}"
        )
        rng = np.random.default_rng(args.seed)
        calibration = ["calibrate", model, data, args.samples, args.seq_len]
        bad = study(calibration, work / "calibrate", model, args.kills, rng)
        stats, plan = work / "calibrate" / "undisturbed" / "out", work / "plan.yaml"
        from understudy.stages.select import plan as make_plan

        make_plan(stats, plan, method="mone", ratio=0.5)
        bad += study(["apply", model, plan, stats], work / "apply", model, args.kills, rng)
    print("all well" if not bad else f"{bad} FAILED")
    sys.exit(bool(bad))


def study(command: list[Any], folder: Path, source: Path, kills: int, rng: np.random.Generator) -> int:
    """Kill a command so many times, rerun it each time, print what was seen and return how often it was wrong."""
    untouched = contents(source)
    reference, duration, _ = run(command, folder / "undisturbed" / "out")
    duration = min(duration, run(command, folder / "again" / "out")[1])
    print(
        f"\n{command[0]}: {duration:.2f} s undisturbed\n"
        f"{'killed at':>10}  {'output then':<12}{'beside it':<26}{'rerun':>9}  {'from layer':<12}"
        f"{'output':<8}{'left over':<11}source"
    )
    bad = 0
    for moment in (np.arange(kills) + rng.random(kills)) / kills * duration:
        out = folder / f"{moment:.4f}" / "out"
        killed(command, out, moment)
        there, beside = state(out, reference), leftovers(out)
        same_source, rerun, began = contents(source) == untouched, "", ""
        if there == "none":
            _, seconds, began = run(command, out)
            rerun = f"{seconds:.2f} s"
        output = "equal" if out.exists() and contents(out) == reference else "DIFFERS"
        after = leftovers(out)
        good = there in ("none", "whole") and output == "equal" and not after and same_source
        bad += not good
        print(
            f"{moment:>8.2f} s  {there:<12}{', '.join(beside) or '-':<26}{rerun:>9}  {began:<12}{output:<8}"
            f"{', '.join(after) or 'nothing':<11}{'untouched' if same_source else 'CHANGED'}",
            flush=True,
        )
        shutil.rmtree(out.parent)
    return bad


def state(out: Path, reference: Any) -> str:
    if not out.exists():
        return "none"
    return "whole" if contents(out) == reference else "PARTIAL"


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p != out)


def contents(path: Path) -> dict[str, str]:
    """Hashes of a file, or of all files below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def start(command: list[Any], out: Path) -> subprocess.Popen[str]:
    """Start a command; it has imported everything when this returns."""
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, __file__, CHILD, *command, out]
    process = subprocess.Popen(list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def run(command: list[Any], out: Path) -> tuple[dict[str, str], float, str]:
    """Run a command to its end: what it wrote, seconds, and the layer that it began with."""
    process, begin = start(command, out), time.perf_counter()
    assert process.stdout is not None
    said = process.stdout.readline()
    seconds = time.perf_counter() - begin
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return contents(out), seconds, said.strip()


def killed(command: list[Any], out: Path, after: float) -> None:
    process = start(command, out)
    time.sleep(after)
    process.kill()
    process.communicate()


def child(stage: str, model: str, *rest: str) -> None:
    from understudy.stages.apply import apply
    from understudy.stages.calibrate import calibrate

    print("ready", flush=True)
    *options, out = rest
    if stage == "calibrate":
        seen: list[int] = []
        data = {"data": options[0]} if options[0] else {}
        calibrate(
            model,
            out,
            samples=int(options[1]),
            seq_len=int(options[2]),
            progress=lambda done, total: seen.append(done),
            **data,
        )
        print(seen[0], flush=True)
    else:
        apply(model, options[0], out, stats=options[1], max_shard_size="4MB")
        print(flush=True)


def random_model(folder: Path) -> Path:
    """Write a random OLMoE with a tokenizer of its own."""
    config = olmoe_config(8, hidden=256, experts=32, width=128, vocab_size=512, eos_token_id=0, pad_token_id=0)
    write_random(folder, config, torch.bfloat16)
    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{n}": n + 2 for n in range(500)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if CHILD in sys.argv:
        child(*sys.argv[2:])
    else:
        main()
