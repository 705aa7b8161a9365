"""The table of docs/results.md: what methods cost a trained model, from one command.

    python benchmarks/table.py --model MODEL --train TRAIN_FOLDER --test TEST_FOLDER [--tasks TASK_FOLDER] --out FOLDER

TRAIN_FOLDER and TEST_FOLDER hold one text file for each domain. Calibrates once for each seed, cuts every method at
every ratio from the same statistics, evaluates each against the original on held-out text, and writes results.json and
results.md. Goes on where an interrupted run stopped. TASK_FOLDER holds multiple-choice items (context, choices, gold).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import understudy

METHODS = {  # name in the table: method, kind
    "random, dropped": ("random", "drop"),
    "frequency, dropped": ("frequency", "drop"),
    "REAP, dropped": ("reap", "drop"),
    "REAP score, constants": ("reap", "constant"),
    "MoNE": ("mone", "constant"),
}
TASK = """task: {name}
custom_dataset: !function items.load
dataset_kwargs: {{file: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: {metric}}}]
"""
ITEMS = """import json, lzma
from pathlib import Path
from datasets import Dataset
def load(file, **kwargs):
    with lzma.open(file, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return {"test": Dataset.from_list([{k: r[k] for k in ("context", "choices", "gold")} for r in rows])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--task-limit", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=70)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = task_files(args.tasks, args.out / "tasks") if args.tasks else []
    done_file = args.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(done_file.read_text())["results"] if done_file.exists() else []
    finished = {(r["method"], r["ratio"], r["seed"]) for r in rows}
    for seed, ratio, label in itertools.product(args.seeds, args.ratios, METHODS):
        if (label, ratio, seed) in finished:
            continue
        stats = calibrated(args, seed)
        method, kind = METHODS[label]
        plan = understudy.plan(stats, method=method, kind=kind, ratio=ratio, seed=seed).plan
        folder = args.out / "model"
        shutil.rmtree(folder, ignore_errors=True)
        understudy.apply(args.model, plan, folder, stats=stats)
        metrics = understudy.eval(folder, against=args.model, **text(args)).to_dict()
        if names:
            metrics["tasks"] = understudy.eval(folder, **task_options(args, names)).to_dict()["tasks"]
        rows.append({"method": label, "ratio": ratio, "seed": seed, "metrics": metrics})
        done_file.write_text(json.dumps({"results": rows}, indent=1))
        print(label, ratio, seed, round(metrics["kl"], 4), round(metrics["perplexity"]["all"], 2), flush=True)
        shutil.rmtree(folder)
    original_file = args.out / "original.json"
    if not original_file.exists():
        metrics = understudy.eval(args.model, **text(args)).to_dict()
        if names:
            metrics["tasks"] = understudy.eval(args.model, **task_options(args, names)).to_dict()["tasks"]
        original_file.write_text(json.dumps(metrics))
    (args.out / "results.md").write_text(table(rows, json.loads(original_file.read_text())))


def text(args: argparse.Namespace) -> dict[str, Any]:
    specs = tuple(str(f) for f in sorted(args.test.glob("*.jsonl.xz")))
    return {"data": specs, "samples": args.samples, "seq_len": args.seq_len, "dtype": "float32"}


def task_options(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    return {
        "tasks": tuple(names),
        "include_path": str(args.out / "tasks"),
        "limit": args.task_limit,
        "dtype": "float32",
        "batch_size": 16,
    }


def calibrated(args: argparse.Namespace, seed: int) -> Path:
    path = args.out / f"stats-{seed}.safetensors"
    if not path.exists():
        specs = tuple(str(f) for f in sorted(args.train.glob("*.jsonl.xz")))
        understudy.calibrate(
            args.model, path, data=specs, samples=args.samples, seq_len=args.seq_len, seed=seed, dtype="float32"
        )
    return path


def task_files(source: Path, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.py").write_text(ITEMS)
    names = []
    for file in sorted(source.glob("*.jsonl.xz")):
        name = file.name.removesuffix(".jsonl.xz")
        metric = "acc" if name.startswith(("math", "intent")) else "acc_norm"  # as the items were made to be scored
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file.resolve(), metric=metric))
        names.append(name)
    return names


def table(rows: list[dict[str, Any]], original: dict[str, Any]) -> str:
    domains = [d for d in original["perplexity"] if d != "all"]
    heads = ["method", "replaced", "MB", "KL", "top-1", "ppl all", *[f"ppl {d}" for d in domains], "accuracy"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "-|" * len(heads)]
    plain = [f"{original['perplexity'][d]:.1f}" for d in ["all", *domains]]
    size = f"{original['bytes'] / 1e6:.1f}"
    lines.append(f"| original | | {size} | | | " + " | ".join(plain) + f" | {mean_acc(original)} |")
    for ratio, label in sorted({(r["ratio"], r["method"]) for r in rows}, key=order):
        mine = [r["metrics"] for r in rows if (r["ratio"], r["method"]) == (ratio, label)]
        cells = [spread([m["kl"] for m in mine], 3), spread([m["top1_agreement"] for m in mine], 3)]
        cells += [spread([m["perplexity"][d] for m in mine], 1) for d in ["all", *domains]]
        accuracy = spread([value for m in mine if (value := accuracy_of(m)) is not None], 3)
        size = f"{mine[0]['bytes'] / 1e6:.1f}"
        lines.append(f"| {label} | {ratio:.0%} | {size} | " + " | ".join(cells) + f" | {accuracy} |")
    return "\n".join(lines) + "\n"


def order(pair: tuple[float, str]) -> tuple[float, int]:
    return pair[0], list(METHODS).index(pair[1])


def accuracy_of(metrics: dict[str, Any]) -> float | None:
    values = [task.get("acc_norm", task.get("acc")) for task in (metrics.get("tasks") or {}).values()]
    return statistics.mean(values) if values else None


def mean_acc(metrics: dict[str, Any]) -> str:
    value = accuracy_of(metrics)
    return "" if value is None else f"{value:.3f}"


def spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
