"""The search of CD-MoE, the authors' way against the one here: what is chosen, and how often the text is run.

    python benchmarks/cd_moe_search.py [MODEL] [--data SPEC] [--keep-experts 4] [--layers 3] [--no-slow]

The authors condense one layer for every expert that might come next and run the whole text each time; likewise for
every layer that might. Here this is done with the model in transformers, on the text and with the mean gates that the
search is given. A run is one of the original over the text. In its column, the search here counts every decoder layer
that it runs, condensed or not, as 1/L of a run, and every expert that it sends a token through as 1/K of a token's
share of a layer. `--no-slow` leaves the authors' way to arithmetic, for models where it would take days.

Letters: L decoder layers, E experts, K top-k, T tokens, H hidden size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import understudy
from understudy.condensed.choosing import mean_gates
from understudy.condensed.running import hidden_js
from understudy.data import token_blocks
from understudy.moe import find_moe_layers
from understudy.stats import Stats, load_stats
from understudy.tokens import load_tokenizer

DEMO = Path(__file__).parents[1] / "examples" / "demo"
Weights = Mapping[str, Mapping[int, float]]


class Authors:
    """The whole model, run over the whole text for every question."""

    def __init__(self, folder: Path, ids: torch.Tensor, criterion: str, batch: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers = {layer.key: layer for layer in find_moe_layers(self.model)}
        self.batches, self.criterion, self.runs = ids.split(batch), criterion, 0
        self.decoders = self.model.get_submodule(next(iter(self.layers.values())).stack)
        self.original = self.run({})

    @torch.no_grad()
    def run(self, weights: Weights) -> list[torch.Tensor]:
        """Return what each decoder layer puts out, `[T, H]`, with some of them condensed."""
        self.runs += 1
        after: list[list[torch.Tensor]] = [[] for _ in self.decoders]
        with ExitStack() as stack:
            for key, kept in weights.items():
                stack.enter_context(replaced(self.model.get_submodule(self.layers[key].name), kept))
            for decoder, seen in zip(self.decoders, after, strict=True):
                stack.callback(
                    decoder.register_forward_hook(lambda m, a, out, seen=seen: seen.append(hidden(out))).remove
                )
            for ids in self.batches:
                self.model.model(input_ids=ids, use_cache=False)
        return [torch.cat(seen) for seen in after]

    def distance(self, weights: Weights, index: int = -1) -> float:
        """How far what a decoder layer puts out is from the original's."""
        was, now = self.original[index], self.run(weights)[index]
        if self.criterion == "js":
            return float(hidden_js(was, now).mean(dtype=torch.float64))
        return float((now - was).double().norm() / was.double().norm())

    def experts(self, key: str, gates: Sequence[float], keep: int) -> list[int]:
        """Take the experts of one layer, one after the other."""
        taken: list[int] = []
        for _ in range(keep):
            left = [e for e, gate in enumerate(gates) if e not in taken and gate]
            taken.append(
                best(left, lambda e: self.distance({key: {i: gates[i] for i in (*taken, e)}}, self.layers[key].index))
            )
        return taken

    def take_layers(self, weights: Weights, count: int) -> list[str]:
        """Take the layers, one after the other."""
        taken: list[str] = []
        for _ in range(count):
            left = [key for key in self.layers if key not in taken]
            taken.append(best(left, lambda key: self.distance({k: weights[k] for k in (*taken, key)})))
        return taken


def best(left: Sequence[Any], value: Callable[[Any], float]) -> Any:
    """Return what is lowest, of equals the first."""
    return min(left, key=value)


@contextmanager
def replaced(experts: Any, kept: Mapping[int, float]) -> Iterator[None]:
    """Let every token go through the same experts, one by one, with constant weights."""
    own = experts.forward

    def forward(x_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        out_TH, one_T1 = torch.zeros_like(x_TH), torch.ones_like(gates_TK[:, :1])
        for expert, weight in kept.items():
            out_TH += weight * own(x_TH, torch.full_like(index_TK[:, :1], expert), one_T1)
        return out_TH

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def hidden(output: Any) -> torch.Tensor:
    """Hidden states of what a decoder layer puts out, `[T, H]`."""
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(-1, output.shape[-1])


Found = tuple[list[str], dict[str, set[int]]]  # layers in their order, and the experts of each


def here(args: argparse.Namespace, stats: Path, criterion: str, text: Mapping[str, Any]) -> tuple[list[str], Found]:
    """Search, and return cells of the table."""
    tokens, start = args.samples * args.seq_len, time.perf_counter()
    wanted = {"method": "cd_moe", "keep_experts": args.keep_experts, "layers": args.layers, "criterion": criterion}
    running = {"dense_tokens": tokens, "dtype": "float32", "batch_size": args.batch_size}
    found = understudy.search(args.model, stats, stats.with_name(criterion), **wanted, **running, **text)
    seconds, (order, cost, *_) = time.perf_counter() - start, found.notes
    for_experts, for_layers = (float(word) for word in cost.replace(",", "").split() if word[0].isdigit())
    layers = [part.split()[0] for part in order.partition(": ")[2].split(", ")]
    kept = {key: {e for e, w in kinds["condense"].items() if w} for key, kinds in found.plan.layers.items()}
    return [f"{for_experts:.2f}", f"{for_layers:.2f}", f"{seconds:.1f}", " ".join(layers)], (layers, kept)


def theirs(args: argparse.Namespace, stats: Stats, criterion: str, ids: torch.Tensor, found: Found) -> list[str]:
    """Search as the authors do, and return cells of the table."""
    if args.no_slow:
        layers = stats.model.layers.values()
        runs = sum(layer.experts - n for layer in layers for n in range(args.keep_experts))
        return [str(runs), str(sum(len(layers) - n for n in range(args.layers))), "not run", ""]
    start, gates = time.perf_counter(), {key: mean_gates(layer).tolist() for key, layer in stats.layers.items()}
    authors = Authors(args.model, ids, criterion, args.batch_size)
    authors.runs = 0
    chosen = {key: authors.experts(key, gates[key], args.keep_experts) for key in authors.layers}
    spent = authors.runs
    weights = {key: {e: gates[key][e] for e in kept} for key, kept in chosen.items()}
    taken = authors.take_layers(weights, args.layers)
    same = (taken, {key: set(chosen[key]) for key in taken}) == found
    told = " ".join(taken) + (", the same experts" if same else f", others: {chosen}")
    return [str(spent), str(authors.runs - spent), f"{time.perf_counter() - start:.1f}", told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=DEMO / "model")
    parser.add_argument("--data", action="append")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--keep-experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--criterion", nargs="+", default=["js", "l2"], choices=["js", "l2"])
    parser.add_argument("--no-slow", action="store_true")
    args = parser.parse_args()
    drawn = {"samples": args.samples, "seq_len": args.seq_len}
    text = {"data": tuple(args.data or [f"{DEMO}/train/math.jsonl.xz"]), **drawn}
    ids = torch.from_numpy(token_blocks(text["data"], load_tokenizer(args.model), **drawn).ids)
    lines = ["| criterion | search | runs for experts | runs for layers | seconds | layers |", "|-|-|-|-|-|-|"]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "stats"
        understudy.calibrate(args.model, path, dtype="float32", **text)
        stats = load_stats(path)
        many = max(layer.experts / layer.top_k for layer in stats.model.layers.values())
        for criterion in args.criterion:
            bars = [f"{(5 if criterion == 'js' else 2) * many:g}", f"{args.layers * len(stats.model.layers) / 2:g}"]
            cells, found = here(args, path, criterion, text)
            slow = theirs(args, stats, criterion, ids.long(), found)
            for who, row in (("here", cells), ("at most", [*bars, "", ""]), ("the authors' way", slow)):
                lines.append(f"| {criterion} | {who} | {' | '.join(row)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
