"""MoNE on a trained model against a slow reference written from the paper's formulas: scores, choice and novices.

python tests/test_mone.py MODEL TEXT... runs the same check on another model and prints the largest differences.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import understudy
from contract import tensors_of
from understudy.data import token_blocks
from understudy.standins import declared

DEMO = Path(__file__).parent.parent / "examples" / "demo"
TEXT = {"samples": 12, "seq_len": 128, "seed": 3}


@pytest.mark.parametrize("gate", ["all-tokens", "routed"])
def test_mone_equals_its_formulas(gate: str, tmp_path: Path) -> None:
    specs = [str(f) for f in sorted((DEMO / "train").glob("*.jsonl.xz"))]
    worst = check(DEMO / "model", specs, tmp_path, gate)
    assert max(worst.values()) <= 1e-5, worst


def check(folder: Path, specs: list[str], work: Path, gate: str) -> dict[str, float]:
    """Largest relative differences of scores and novices; raises where another expert is chosen."""
    stats = work / "stats.safetensors"
    understudy.calibrate(folder, stats, data=specs, dtype="float32", **TEXT)
    result = understudy.plan(stats, method="mone", ratio=0.5, gate=gate)
    applied = understudy.apply(folder, result.plan, work / "out", stats=stats)
    ids = token_blocks(specs, AutoTokenizer.from_pretrained(folder), **TEXT).ids
    reference = slow_mone(folder, ids, gate)
    written = tensors_of(applied.folder)
    names = names_of_novices(applied.folder)
    worst = {"score": 0.0, "novice": 0.0}
    for key, (score, means) in reference.items():
        worst["score"] = max(worst["score"], relative(result.scores.layers[key], score))
        lowest = set(np.argsort(score, kind="stable")[: len(score) // 2].tolist())
        assert set(result.plan.replaced(key)) == lowest
        got = understudy_means(stats, key)
        worst["novice"] = max(worst["novice"], relative(got, means))
        for expert, name in names[key].items():  # stored in the dtype of the checkpoint
            stored = torch.from_numpy(means[expert]).to(written[name].dtype)
            torch.testing.assert_close(written[name], stored, rtol=1e-2, atol=1e-6)
    return worst


def slow_mone(folder: Path, ids: np.ndarray, gate: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score 0.25 * sqrt(trace of the output covariance) * mean gate, and mean output, from all outputs at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for index, layer in enumerate(model.model.layers):
        calls: list[tuple[torch.Tensor, ...]] = []
        layer.mlp.experts.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args))
        found[str(index)] = (layer.mlp.experts, calls)
    with torch.no_grad():
        for row in torch.from_numpy(ids).long().split(4):
            model(input_ids=row)
        return {key: _from_outputs(experts, calls, gate) for key, (experts, calls) in found.items()}


def _from_outputs(experts, calls, gate: str) -> tuple[np.ndarray, np.ndarray]:
    hidden, index, weights = (torch.cat([c[i] for c in calls]) for i in range(3))
    scores, means = [], []
    for expert in range(experts.num_experts):
        token, slot = torch.where(index == expert)
        gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        g, u = (hidden[token] @ gate_up.T).chunk(2, dim=1)
        y = ((torch.nn.functional.silu(g) * u) @ down.T).double()
        n = max(len(token), 1)
        mean = y.sum(0) / n
        spread = (((y - mean) ** 2).sum(0) / n).sum().sqrt()  # per dimension, divisor n, summed, then the root
        routed = weights[token, slot].double().sum()
        share = routed / (len(hidden) if gate == "all-tokens" else n)
        scores.append(float(0.5 * spread * (0.5 * share)))
        means.append(mean.float().numpy())
    return np.array(scores), np.array(means)


def understudy_means(stats: Path, key: str) -> np.ndarray:
    from understudy.stats import load_stats

    return load_stats(stats).layers[key].mean


def names_of_novices(folder: Path) -> dict[str, dict[int, str]]:
    import json

    config = json.loads((folder / "config.json").read_text())
    assert declared(config)
    targets = config["compression_config"]["transform_config"]["expert_substitution"]["targets"]
    return {
        module.split(".")[2]: {int(e): r["tensors"]["value"] for e, r in target["replacements"].items()}
        for module, target in targets.items()
    }


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        TEXT.update(samples=70, seq_len=256)
        print(check(Path(sys.argv[1]), sys.argv[2:], Path(folder), "all-tokens"))
