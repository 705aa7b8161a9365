"""MC-SMoE with the similarity of published code against the corrected one: distance to the original on held-out text.

    python benchmarks/mc_smoe_similarity.py MODEL --data SPEC [--data SPEC] --test SPEC [--test SPEC] [--out FOLDER]

MC-SMoE lets an expert join the dominant expert whose router logits are most like its own. In the code that a later
paper took its baseline from, every batch overwrites the similarities of the one before, only pairs with i < j are
filled in and the others read 0, the logits pass a sigmoid first, and the share of routes that an expert gets is divided
by its sum after every batch, so that late batches count most. This runs both, at 25% and 50% of the experts and for
three draws of the calibration text, and changes nothing but the similarity, or that and the frequency. Writes
results.json, from which an interrupted run goes on, and results.md.

The published code reads blocks of 4096 tokens one by one, hence the size of a batch here.

Letters: T tokens of a batch, H hidden size, E experts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import understudy
from understudy.activations import ActivationStore
from understudy.data import token_blocks
from understudy.moe import find_moe_layers
from understudy.plans import Plan
from understudy.quality import ALL, KL, NLL, TOKENS, by_source, predict
from understudy.skeleton import Skeleton
from understudy.stats import Stats, load_stats
from understudy.tokens import load_tokenizer
from understudy.virtual import planned
from understudy.walk import Walk

BATCH_TOKENS = 4096
VARIANTS = ("corrected", "published similarity", "published similarity and frequency")


class Published:
    """What the published code keeps of one layer, batch after batch."""

    def __init__(self, router_EH: torch.Tensor) -> None:
        self.router_EH = router_EH
        self.similarity = torch.eye(len(router_EH), dtype=torch.float64)
        self.frequency = torch.zeros(len(router_EH), dtype=torch.float64)

    def see(self, module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        """Take in one call of the experts: hidden states `[T, H]` and the ids of the chosen experts."""
        hidden_TH, index_TK, *_ = (*args, *kwargs.values())
        score_TE = torch.sigmoid(hidden_TH.float() @ self.router_EH.float().T).double()
        unit_TE = score_TE / score_TE.norm(dim=0)
        self.similarity = torch.triu((unit_TE.T @ unit_TE + 1) / 2, 1) + torch.eye(len(self.router_EH))
        self.frequency += torch.bincount(index_TK.flatten(), minlength=len(self.router_EH))
        self.frequency /= self.frequency.sum()


def published(args: argparse.Namespace, seed: int) -> dict[str, Published]:
    """Run the calibration text through the whole model, as the published code does."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(args.model)
    blocks = token_blocks(args.data, tokenizer, seq_len=args.seq_len, samples=args.samples, seed=seed)
    found, tensors = {}, model.state_dict()
    for layer in find_moe_layers(model):
        matrices = [weight for name in layer.router if (weight := tensors[name]).dim() == 2]
        found[layer.key] = Published(matrices[0].detach())
        model.get_submodule(layer.name).register_forward_pre_hook(found[layer.key].see, with_kwargs=True)
    order = np.random.default_rng(seed).permutation(len(blocks.ids))  # the last batch is of every source
    with torch.no_grad():
        for ids in torch.from_numpy(blocks.ids[order]).long().split(max(1, BATCH_TOKENS // args.seq_len)):
            model(ids)
    return found


def altered(stats: Stats, seen: dict[str, Published], variant: str) -> Stats:
    """Put the published numbers in the place of the sums that the method reads.

    With ones on its diagonal the matrix of similarities is its own matrix of cosines. The published code looks up row
    and column the other way round.
    """
    layers = dict(stats.layers)
    for key, layer in seen.items() if variant != VARIANTS[0] else ():
        layers[key] = replace(layers[key], logit_gram=layer.similarity.T.numpy())
        if variant == VARIANTS[2]:
            layers[key] = replace(layers[key], count=layer.frequency.numpy() * float(layers[key].count.sum()))
    return replace(stats, layers=layers)


class Held:
    """The original on held-out text: how far a plan takes it from there, without writing anything."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.source = Skeleton(args.model, dtype="float32")
        tokenizer = load_tokenizer(args.model)
        self.blocks = token_blocks(args.test, tokenizer, seq_len=args.seq_len, samples=args.samples)
        self.original = self._through(self.source)

    def figures(self, plan: Plan, stats: Stats) -> dict[str, float]:
        """KL(original || model) in nats a token, and the perplexity of the model."""
        sums = by_source(self.blocks, predict([self._through(planned(self.source, plan, stats)), self.original], quiet))
        means = sums[ALL] / sums[ALL][TOKENS]
        return {"kl": float(means[KL]), "perplexity": math.exp(means[NLL])}

    def _through(self, skeleton: Skeleton) -> Walk:
        walk = Walk(skeleton, self.blocks.ids, 4, ActivationStore(2 << 30))
        with walk.ready():
            walk.through_layers()
        return walk


def quiet(what: str, done: int, total: int) -> None:
    """Report no progress."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--test", action="append", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=70, help="blocks of text, for each of the two sides")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    done = out / "results.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text())["results"] if done.exists() else []
    reading = {"samples": args.samples, "seq_len": args.seq_len, "dtype": "float32"}
    held = Held(args)
    for seed in args.seeds:
        left = list(itertools.product(args.ratios, VARIANTS))
        left = [x for x in left if not any((r["ratio"], r["variant"], r["seed"]) == (*x, seed) for r in rows)]
        if not left:
            continue
        path = out / f"stats-{seed}.safetensors"
        if not path.exists():
            understudy.calibrate(args.model, path, data=tuple(args.data), seed=seed, **reading)
        stats, seen = load_stats(path), published(args, seed)
        for ratio, variant in left:
            mine = altered(stats, seen, variant)
            plan = understudy.plan(mine, method="mc_smoe", ratio=ratio).plan
            rows.append({"ratio": ratio, "variant": variant, "seed": seed, **held.figures(plan, mine)})
            done.write_text(json.dumps({"results": rows}, indent=1))
            print(ratio, variant, seed, round(rows[-1]["kl"], 4), flush=True)
    (out / "results.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds; the last column is of differences at the same seed."""
    lines = ["| experts merged away | similarity | KL, nats a token | perplexity | KL above corrected |", "|-|-|-|-|-|"]
    for ratio, variant in itertools.product(sorted({r["ratio"] for r in rows}), VARIANTS):
        mine, base = (
            {r["seed"]: r for r in rows if (r["ratio"], r["variant"]) == (ratio, v)} for v in (variant, VARIANTS[0])
        )
        above = "" if variant == VARIANTS[0] else spread([mine[s]["kl"] - base[s]["kl"] for s in mine], 4)
        cells = [spread([r["kl"] for r in mine.values()], 4), spread([r["perplexity"] for r in mine.values()], 2)]
        lines.append(f"| {ratio:.0%} | {variant} | {cells[0]} | {cells[1]} | {above} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
