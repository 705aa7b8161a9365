"""Calibrate: one streamed pass over text that collects every statistic of every expert."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from understudy.activations import ActivationStore
from understudy.checkpoint import resolve
from understudy.data import Blocks, token_blocks
from understudy.errors import DataError, OutputError, StatsError
from understudy.facts import ModelFacts, parse_bytes
from understudy.layout import model_facts
from understudy.moe import MoELayer
from understudy.recipe import Calibration, settings_from
from understudy.skeleton import Skeleton
from understudy.stats import ExpertStats, Probe, Stats, load_stats
from understudy.tap import Tap
from understudy.tokens import load_tokenizer, longest_sequence
from understudy.walk import Walk

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


def calibrate(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    settings: Calibration | None = None,
    **options: Any,
) -> Stats:
    """Run text through a model, layer by layer, and write the statistics of its experts to `out`.

    Args:
        model: a local folder or a hub id.
        out: the statistics file; a work folder beside it holds finished layers until the end, and a later call with the
            same model, data and settings goes on from there.
        progress: called with (finished layers, all layers).
        settings: every setting; or give them by name (`data`, `samples`, `seq_len`, ... of `recipe.Calibration`).

    Raises:
        UnderstudyError: bad model, data or settings, or an output that exists already.
    """
    chosen = settings_from(Calibration, settings, options)
    target = Path(out)
    if target.exists():
        raise OutputError(f"{target} exists already; choose another --out or remove it")
    folder = resolve(model)
    skeleton = Skeleton(
        folder,
        dtype=chosen.dtype,
        device=chosen.device,
        experts=chosen.experts,
        trust_remote_code=chosen.trust_remote_code,
    )
    if skeleton.has_stand_ins:
        raise StatsError(f"{folder} holds stand-ins already; calibrate the original model")
    limit = longest_sequence(skeleton.config)
    if chosen.seq_len > limit:
        raise DataError(f"--seq-len {chosen.seq_len} is more than the {limit} positions of {folder}")
    blocks = token_blocks(
        chosen.data,
        load_tokenizer(folder, chosen.trust_remote_code),
        seq_len=chosen.seq_len,
        samples=chosen.samples,
        seed=chosen.seed,
    )
    if blocks.ids.max() >= (vocabulary := skeleton.model.get_input_embeddings().weight.shape[0]):
        raise DataError(f"{folder}: its tokenizer gives ids past its vocabulary of {vocabulary}")
    facts = model_facts(skeleton, str(model))
    rank, world = _processes(skeleton.device)
    work = _work_folder(target, facts, blocks, chosen, world)
    layers, probes = collect(skeleton, facts, blocks, chosen, work, progress, rank, world)
    stats = Stats(facts, _data_facts(blocks, chosen), layers, probes)
    if rank == 0:
        _report_unseen(stats)
        stats.save(target)
        shutil.rmtree(work, ignore_errors=True)
    if world > 1:
        torch.distributed.barrier()
    return load_stats(target)


def collect(
    skeleton: Skeleton,
    facts: ModelFacts,
    blocks: Blocks,
    settings: Calibration,
    work: Path,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[dict[str, ExpertStats], dict[str, Probe]]:
    """Walk token blocks through a model and return the sums and probes of each MoE layer, by its key.

    Finished layers are kept in `work`, from where a later call with the same arguments goes on.
    """
    return _Run(skeleton, facts, blocks, settings, work, rank, world).collect(progress)


class _Run:
    """One process's share of a calibration, able to go on where an interrupted one stopped."""

    def __init__(
        self,
        skeleton: Skeleton,
        facts: ModelFacts,
        blocks: Blocks,
        settings: Calibration,
        work: Path,
        rank: int,
        world: int,
    ) -> None:
        if len(blocks.ids) < world:
            raise DataError(f"{len(blocks.ids)} blocks cannot be split over {world} processes; give more text")
        self.skeleton, self.facts, self.rank, self.world = skeleton, facts, rank, world
        self.work, self.mine = work, work / f"rank-{rank}"
        self.mine.mkdir(parents=True, exist_ok=True)
        store = ActivationStore(parse_bytes(settings.activation_memory), self.mine, skeleton.device)
        ids = np.array_split(blocks.ids, world)[rank]
        self.walk = Walk(skeleton, ids, settings.batch_size, store)
        self.by_depth: dict[int, list[MoELayer]] = {}
        for layer in skeleton.layers:
            self.by_depth.setdefault(layer.index, []).append(layer)

    def collect(self, progress: Progress | None) -> tuple[dict[str, ExpertStats], dict[str, Probe]]:
        """Walk the layers that are not finished, then merge the sums of all processes in the order of their rank."""
        finished = self._resume()
        total = self.walk.depth

        def done(index: int) -> None:
            if progress:
                progress(index + 1, total)

        if progress:
            progress(finished, total)
        if finished < total:
            with self.walk.ready():
                self.walk.through_layers(self._observe, start=finished, done=done)
        layers, probes = {}, {}
        for layer in self.skeleton.layers:
            local = self._load(layer.key)
            layers[layer.key] = _merge_over_processes(local.layers[layer.key], self.world)
            probes[layer.key] = local.probes[layer.key]
        return layers, probes

    @contextmanager
    def _observe(self, index: int, module: nn.Module) -> Iterator[None]:
        taps = []
        for layer in self.by_depth.get(index, []):
            experts = self.skeleton.model.get_submodule(layer.name)
            taps.append((layer, Tap(experts, layer.num_experts)))
        with ExitStack() as stack:
            for _, tap in taps:
                stack.enter_context(tap.attached())
            yield
        # Saved before the activations are committed: a kill in between repeats the layer, never skips it.
        for layer, tap in taps:
            assert tap.stats is not None and tap.probe is not None, f"layer {layer.key} was never called"
            only = self.facts.model_copy(update={"layers": {layer.key: self.facts.layers[layer.key]}})
            Stats(only, {}, {layer.key: tap.stats}, {layer.key: tap.probe}).save(self._file(layer.key))

    def _resume(self) -> int:
        last = self.walk.store.resume(len(self.walk.batches))
        finished = 0 if last is None else last + 1
        if any(not self._file(x.key).exists() for x in self.skeleton.layers if x.index < finished):
            finished = 0
        agreed = _minimum_over_processes(finished, self.world)
        if agreed != finished:  # another process was killed earlier; what this one has is one layer too far
            agreed = 0
        agreed = _minimum_over_processes(agreed, self.world)
        if agreed:
            logger.info("going on at layer %d of an interrupted calibration in %s", agreed, self.work)
        else:
            self.walk.store.forget()
        return agreed

    def _file(self, key: str) -> Path:
        return self.mine / f"stats-{key}.safetensors"

    def _load(self, key: str) -> Stats:
        return load_stats(self._file(key))


def _work_folder(target: Path, facts: ModelFacts, blocks: Blocks, settings: Calibration, world: int) -> Path:
    """A folder named after everything that the sums depend on, so that only the same run is ever continued."""
    parts = [facts.fingerprint, blocks.digest, settings.dtype, settings.device, settings.experts]
    identity = json.dumps([*parts, settings.batch_size, world])
    name = f".{target.name}.{hashlib.sha256(identity.encode()).hexdigest()[:12]}.partial"
    work = target.parent / name
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{work}: cannot be created ({error.strerror})") from None
    return work


def _data_facts(blocks: Blocks, settings: Calibration) -> dict[str, Any]:
    drawn = {name: int((blocks.source == i).sum()) for i, name in enumerate(blocks.names)}
    return {
        "specs": list(settings.data),
        "blocks": drawn,
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "digest": blocks.digest,
        "notes": list(blocks.notes),
    }


def _report_unseen(stats: Stats) -> None:
    unseen = {key: int((layer.count == 0).sum()) for key, layer in stats.layers.items()}
    if total := sum(unseen.values()):
        worst = max(unseen, key=lambda key: unseen[key])
        logger.warning(
            "%d of %d experts saw no token (most in layer %s: %d); their scores are 0 and a constant in their place "
            "would be the zero vector; give more or other text to reach them",
            total,
            stats.model.experts,
            worst,
            unseen[worst],
        )


def _processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of processes, as set by `accelerate launch` or `torchrun`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")  # opens the process group with the backend that suits the device
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _merge_over_processes(local: ExpertStats, world: int) -> ExpertStats:
    if world == 1:
        return local
    names = [f.name for f in fields(ExpertStats)]
    flat = torch.from_numpy(np.concatenate([np.asarray(getattr(local, n), np.float64).ravel() for n in names]))
    gathered = [torch.empty_like(flat) for _ in range(world)]
    torch.distributed.all_gather(gathered, flat)
    merged = None
    for part in gathered:
        values, start = {}, 0
        for name in names:
            shape = np.asarray(getattr(local, name)).shape
            size = int(np.prod(shape, dtype=np.int64))
            values[name] = part[start : start + size].numpy().reshape(shape)
            start += size
        other = replace(local, **values)
        merged = other if merged is None else merged + other
    assert merged is not None
    return merged


def _minimum_over_processes(value: int, world: int) -> int:
    if world == 1:
        return value
    tensor = torch.tensor(value)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
    return int(tensor)
