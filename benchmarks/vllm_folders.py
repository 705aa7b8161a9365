"""Write compressed folders of several shapes for a real vLLM to read, each with what transformers answers.

    python benchmarks/vllm_folders.py OUT [--model FOLDER --stats STATS]

For OLMoE, Qwen3-MoE, Mixtral and GLM-4-MoE shapes, and for --model: constants with the same and with different numbers
in each layer, experts removed, and where the family knows dense layers, the first sparse one condensed into such.
Beside each folder lies NAME.npz: greedy tokens and log-probabilities in float32.
An engine agrees if its greedy tokens are equal and its log-probabilities are within 1e-4.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import understudy
from understudy.data import Blocks
from understudy.dense import dense_layers
from understudy.facts import DenseLayers
from understudy.layout import model_facts
from understudy.plans import Plan, PlanModel
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import collect
from understudy.stats import Stats, load_stats

COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, Any] = {
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=32, num_experts=8, num_experts_per_tok=3),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, head_dim=32
    ),
    "mixtral": MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2, head_dim=32),
    "glm4_moe": Glm4MoeConfig(
        **COMMON,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=32,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--stats", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name, config in SHAPES.items():
            folder = random_model(config, Path(work) / name)
            write(args.out, name, folder, random_stats(folder, Path(work) / f"{name}-work"))
    if args.model:
        write(args.out, args.model.name, args.model, load_stats(args.stats))


def random_model(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for tensor in model.parameters():
        if tensor.dim() > 1:
            tensor.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def random_stats(folder: Path, work: Path) -> Stats:
    skeleton = Skeleton(folder)
    ids = np.random.default_rng(0).integers(3, 199, (16, 64)).astype(np.int32)
    facts = model_facts(skeleton, folder.name)
    blocks = Blocks(ids, np.zeros(len(ids), np.int16), ("random",), (), "0" * 64)
    layers, probes = collect(skeleton, facts, blocks, Calibration(), work)
    return Stats(facts, {}, layers, probes)


def write(out: Path, name: str, folder: Path, stats: Stats) -> None:
    even = understudy.plan(stats, method="mone", ratio=0.5).plan
    quarter = understudy.plan(stats, method="mone", ratio=0.25).plan
    uneven = understudy.plan(stats, method="mone", ratio=0.5, scope="model").plan
    if len({len(k["constant"]) for k in uneven.layers.values()}) == 1:  # make sure that it is
        uneven = shifted(stats, even)
    drop = understudy.plan(stats, method="reap", ratio=0.25).plan
    plans = {"even": even, "quarter": quarter, "uneven": uneven, "drop": drop}
    if isinstance(dense_layers(Skeleton(folder)), DenseLayers):
        plans["condensed"] = condensed(stats)
    for kind, plan in plans.items():
        target = out / f"{name}-{kind}"
        understudy.apply(folder, plan, target, stats=stats)
        reference(target, out / f"{name}-{kind}.npz")
        print(target, {k: len(ids) for k, kinds in plan.layers.items() for ids in kinds.values()}, flush=True)


def shifted(stats: Stats, plan: Plan) -> Plan:
    """One constant fewer in the first layer."""
    layers = {key: dict(kinds) for key, kinds in plan.layers.items()}
    first = next(iter(layers))
    layers[first] = {"constant": layers[first]["constant"][1:]}
    return Plan(method="edited", model=PlanModel.of(stats.model), layers=layers)


def condensed(stats: Stats) -> Plan:
    """Two experts of the first sparse layer for all tokens; the others, and the router, go."""
    first, layer = next(iter(stats.model.layers.items()))
    weights = dict.fromkeys(range(layer.experts), 0.0) | {1: 0.4, 5: 0.25}
    return Plan(method="edited", model=PlanModel.of(stats.model), layers={first: {"condense": weights}})


def reference(folder: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = model.config.get_text_config().vocab_size
    prompts = np.random.default_rng(0).integers(3, vocabulary, (3, 12))
    with torch.no_grad():
        ids = model.generate(torch.from_numpy(prompts), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        logprobs = model(ids).logits.float().log_softmax(-1)[:, :-1]
    np.savez(out, prompts=prompts, ids=ids.numpy(), logprobs=logprobs.numpy())


if __name__ == "__main__":
    main()
