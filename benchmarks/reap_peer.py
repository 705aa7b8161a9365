"""Does REAP keep the same experts here as in llm-compressor, on the same tokens?

    python benchmarks/reap_peer.py MODEL --data SPEC --python PEER/bin/python [--ratios 0.25,0.5]

`--python` is the interpreter of an environment of its own with llmcompressor >= 0.14, which wants an older transformers
than ours. There this same file runs `REAPPruningModifier` over the token ids that this side drew. Printed is, for each
layer, how many of the experts that either side keeps both keep; once for the peer's sequential pipeline, in which
a layer sees what the pruned layers before it put out, and once for its basic pipeline, where all see the original's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--ratios", default="0.25,0.5,0.75")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, work: Path) -> None:
    """Calibrate here, prune there, and print what both keep."""
    import numpy as np

    from understudy import calibrate, plan
    from understudy.data import token_blocks
    from understudy.tokens import load_tokenizer

    tokenizer = load_tokenizer(Path(args.model), False)
    blocks = token_blocks(tuple(args.data), tokenizer, seq_len=args.seq_len, samples=args.samples, seed=0)
    np.save(work / "ids.npy", blocks.ids)
    options = {"data": tuple(args.data), "samples": args.samples, "seq_len": args.seq_len, "dtype": args.dtype}
    stats = calibrate(args.model, work / "stats.safetensors", **options)
    assert stats.data["digest"] == blocks.digest
    for ratio in map(float, args.ratios.split(",")):
        ours = plan(stats, method="reap", ratio=ratio).plan
        for pipeline in ("sequential", "basic"):
            peer = ask_peer(args, work, ratio, pipeline)
            print(f"ratio {ratio:g}, {pipeline} pipeline", flush=True)
            for key, layer in stats.model.layers.items():
                mine, theirs = set(ours.kept(key, layer.experts)), set(peer[layer.name])
                print(f"  layer {key}: {len(mine & theirs)} of {len(mine)} kept experts are the same")


def ask_peer(args: argparse.Namespace, work: Path, ratio: float, pipeline: str) -> dict[str, list[int]]:
    """Run the peer and return the experts that it keeps, by the name of the experts module."""
    report = work / f"kept-{ratio}-{pipeline}.json"
    command = [args.python, __file__, "--peer", args.model, str(work / "ids.npy"), args.dtype, str(ratio), pipeline]
    done = subprocess.run([*command, str(report)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-3000:]}")
    return {f"{name}.experts": kept for name, kept in json.loads(report.read_text()).items()}


def run_peer(model: str, ids: str, dtype: str, ratio: str, pipeline: str, report: str) -> None:
    """What runs in the peer's environment."""
    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import REAPPruningModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = np.load(ids).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=data,
        recipe=REAPPruningModifier(sparsity=float(ratio), report_path=report),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        pipeline=pipeline,
    )


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["--peer"]:
        run_peer(*sys.argv[2:])
    else:
        main()
