"""CD-MoE against dropping and merging, before and after light fine-tuning: quality, memory and speed in one run.

    python benchmarks/cd_moe.py MODEL --layers 2 --data SPEC [--data ...] --test SPEC [--test ...] --out DIR
                                [--keep-experts 6] [--tasks T,T --include-path DIR] [--task-train SPEC ...]

Rows: the original; the MoE sublayers (LayerDrop) or whole decoder layers (BlockDrop) that change the stream least left
out, as many as CD-MoE condenses; M-SMoE at the bytes of CD-MoE-SR; CD-MoE-S (no routed expert) and CD-MoE-SR, experts
and layers found by the paper's search on the calibration text. Then each is trained on `--data` and, if given, on
`--task-train`: the condensed layers of CD-MoE, the experts of the others. What is done is
kept in `DIR/rows.jsonl`; a later call goes on from there. `--speed` measures prefill and decode of what was written
beside the original, in turns, when nothing else runs; `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import understudy
from understudy.data import token_blocks
from understudy.recipe import Search, Selection
from understudy.skeleton import Skeleton
from understudy.speed import measure_speed
from understudy.tokens import load_tokenizer

ROWS = ("original", "layer_drop", "block_drop", "mc_smoe", "cd_moe_s", "cd_moe_sr")
TRAINED = {"original": "experts", "layer_drop": "experts", "block_drop": "experts", "mc_smoe": "experts"}


class Bench:
    """The rows of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a, self.model, self.out = arguments, Path(arguments.model), Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.file, self.speeds = self.out / "rows.jsonl", self.out / "speeds.json"

    def done(self) -> dict[tuple[str, bool], dict[str, Any]]:
        """What has been run, by row and whether it was trained."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {(entry["row"], entry["trained"]): entry for entry in map(json.loads, lines)}

    def run(self) -> None:
        """Do what is left."""
        for row in ROWS:
            folder = self.model if row == "original" else self._cut(row)
            if (row, False) not in self.done():
                self._keep(row, False, folder)
            empty = row == "cd_moe_s" and not any(layer.shared for layer in Skeleton(self.model).layers)
            if (row, True) not in self.done() and not empty:  # without shared experts there is nothing to train
                self._keep(row, True, self._recovered(row, folder))

    def _keep(self, row: str, trained: bool, folder: Path) -> None:
        common = {"seq_len": 128, "batch_size": 16}
        found = understudy.eval(
            folder, against=self.model, data=self.a.test, samples=self.a.test_samples, examples=0, **common
        )
        scores = {}
        if self.a.tasks:  # of this model alone: with --against, those of the original would be run every time
            more = {"tasks": self.a.tasks, "include_path": self.a.include_path}
            tasks = understudy.eval(folder, data=self.a.test[:1], samples=1, **common, **more).tasks.items()
            scores = {name: next(metrics[m] for m in ("acc_norm", "acc") if m in metrics) for name, metrics in tasks}
        entry = {
            "row": row, "trained": trained, "perplexity": found.perplexity["all"], "kl": found.kl, "tasks": scores,
            "bytes": found.bytes,
        }  # fmt: skip
        with self.file.open("a") as f:
            f.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    def speed(self) -> None:
        """Measure each form; training changes none."""
        blocks = token_blocks(self.a.test, load_tokenizer(self.model, False), seq_len=512, samples=len(self.a.test))
        found = {}
        for row in ROWS:
            folder = self.model if row == "original" else self._cut(row)
            speed = measure_speed(Skeleton(folder), Skeleton(self.model), blocks.ids[0], repeats=15)
            found[row] = {"prefill": speed.prefill_ratio, "decode": speed.decode_ratio}
        self.speeds.write_text(json.dumps(found))

    def _cut(self, row: str) -> Path:
        folder = self.out / row
        if folder.exists():
            return folder
        stats, plan = self._stats(), self.out / f"{row}.yaml"
        layers = len(Skeleton(self.model).layers)
        if row.startswith("cd_moe"):
            selection = {
                "method": "cd_moe", "layers": self.a.layers, "keep_experts": self.a.keep_experts * (row == "cd_moe_sr"),
            }  # fmt: skip
            if not plan.exists():
                understudy.search(
                    self.model, stats, plan, selection=Selection(**selection),
                    settings=Search(data=self.a.data, samples=self.a.samples, seq_len=128),
                )  # fmt: skip
        elif row == "mc_smoe":
            size = Skeleton(self._cut("cd_moe_sr")).checkpoint.nbytes
            understudy.plan(stats, plan, method=row, size=str(size))
        else:
            understudy.plan(stats, plan, method=row, ratio=self.a.layers / layers)
        understudy.apply(self.model, plan, folder, stats=stats)
        return folder

    def _stats(self) -> Path:
        stats = self.out / "stats.safetensors"
        if not stats.exists():
            understudy.calibrate(
                self.model, stats, data=self.a.data, samples=self.a.samples, seq_len=128, collect=("candidates",)
            )
        return stats

    def _recovered(self, row: str, folder: Path) -> Path:
        """Train on the text of calibration, then on that of the tasks."""
        what = {"train_what": TRAINED[row]} if row in TRAINED else {}
        for number, text in enumerate(filter(None, (self.a.data, self.a.task_train))):
            target = self.out / f"{row}-{number}"
            if not target.exists():
                understudy.recover(
                    folder, target, train=text, steps=self.a.steps, batch=8, seq_len=128, lr=self.a.lr, warmup=0.05,
                    save_every=self.a.steps, **what,
                )  # fmt: skip
            folder = target
        return folder

    def table(self) -> str:
        """All rows, against the original."""
        done = self.done()
        first = done["original", False]
        speeds = json.loads(self.speeds.read_text()) if self.speeds.exists() else {}
        tasks = list(first["tasks"])
        lines = [
            "| model | memory | prefill | decode | perplexity | KL | " + " | ".join([*tasks, "mean"]) + " |",
            "|" + "---|" * (7 + len(tasks)),
        ]
        for (row, trained), entry in done.items():
            scores = [entry["tasks"][task] for task in tasks]
            fast = [f"x{speeds[row][what]:.2f}" if row in speeds else "-" for what in ("prefill", "decode")]
            mean = f"{sum(scores) / len(scores):.3f}" if scores else "-"
            lines.append(
                f"| {row}{' + training' if trained else ''} | {entry['bytes'] / first['bytes']:.1%} "
                f"| {fast[0]} | {fast[1]} | {entry['perplexity']:.2f} | {entry['kl']:.3f} | "
                + " | ".join([*(f"{score:.3f}" for score in scores), mean]) + " |"
            )  # fmt: skip
        return "\n".join(lines)


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--keep-experts", type=int, default=6)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--test", action="append", required=True)
    parser.add_argument("--task-train", action="append", default=[])
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=())
    parser.add_argument("--include-path")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--test-samples", type=int, default=140)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.speed:
        bench.speed()
    elif not arguments.table:
        bench.run()
    print(bench.table())


if __name__ == "__main__":
    main()
