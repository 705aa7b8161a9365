"""LightMoE against the baselines of its paper, at equal steps and equal numbers of trained parameters.

For each task, text to train on, held-out text and an lm-eval task:

    python benchmarks/lightmoe.py MODEL --task NAME,TRAIN,TEST,LM_EVAL_TASK [--task ...] --include-path DIR --out DIR

Rows: the original, LoRA on it (peft), LightMoE at several shares of the whole model's parameters, what its paper calls
direct replacing (one base a layer, and none), and MC-SMoE with LoRA; last, LightMoE whose low-rank parts start as what
the bases lack (`residual`, not in the paper). The end ratio of LightMoE's annealing is chosen for each share on the
held-out part of the training text, with the first seed; 0 is in the table beside it. What is done is kept in
`DIR/runs.jsonl`, and a later call goes on from there; several processes may work on one folder. The runs that the
paper's claims rest on (LoRA and LightMoE at 30%, everything at 50%) come first.
`--table` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
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
from recover_step import lora_rank
from understudy.recipe import Recovery
from understudy.skeleton import Skeleton
from understudy.tokens import load_tokenizer

SHARES, ENDS, RANK, BASES = (0.3, 0.4, 0.5), (0.1, 0.2, 0.3), 4, 3
CHOOSE = -1.0  # an end ratio that is still to be chosen among ENDS
SAMPLES = 1024  # blocks of 128 tokens: 2^17, as in the paper


@dataclass(frozen=True)
class Task:
    """What a model is trained for, and measured on."""

    name: str
    train: str
    test: str
    lm_eval: str


@dataclass(frozen=True)
class Cell:
    """One run; `share` of the whole model's parameters is gone, `end` is the end ratio."""

    task: str
    method: str
    share: float
    end: float
    seed: int


class Bench:
    """The runs of one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a, self.model = arguments, Path(arguments.model)
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tasks = {parts[0]: Task(*parts) for parts in (spec.split(",") for spec in arguments.task)}
        self.records = self.out / "runs.jsonl"

    def done(self) -> dict[Cell, dict[str, Any]]:
        """What has been run."""
        lines = self.records.read_text().splitlines() if self.records.exists() else []
        found = [json.loads(line) for line in lines]
        return {Cell(**entry["cell"]): entry for entry in found}

    def cells(self) -> Iterator[Cell]:
        """All runs, the ones that others depend on first."""
        first, later = self.a.seeds[0], self.a.seeds[1:]
        for task in self.tasks:
            yield Cell(task, "original", 0.0, 0.0, first)
            yield Cell(task, "lora", 0.0, 0.0, first)
            for share in (0.5, 0.3, 0.4):
                yield Cell(task, "lightmoe", share, self.end(task, share), first)
                yield Cell(task, "lightmoe", share, 0.0, first)
                for method in ("replace_shared", "mc_smoe"):
                    yield Cell(task, method, share, 0.0, first)
        for seed, task in itertools.product(later, self.tasks):
            yield Cell(task, "lora", 0.0, 0.0, seed)
            for share in (0.5, 0.3, 0.4):
                yield Cell(task, "lightmoe", share, self.end(task, share), seed)
            yield Cell(task, "lightmoe", 0.5, 0.0, seed)
            for method in ("replace_shared", "mc_smoe", "replace_adapters"):
                yield Cell(task, method, 0.5, 0.0, seed)
        for method, task in itertools.product(("replace_adapters", "residual"), self.tasks):
            yield Cell(task, method, 0.5, 0.0, first)
        for seed, task, share in itertools.product(later, self.tasks, (0.3, 0.4)):
            for method in ("lightmoe", "replace_shared", "mc_smoe"):
                yield Cell(task, method, share, 0.0, seed)
        for seed, task in itertools.product(later, self.tasks):
            yield Cell(task, "residual", 0.5, 0.0, seed)
        for seed, share, task in itertools.product(self.a.seeds, (0.4, 0.3), self.tasks):
            yield Cell(task, "residual", share, 0.0, seed)
            yield Cell(task, "replace_adapters", share, 0.0, seed)

    def end(self, task: str, share: float) -> float:
        """The end ratio that was best on held-out training text with the first seed; `CHOOSE` before that is known."""
        mine = [cell for cell in self.done() if (cell.task, cell.share, cell.seed) == (task, share, self.a.seeds[0])]
        return next((cell.end for cell in mine if cell.method == "lightmoe" and cell.end), CHOOSE)

    def run(self) -> None:
        """Do what is left and what no other process does."""
        for cell in self.cells():
            name = f"{cell.task}-{cell.method}-{cell.share}-{'faded' if cell.end else 0}-{cell.seed}"
            with claimed(self.out / "claims", name) as free:
                known = Cell(**{**asdict(cell), "end": self.end(cell.task, cell.share)}) if cell.end else cell
                if not free or known in self.done() or (known.end == CHOOSE and cell.seed != self.a.seeds[0]):
                    continue
                record = self._run(known)
                record = {"cell": asdict(known) | {"end": record.pop("end", known.end)}, **record}
                with self.records.open("a") as f:
                    f.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)

    def _run(self, cell: Cell) -> dict[str, Any]:
        task, work = self.tasks[cell.task], self.out / f"work-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        if cell.method == "original":
            return self._measured(self.model, task)
        start = self.model if cell.method == "lora" else self._cut(cell, task, work)
        common = {
            "train": (task.train,), "steps": self.a.steps, "batch": 8, "seq_len": 128, "lr": self.a.lr, "warmup": 0.05,
            "seed": cell.seed, "save_every": self.a.steps,
        }  # fmt: skip
        more: dict[str, Any] = {}
        if cell.method in ("lora", "mc_smoe"):
            held, trained = self._lora(start, Recovery(**common), work)
        else:
            grid = ENDS if cell.end == CHOOSE else (cell.end,)
            ends = {"end_ratio": grid} if cell.method == "lightmoe" else {}  # the others do not fade by themselves
            teacher = self.model if cell.end else None
            rank = {"rank": self._rank_of(cell.method)}  # of the experts that stay
            found = understudy.recover(start, work / "recovered", teacher=teacher, **common, **ends, **rank)
            best = found.runs[found.chosen]
            held, trained = best["held_out"], found.trained
            more = {
                "end": best["end_ratio"] or 0.0,
                "grid": {str(run["end_ratio"]): run["held_out"]["loss"] for run in found.runs},
            }
        return self._measured(work / "recovered", task) | {"held_out": held, "trained": trained} | more

    def _cut(self, cell: Cell, task: Task, work: Path) -> Path:
        stats = self.out / f"stats-{cell.task}.safetensors"
        if not stats.exists():
            mine = work / "stats.safetensors"
            understudy.calibrate(self.model, mine, data=(task.train,), samples=SAMPLES, seq_len=128)
            os.replace(mine, stats)
        options: dict[str, Any] = {"seed": cell.seed}
        if cell.method != "mc_smoe":
            options["rank"] = self._rank_of(cell.method)
        if cell.method in ("lightmoe", "residual"):
            options["bases"] = BASES
        if cell.method == "residual":
            options["start"] = "residual"
        method = "lightmoe" if cell.method == "residual" else cell.method
        plan = understudy.plan(stats, method=method, model_ratio=cell.share, **options)
        understudy.apply(self.model, plan.plan, work / "cut", stats=stats)
        return work / "cut"

    def _rank_of(self, method: str) -> int:
        """The rank at which as many parameters are trained as LightMoE trains."""
        experts, each, thin = self._sizes()
        return {
            "lightmoe": RANK,
            "residual": RANK,
            "replace_shared": round((self._budget() - each * self._layers()) / (experts * thin)),
            "replace_adapters": round(self._budget() / (experts * thin)),
        }[method]

    def _budget(self) -> int:
        experts, each, thin = self._sizes()
        return experts * thin * RANK + BASES * each * self._layers()

    def _sizes(self) -> tuple[int, int, int]:
        """Experts of the model, parameters of one, and parameters of its low-rank parts for each rank."""
        source = Skeleton(self.model)
        modules = [source.model.get_submodule(layer.name) for layer in source.layers]
        up, down = modules[0].gate_up_proj, modules[0].down_proj
        width, hidden = down.shape[2], down.shape[1]
        return sum(m.down_proj.shape[0] for m in modules), up[0].numel() + down[0].numel(), 3 * (width + hidden)

    def _layers(self) -> int:
        return len(Skeleton(self.model).layers)

    def _lora(self, folder: Path, settings: Recovery, work: Path) -> tuple[dict[str, float], int]:
        """LoRA by peft on the experts of a model, in the same training loop, merged in the end."""
        import peft

        from understudy.training.lessons import lessons
        from understudy.training.loop import train
        from understudy.training.whole import load_whole

        source = Skeleton(folder, dtype="float32", device="cpu")
        model = load_whole(source)
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        rank = lora_rank(model, names, self._budget())
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=names)
        adapted = peft.get_peft_model(model, config)
        part, held = lessons(
            settings.train, load_tokenizer(folder, False), seq_len=settings.seq_len, seed=settings.seed,
            held_out=settings.held_out, limit=settings.steps * settings.batch,
        )  # fmt: skip
        run = train(adapted, settings, part, held, fade=None, folder=work / "lora")
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        adapted.merge_and_unload().save_pretrained(work / "recovered")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(self.model / name, work / "recovered" / name)
        return run.held_out, trained

    def _measured(self, folder: Path, task: Task) -> dict[str, Any]:
        found = understudy.eval(
            folder, data=(task.test,), samples=128, seq_len=128, tasks=(task.lm_eval,),
            include_path=self.a.include_path, batch_size=16,
        )  # fmt: skip
        answers = found.tasks[task.lm_eval]
        score = next(answers[name] for name in ("acc_norm", "acc") if name in answers)
        return {"perplexity": found.perplexity["all"], "score": score, "params": found.params["total"]}

    def table(self) -> str:
        """Means over the seeds, standard deviations of the score, and the geometric mean of the perplexities."""
        done = self.done()
        lines = [
            "| model | parameters | trained | " + " | ".join(f"{task} (ppl)" for task in self.tasks) + " | mean |",
            "|---|---|---|" + "---|" * (len(self.tasks) + 1),
        ]
        rows = [("original", 0.0, False), ("lora", 0.0, False)]
        for share in SHARES:
            rows += [(method, share, False) for method in ("mc_smoe", "replace_adapters", "replace_shared")]
            rows += [("lightmoe", share, True), ("lightmoe", share, False), ("residual", share, False)]
        for method, share, chosen in rows:
            cells, scores, perplexities, sizes, trained = [], [], [], [], []
            for task in self.tasks:
                end = self.end(task, share) if chosen else 0.0
                mine = [done.get(Cell(task, method, share, end, seed)) for seed in self.a.seeds]
                found = [entry for entry in mine if entry]
                if not found:
                    cells.append("-")
                    continue
                score = [entry["score"] for entry in found]
                spread = f" +- {statistics.stdev(score):.3f}" if len(score) > 1 else ""
                ppl = statistics.mean(entry["perplexity"] for entry in found)
                fading = f", end {end:g}" if chosen else ""
                cells.append(f"{statistics.mean(score):.3f}{spread} ({ppl:.2f}{fading})")
                scores.append(statistics.mean(score))
                perplexities.append(ppl)
                sizes += [entry["params"] for entry in found]
                trained += [entry["trained"] for entry in found if "trained" in entry]
            label = f"{method} {share:.0%}" if share else method
            label += {True: ", annealed", False: ", end ratio 0" if method == "lightmoe" else ""}[chosen]
            mean = "-"
            if len(scores) == len(self.tasks):
                mean = f"{statistics.mean(scores):.3f} ({statistics.geometric_mean(perplexities):.2f})"
            size = f"{statistics.mean(sizes) / 1e6:.2f}M" if sizes else "-"
            learnt = f"{statistics.mean(trained) / 1e6:.2f}M" if trained else "-"
            lines.append(f"| {label} | {size} | {learnt} | " + " | ".join(cells) + f" | {mean} |")
        return "\n".join(lines)


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--include-path")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if not arguments.table:
        bench.run()
    print(bench.table())


if __name__ == "__main__":
    main()
