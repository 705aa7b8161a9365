"""Train the small Mixture-of-Experts model of ``examples/demo`` from scratch, on one CPU thread.

    python examples/train_demo_model.py --data TEXTS --test examples/demo/test --minutes 35 --out demo-model

``TEXTS`` is a folder of ``<domain>.jsonl.xz`` files, one document a line under the key ``text``; the README beside the
model names the public sources of the texts that the bundled model saw. Every step takes the same number of windows
from every domain, so that the domains weigh the same whatever their sizes, and the experts have something to divide
among themselves. The learning rate follows the clock rather than a count of steps: the run always ends its schedule,
on a slow machine as on a fast one, and two runs with one seed differ only in how many steps they had time for.

Plain float32 is used on purpose: without matrix units for bfloat16, autocast came out two to three times slower on the
CPU that this was written on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD = "<|pad|>"
AUX_WEIGHT = 0.01  # load balance, as OLMoE was trained
Z_WEIGHT = 0.001  # keeps the router's logits small, likewise


def read_domains(folder: Path) -> dict[str, list[str]]:
    """Return the documents of every ``<domain>.jsonl.xz`` file in ``folder``, by domain."""
    domains = {}
    for path in sorted(folder.glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            domains[path.name.removesuffix(".jsonl.xz")] = [json.loads(line)["text"] for line in lines]
    if not domains:
        raise SystemExit(f"no *.jsonl.xz files in {folder}")
    return domains


def train_tokenizer(domains: dict[str, list[str]], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; digits stay single, which small models need for arithmetic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for texts in domains.values() for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return one long row of token ids, with the end-of-text token before, between and after the documents."""
    eos = tokenizer.eos_token_id
    ids = [eos]
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [*encoding.ids, eos]
    return torch.tensor(ids)


def build_model(tokenizer: PreTrainedTokenizerFast, seq_len: int) -> OlmoeForCausalLM:
    """Return an untrained OLMoE of 4.5 million parameters, 3.1 million of them in its experts.

    Heads of 32 and widths that are multiples of 128 suit the kernels of serving engines; the output matrix is not tied
    to the embedding because not every engine ties it for this architecture.
    """
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        router_aux_loss_coef=AUX_WEIGHT,
        max_position_embeddings=seq_len,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OlmoeForCausalLM(config)


def router_losses(router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the load-balancing loss, the z-loss (means over layers) and the largest relative load of an expert.

    The balance is asked of every layer by itself; over all layers at once, one layer could make up for another.
    """
    balance, z_loss, peak = [], [], 0.0
    for logits in router_logits:
        experts = logits.shape[-1]
        chosen = logits.detach().topk(top_k, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        balance.append(experts * (load * logits.softmax(-1).mean(0)).sum())
        z_loss.append(logits.logsumexp(-1).square().mean())
        peak = max(peak, float(load.max()) * experts)
    return torch.stack(balance).mean(), torch.stack(z_loss).mean(), peak


def learning_rate(peak: float, done: float, warmup: float = 0.02, floor: float = 0.03) -> float:
    """Return the learning rate when the fraction ``done`` of the time is over: linear warmup, then a half cosine."""
    if done < warmup:
        return peak * max(done / warmup, 0.01)
    progress = (done - warmup) / (1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def sample(streams: list[torch.Tensor], per_domain: int, seq_len: int, rng: np.random.Generator) -> torch.Tensor:
    """Return random windows of ``seq_len + 1`` tokens, ``per_domain`` from every stream."""
    windows = []
    for stream in streams:
        for start in rng.integers(0, len(stream) - seq_len, per_domain):
            windows.append(stream[start : start + seq_len + 1])
    return torch.stack(windows)


def train(model: OlmoeForCausalLM, streams: list[torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Train ``model`` in place for ``args.minutes`` and return what was done."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    rng = np.random.default_rng(args.seed)
    model.train()
    seconds, begin, step, tokens, smooth = args.minutes * 60, time.monotonic(), 0, 0, math.nan
    while (elapsed := time.monotonic() - begin) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, elapsed / seconds)
        batch = sample(streams, args.per_domain, args.seq_len, rng)
        output = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        balance, z_loss, peak = router_losses(output.router_logits, model.config.num_experts_per_tok)
        (cross_entropy + AUX_WEIGHT * balance + Z_WEIGHT * z_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens += batch[:, 1:].numel()
        loss = cross_entropy.item()
        smooth = loss if step == 1 else 0.98 * smooth + 0.02 * loss
        if step % 100 == 0:
            rate = tokens / (time.monotonic() - begin)
            print(
                f"step {step}  {elapsed / 60:.1f} min  loss {smooth:.3f}  balance {balance.item():.3f}  "
                f"largest load {peak:.2f}  gradient {norm.item():.2f}  {rate:.0f} tokens/s",
                flush=True,
            )
    return {"parameters": model.num_parameters(), "steps": step, "tokens": tokens, "loss": round(smooth, 4)}


@torch.no_grad()
def perplexity(model: OlmoeForCausalLM, stream: torch.Tensor, seq_len: int, batch: int = 8) -> float:
    """Return the perplexity of ``model`` on ``stream``, cut into windows that do not overlap."""
    count = (len(stream) - 1) // seq_len
    inputs = stream[: count * seq_len].view(count, seq_len)
    targets = stream[1 : count * seq_len + 1].view(count, seq_len)
    total = 0.0
    for x, y in zip(inputs.split(batch), targets.split(batch)):
        logits = model(input_ids=x, use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return math.exp(total / targets.numel())


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bfloat16 checkpoint and its tokenizer."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for the owner alone, unlike the files beside it
    tokenizer.save_pretrained(out)
    # The class name that transformers 5 writes by itself is unknown to the 4.x that some serving engines still use.
    settings_file = out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of <domain>.jsonl.xz files to train on")
    parser.add_argument("--test", type=Path, help="folder of <domain>.jsonl.xz files to report perplexity on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--domains", nargs="+", help="use only these domains of --data; all by default")
    parser.add_argument("--minutes", type=float, default=35.0, help="wall clock for the training loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--per-domain", type=int, default=1, help="windows of each domain in a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, save both and report held-out perplexity."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    domains = read_domains(args.data)
    if args.domains:
        domains = {name: domains[name] for name in args.domains}
    tokenizer = train_tokenizer(domains, args.vocab, args.seq_len)
    streams = {name: token_stream(tokenizer, texts) for name, texts in domains.items()}
    for name, stream in streams.items():
        print(f"{name}: {len(domains[name])} documents, {len(stream):,} tokens", flush=True)

    model = build_model(tokenizer, args.seq_len)
    print(f"{model.num_parameters():,} parameters", flush=True)
    model.set_experts_implementation("grouped_mm")
    record = train(model, list(streams.values()), args)
    save(model, tokenizer, args.out)

    # The saved weights are judged, not the float32 ones: bfloat16 rounding is part of what a user gets.
    model = OlmoeForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    record |= {"minutes": args.minutes, "seed": args.seed, "lr": args.lr}
    if args.test:
        held_out = {name: token_stream(tokenizer, texts) for name, texts in read_domains(args.test).items()}
        record["test_perplexity"] = {n: round(perplexity(model, s, args.seq_len), 2) for n, s in held_out.items()}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
