"""Verify a written folder against its source and plan before anybody sees it.

Engines do not notice a missing expert and answer garbage, so the writer has to: every tensor is there with its shape,
kept bytes are the source's, everything is finite, and each changed layer answers a few tokens as the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from understudy.checkpoint import Checkpoint
from understudy.errors import CheckpointError, NumericError
from understudy.kinds import get_kind
from understudy.moe import MoELayer
from understudy.plans import Plan
from understudy.shards import CHUNK, Piece
from understudy.skeleton import ROOT, Skeleton
from understudy.stats import Probe, Stats

# Relative to the largest output of the layer; the sums are the same, only their order differs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def verify_folder(
    source: Skeleton,
    folder: Path,
    plan: Plan,
    pieces: Sequence[Piece],
    stats: Stats | None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read a written folder back and check it.

    Raises:
        CheckpointError: what is wrong, and in which tensor or layer.
        NumericError: the source holds NaN or infinity.
    """
    written = Skeleton(folder, device="cpu", trust_remote_code=trust_remote_code)
    verify_tensors(written.checkpoint, source.checkpoint, pieces)
    changed = [layer for layer in source.layers if plan.layers.get(layer.key)]
    parts = [ROOT, *range(len(source.decoder_layers))]
    for step, part in enumerate(parts):
        here = [layer for layer in changed if layer.index == part]
        probes = {layer.key: _probe_of(stats, layer) for layer in here}
        expected = {}
        if here:
            with source.resident(part):
                for layer in here:
                    expected[layer.key] = _planned(source, layer, plan, probes[layer.key], stats)
        try:
            with written.resident(part):  # complete and finite, or it raises
                for layer in here:
                    _compare(written, layer, plan, probes[layer.key], expected[layer.key])
        except NumericError as error:  # every byte has been compared: it is the source that is broken
            raise NumericError(str(error).replace(str(folder), str(source.checkpoint.folder))) from None
        if progress:
            progress(step + 1, len(parts))


def verify_tensors(written: Checkpoint, source: Checkpoint, pieces: Sequence[Piece]) -> None:
    """Compare what lies on disk with what should: names, dtypes, shapes and every byte.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    where = written.folder
    wanted = {piece.name for piece in pieces}
    if wanted != set(written.entries):
        absent, extra = sorted(wanted - set(written.entries)), sorted(set(written.entries) - wanted)
        raise CheckpointError(f"{where}: verification failed, missing {absent[:3]}, unexpected {extra[:3]}")
    for piece in pieces:
        entry = written.entries[piece.name]
        if (entry.dtype, entry.shape, entry.nbytes) != (piece.dtype, piece.shape, piece.nbytes):
            raise CheckpointError(
                f"{where}: verification failed, {piece.name} is {entry.dtype} {entry.shape}, "
                f"it should be {piece.dtype} {piece.shape}"
            )
        offset = 0
        for part in piece.parts:
            size = len(part) if isinstance(part, bytes) else part.nbytes
            for begin in range(0, size, CHUNK):
                step = min(CHUNK, size - begin)
                if isinstance(part, bytes):
                    expected: Any = part[begin : begin + step]
                else:
                    expected = source.raw(part.entry, part.start + begin, step)
                if written.raw(entry, offset + begin, step) != expected:
                    raise CheckpointError(f"{where}: verification failed, {piece.name} differs from its source")
            offset += size


def _probe_of(stats: Stats | None, layer: MoELayer) -> Probe:
    """Tokens of the calibration text, or random ones where there is none."""
    if stats is not None and layer.key in stats.probes:
        return stats.probes[layer.key]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, layer.hidden_size, generator=generator)
    index = torch.rand(8, layer.num_experts, generator=generator).argsort(dim=1)[:, : layer.top_k]
    weights = torch.rand(8, layer.top_k, generator=generator)
    return Probe(hidden.numpy(), index.numpy(), weights.numpy())


def _planned(source: Skeleton, layer: MoELayer, plan: Plan, probe: Probe, stats: Stats | None) -> torch.Tensor:
    """What the layer should answer, from the source's experts one route at a time: `[n, H]` float32."""
    experts = source.model.get_submodule(layer.name)
    hidden = torch.from_numpy(probe.hidden).to(source.dtype)
    weights = torch.from_numpy(probe.weights)
    index, _ = _routes(layer, plan, probe)
    replaced = plan.replaced(layer.key)
    tokens, k = index.shape
    with torch.no_grad():
        ones = torch.ones(tokens * k, 1, dtype=source.dtype)
        routed = experts(hidden.repeat_interleave(k, 0), index.reshape(-1, 1), ones).float().view(tokens, k, -1)
    for token in range(tokens):
        for slot in range(k):
            kind = replaced.get(int(index[token, slot]))
            if kind is not None:
                assert stats is not None
                value = get_kind(kind).answer(stats.layers[layer.key], int(index[token, slot]))
                routed[token, slot] = torch.from_numpy(value).to(source.dtype).float()
    return (routed * weights[:, :, None]).sum(1)


def _routes(layer: MoELayer, plan: Plan, probe: Probe) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids to ask the source for, and the ids by which the written layer knows the same experts."""
    index = torch.from_numpy(probe.index)
    kinds = plan.layers[layer.key]
    if not any(get_kind(kind).renumbers for kind in kinds):
        return index, index
    kept = torch.tensor(plan.kept(layer.key, layer.num_experts))
    tokens, k = index.shape
    new = (torch.arange(tokens)[:, None] * k + torch.arange(k)) % len(kept)  # every kept expert gets its turn
    return kept[new], new


def _compare(written: Skeleton, layer: MoELayer, plan: Plan, probe: Probe, expected: torch.Tensor) -> None:
    experts = written.model.get_submodule(layer.name)
    hidden = torch.from_numpy(probe.hidden).to(written.dtype)
    _, index = _routes(layer, plan, probe)
    with torch.no_grad():
        got = experts(hidden, index, torch.from_numpy(probe.weights).to(written.dtype)).float()
    scale = max(float(expected.abs().max()), 1e-6)
    worst = float((got - expected).abs().max()) / scale
    if not worst <= TOLERANCE.get(written.dtype, 1e-4):
        raise CheckpointError(
            f"{written.checkpoint.folder}: verification failed, layer {layer.key} differs from the plan by {worst:.1e} "
            "of its output"
        )
