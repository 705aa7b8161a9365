"""Compressed Experts after equal training: all experts that a token chooses, the strongest alone, and with vectors.

    python benchmarks/compressed_experts.py MODEL --data SPEC [--data ...] --test SPEC [--test ...] --out DIR
                                            [--tasks T,T --include-path DIR] [--seeds 0,1,2] [--steps 300]

Rows: the original as it is; the original trained; for each `main_k` the plain checkpoint that asks for so few experts
and the one whose other routes are vectors, both trained alike (all weights, `--steps` of 8 x 128 tokens). With the
first seed also the tasks, and at half of top-k: gates of the main experts renormalised; vectors fitted in closed form,
before and after training; vectors alone trained; three vectors an expert. What is done is kept in `DIR/runs.jsonl`, and
a later call goes on from there; several processes may work on one folder. `--table` prints what is there, `--speed`
measures every kind of model beside the original, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import understudy
from claims import claimed
from understudy.data import token_blocks
from understudy.skeleton import Skeleton
from understudy.speed import measure_speed
from understudy.tokens import load_tokenizer


@dataclass(frozen=True)
class Row:
    """One model: its number of main experts (0: all), how it differs from them, and how it is trained."""

    main_k: int
    form: str  # full, plain, vectors, renormalised, fitted, three
    train: str  # nothing, all, vectors
    seed: int


class Bench:
    """The rows of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a, self.model, self.out = arguments, Path(arguments.model), Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.records = self.out / "runs.jsonl"
        self.top_k = Skeleton(self.model).layers[0].top_k

    def rows(self) -> Iterator[Row]:
        """All rows, the ones that the paper's claim rests on first."""
        first, half = self.a.seeds[0], self.top_k // 2
        yield Row(0, "full", "nothing", first)
        for k in self.a.main_k:
            yield Row(k, "plain", "nothing", first)
        for seed in self.a.seeds:
            yield Row(0, "full", "all", seed)
            for k in sorted(self.a.main_k, key=lambda k: k != half):
                yield Row(k, "plain", "all", seed)
                yield Row(k, "vectors", "all", seed)
        for k in self.a.main_k:
            yield Row(k, "fitted", "nothing", first)
        yield Row(half, "renormalised", "nothing", first)
        for form in ("renormalised", "fitted", "three"):
            yield Row(half, form, "all", first)
        yield Row(half, "vectors", "vectors", first)

    def done(self) -> dict[Row, dict[str, Any]]:
        """What has been run."""
        lines = self.records.read_text().splitlines() if self.records.exists() else []
        return {Row(**entry["row"]): entry for entry in map(json.loads, lines)}

    def run(self) -> None:
        """Do what is left and what no other process does."""
        for row in self.rows():
            with claimed(self.out / "claims", "-".join(map(str, asdict(row).values()))) as free:
                if free and row not in self.done():
                    entry = {"row": asdict(row)} | self._run(row)
                    with self.records.open("a") as f:
                        f.write(json.dumps(entry) + "\n")
                    print(json.dumps(entry), flush=True)

    def _run(self, row: Row) -> dict[str, Any]:
        folder, work = self._cut(row), self.out / f"work-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        if row.train != "nothing":
            understudy.recover(
                folder, work, train=self.a.data, steps=self.a.steps, batch=8, seq_len=128, lr=self.a.lr, warmup=0.05,
                seed=row.seed, save_every=self.a.steps, train_what=row.train,
            )  # fmt: skip
            folder = work
        common = {"seq_len": 128, "batch_size": 16}
        found = understudy.eval(
            folder, against=self.model, data=self.a.test, samples=self.a.samples, examples=0, **common
        )
        scores = {}
        if self.a.tasks and row.seed == self.a.seeds[0]:  # with --against, those of the original would be run, too
            more = {"tasks": self.a.tasks, "include_path": self.a.include_path}
            tasks = understudy.eval(folder, data=self.a.test[:1], samples=1, **common, **more).tasks.items()
            scores = {name: next(metrics[m] for m in ("acc_norm", "acc") if m in metrics) for name, metrics in tasks}
        return {"perplexity": found.perplexity["all"], "kl": found.kl, "tasks": scores, "params": found.params}

    def _cut(self, row: Row) -> Path:
        if row.form == "full":
            return self.model
        folder = self.out / f"{row.form}-{row.main_k}"
        with claimed(self.out / "claims", folder.name, wait=True):
            if not folder.exists():
                options = {
                    "plain": {"plain": True}, "vectors": {}, "renormalised": {"renormalise": True},
                    "fitted": {"fit": True}, "three": {"vectors": 3},
                }[row.form]  # fmt: skip
                understudy.compress(
                    self.model, folder, method="compressed_experts", main_k=row.main_k, data=self.a.data, samples=64,
                    seq_len=128, **options,
                )  # fmt: skip
        return folder

    def speed(self) -> str:
        """Measure each form beside the original; training changes no form."""
        blocks = token_blocks(self.a.test, load_tokenizer(self.model, False), seq_len=512, samples=len(self.a.test))
        lines = ["| model | prefill | decode |", "|---|---|---|"]
        for k in self.a.main_k:
            for form in ("plain", "vectors"):
                folder = self._cut(Row(k, form, "nothing", self.a.seeds[0]))
                found = measure_speed(Skeleton(folder), Skeleton(self.model), blocks.ids[0], repeats=15)
                lines.append(f"| {form}, main_k {k} | x{found.prefill_ratio:.2f} | x{found.decode_ratio:.2f} |")
        return "\n".join(lines)

    def table(self) -> str:
        """Means over the seeds, with the standard deviation, and each score's share of the trained original's."""
        grouped: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
        for row, entry in self.done().items():
            grouped.setdefault((row.main_k, row.form, row.train), []).append(entry)
        tasks = sorted({name for entry in self.done().values() for name in entry["tasks"]})
        lines = [
            "| main_k | model | trained | seeds | active parameters | perplexity | KL | "
            + " | ".join([*tasks, "mean"])
            + " |",
            "|" + "---|" * (8 + len(tasks)),
        ]
        for (k, form, train), found in sorted(
            grouped.items(), key=lambda item: (item[0][0] or 99, item[0][2], item[0][1])
        ):
            cells = [str(k or self.top_k), form, train, str(len(found)), f"{found[0]['params']['active'] / 1e6:.2f}M"]
            cells += [_spread([e["perplexity"] for e in found], 2), _spread([e["kl"] for e in found], 3)]
            cells += [_spread([e["tasks"][t] for e in found if e["tasks"]], 3) for t in tasks]
            cells += [_spread([statistics.mean(e["tasks"].values()) for e in found if e["tasks"]], 3)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    more = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--test", action="append", required=True)
    parser.add_argument("--tasks", type=lambda text: tuple(filter(None, text.split(","))), default=())
    parser.add_argument("--include-path")
    parser.add_argument("--main-k", type=lambda text: [int(k) for k in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=140)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.speed:
        print(bench.speed())
        return
    if not arguments.table:
        bench.run()
    print(bench.table())


if __name__ == "__main__":
    main()
