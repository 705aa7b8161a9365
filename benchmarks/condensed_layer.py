"""Whether a condensed layer costs what a dense MLP of its width costs, beside the sparse layer that it was.

    python benchmarks/condensed_layer.py [--hidden 1024 --width 512 --experts 64 --keep 6 --threads 1 --dtype float32]

A layer of a random OLMoE (top-8), condensed to --keep experts in the form that needs `import understudy`, and a plain
gate-up-down MLP as wide as these together. (Where a family has dense layers, a condensed one is its own dense MLP.)
Milliseconds of the condensed layer, and how many times as fast it is as the other, median and range over turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from inference import compare, entering, random_stats
from models import olmoe_config, write_random
from understudy.plans import Plan, PlanModel
from understudy.skeleton import Skeleton
from understudy.speed import whole
from understudy.virtual import planned


class Dense(nn.Module):
    """A gate-up-down MLP, gate and up in one product as the experts have them."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.first, self.down = nn.Linear(hidden, 2 * width, bias=False), nn.Linear(width, hidden, bias=False)

    def forward(self, x: Any) -> Any:
        """Run the tokens through."""
        gate, up = self.first(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--keep", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "understudy-benchmark")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = olmoe_config(2, args.hidden, args.experts, args.width, eos_token_id=None)
    folder = write_random(args.work / f"olmoe-2x{args.experts}-{args.hidden}-{args.width}", config, torch.bfloat16)
    source = Skeleton(folder, dtype=args.dtype, device="cpu")
    stats = random_stats(source)
    weights = {e: float(e < args.keep) / args.keep for e in range(args.experts)}
    plan = Plan(method="benchmark", model=PlanModel.of(stats.model), layers={"0": {"condense": weights}})
    model, layer = planned(source, plan, stats), source.layers[0]
    dense = Dense(args.hidden, args.keep * args.width).to(source.dtype).eval()
    ids_S = np.random.default_rng(0).integers(3, config.vocab_size, 512).astype(np.int32)
    print("| T | condensed, ms | x dense MLP of that width | x the sparse layer |\n|---|---|---|---|")
    with whole(source), whole(model):
        block, sparse = (skeleton.model.get_submodule(layer.block) for skeleton in (model, source))
        x_1TH = entering(source, sparse, ids_S)
        for inputs in (list(x_1TH[:, ::32].split(1, 1)), [x_1TH]):
            cells = [compare([block, other], inputs, args.repeats, source.device) for other in (dense, sparse)]
            first, *more = (cell.split(", ", 1) for cell in cells)
            print(f"| {inputs[0].shape[1]} | {first[0]} | {first[1]} | {more[0][1]} |", flush=True)


if __name__ == "__main__":
    main()
