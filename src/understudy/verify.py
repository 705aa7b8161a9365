"""Verify a written folder against its source and plan before anybody sees it.

Engines do not notice a missing expert and answer garbage, so the writer has to: every tensor is there with its shape,
kept bytes are the source's, everything is finite, and each changed layer answers a few tokens as the plan says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from understudy.entries import ids_of
from understudy.errors import CheckpointError, NumericError
from understudy.kinds import get_kind, stand_ins_of
from understudy.kinds.condense import slow_answer, staying
from understudy.kinds.modulate import modulate_of
from understudy.layout import model_facts
from understudy.modulated import HIDDEN, sizes_of
from understudy.moe import MoELayer
from understudy.plans import Plan
from understudy.removal import removed_layers
from understudy.shards import CHUNK, Lazy, Part, Piece, size_of
from understudy.skeleton import ROOT, Skeleton
from understudy.slowly import slow_answers, slow_means, slow_split
from understudy.stats import Probe, Stats
from understudy.weights import TensorEntry, Weights

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
    # layers that are gone answer nothing; that they are gone, the comparison of tensors has shown
    changed = [x for x in source.layers if plan.layers.get(x.key) and "layer_drop" not in plan.layers[x.key]]
    removed = removed_layers(source, plan)
    parts = [ROOT, *(i for i in range(len(source.decoder_layers)) if i not in removed)]
    for step, part in enumerate(parts):
        here = [layer for layer in changed if layer.index == part]
        probes = {layer.key: _probe_of(stats, layer) for layer in here}
        expected = {}
        if here:
            with source.resident(part):
                for layer in here:
                    form = _is_folded(written, layer)
                    expected[layer.key] = _planned(source, layer, plan, probes[layer.key], stats, form)
        try:
            with written.resident(part if not removed else step - 1):  # complete and finite, or it raises
                for layer in here:
                    _compare(written, layer, plan, probes[layer.key], expected[layer.key])
        except NumericError as error:  # every byte has been compared: it is the source that is broken
            raise NumericError(str(error).replace(str(folder), str(source.checkpoint.folder))) from None
        if progress:
            progress(step + 1, len(parts))


def verify_tensors(written: Weights, source: Weights, pieces: Sequence[Piece]) -> None:
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
            if not _same(written, entry, offset, part, source):
                raise CheckpointError(f"{where}: verification failed, {piece.name} differs from its source")
            offset += size_of(part)


def _same(written: Weights, entry: TensorEntry, offset: int, part: Part, source: Weights) -> bool:
    """Whether a tensor on disk holds a part at an offset; what was computed is known by its digest."""
    digest = hashlib.sha256()
    for begin in range(0, size_of(part), CHUNK):
        step = min(CHUNK, size_of(part) - begin)
        found = written.raw(entry, offset + begin, step)
        if isinstance(part, Lazy):
            digest.update(found)
        elif isinstance(part, bytes):
            if found != part[begin : begin + step]:
                return False
        elif found != source.raw(part.entry, part.start + begin, step):
            return False
    return not isinstance(part, Lazy) or digest.digest() == part.digest


def _probe_of(stats: Stats | None, layer: MoELayer) -> Probe:
    """Tokens of the calibration text, or random ones where there is none."""
    if stats is not None and layer.key in stats.probes:
        return stats.probes[layer.key]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, layer.hidden_size, generator=generator)
    index = torch.rand(8, layer.num_experts, generator=generator).argsort(dim=1)[:, : layer.top_k]
    weights = torch.rand(8, layer.top_k, generator=generator)
    return Probe(hidden.numpy(), index.numpy(), weights.numpy())


def _is_folded(written: Skeleton, layer: MoELayer) -> bool:
    """Whether a dense MLP is where the layer's experts were, shared ones included."""
    block = written.model.get_submodule(layer.block)
    return layer.name[len(layer.block) + 1 :] not in dict(block.named_modules())


def _planned(
    source: Skeleton, layer: MoELayer, plan: Plan, probe: Probe, stats: Stats | None, folded: bool
) -> torch.Tensor:
    """What the layer should answer, from the source's experts one route at a time: `[n, H]` float32."""
    experts = source.model.get_submodule(layer.name)
    hidden = torch.from_numpy(probe.hidden).to(source.dtype)
    if "condense" in plan.layers[layer.key]:
        inside = [name for name in layer.shared if folded and name.startswith(f"{layer.block}.")]
        shared = [source.model.get_submodule(name) for name in inside]
        with torch.no_grad():
            return slow_answer(experts, hidden, staying(plan.layers[layer.key]["condense"]), shared)
    weights = torch.from_numpy(probe.weights)
    index, _ = _routes(layer, plan, probe)
    tokens, k = index.shape
    modulate = modulate_of(plan, layer.key)
    known = stats.layers[layer.key] if stats else None
    means: dict[str, torch.Tensor] = {}  # by which fitted vectors rescale what main experts are given
    if modulate is not None and not modulate.plain:
        facts = model_facts(source, source.checkpoint.folder.name).layers[layer.key]
        before = weights.to(source.dtype).float()
        weights, shares = slow_split(stand_ins_of(plan, layer.key, facts), modulate, index, before)
        if modulate.fit:
            means = slow_means(modulate.fitted(layer.key, known, sizes_of(experts, modulate.vectors)), shares)
    if HIDDEN in means:
        hidden = (hidden.float() * (1 + means[HIDDEN])).to(source.dtype)
    with torch.no_grad():
        ones = torch.ones(tokens * k, 1, dtype=source.dtype)
        for name, entry in plan.layers[layer.key].items():
            experts = get_kind(name).having(plan.how.get(name, {})).reworked(experts, ids_of(entry), known)
        if means and HIDDEN not in means:
            routed = slow_answers(experts, hidden, index, means)
        else:
            routed = experts(hidden.repeat_interleave(k, 0), index.reshape(-1, 1), ones).float().view(tokens, k, -1)
        for expert, kind in plan.replaced(layer.key).items():
            token, slot = (index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            entry, how = plan.layers[layer.key][kind], plan.how.get(kind, {})
            answer = get_kind(kind).reference(experts, hidden[token], expert, entry, how, known)
            assert answer is not None
            routed[token, slot] = answer
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
    experts = written.model.get_submodule(layer.block if _is_folded(written, layer) else layer.name)
    hidden = torch.from_numpy(probe.hidden).to(written.dtype)
    _, index = _routes(layer, plan, probe)
    with torch.no_grad():
        if "condense" in plan.layers[layer.key]:
            got = experts(hidden).float()
        else:
            got = experts(hidden, index, torch.from_numpy(probe.weights).to(written.dtype)).float()
    scale = max(float(expected.abs().max()), 1e-6)
    worst = float((got - expected).abs().max()) / scale
    if not worst <= TOLERANCE.get(written.dtype, 1e-4):
        raise CheckpointError(
            f"{written.checkpoint.folder}: verification failed, layer {layer.key} differs from the plan by {worst:.1e} "
            "of its output"
        )
