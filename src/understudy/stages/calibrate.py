"""Calibrate: one streamed pass over text that collects every statistic of every expert."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from understudy._version import __version__
from understudy.activations import ActivationStore
from understudy.checkpoint import resolve
from understudy.data import Blocks, token_blocks
from understudy.errors import DataError, NumericError, OutputError, StatsError, reason
from understudy.facts import ModelFacts, parse_bytes
from understudy.held import held, work_folder
from understudy.layout import model_facts
from understudy.moe import MoELayer
from understudy.processes import Processes, join_processes
from understudy.recipe import Calibration, settings_from
from understudy.runtime import pick_device
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
    processes = join_processes(pick_device(chosen.device))
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
    blocks, facts = _blocks(skeleton, folder, chosen), model_facts(skeleton, str(model))
    with held(target) if processes.rank == 0 else nullcontext():
        work = work_folder(target) / _run_key(skeleton, blocks, chosen, processes)
        finished = work / "stats.safetensors"
        stats = None
        if not processes.minimum(finished.exists()):  # else a run was killed while it tidied up
            _only(work, work.parent)
            try:
                layers, probes = collect(skeleton, facts, blocks, chosen, work, progress, processes)
            except NumericError:  # going on from there would end there again
                _tidy(work)
                raise
            stats = Stats(facts, _data_facts(blocks, chosen), layers, probes)
        if processes.rank == 0:
            if stats is not None:
                stats.save(finished)
            _publish(finished, target)
    processes.wait()
    if processes.rank:
        _tidy(work)  # where the processes do not share a disk
    stats = load_stats(target) if target.exists() or stats is None else stats
    if processes.rank == 0:
        _report_unseen(stats)
    return stats


def _blocks(skeleton: Skeleton, folder: Path, settings: Calibration) -> Blocks:
    """Tokenise and draw the text, as far as the model can take it."""
    limit = longest_sequence(skeleton.config)
    if settings.seq_len > limit:
        raise DataError(f"--seq-len {settings.seq_len} is more than the {limit} positions of {folder}")
    blocks = token_blocks(
        settings.data,
        load_tokenizer(folder, settings.trust_remote_code),
        seq_len=settings.seq_len,
        samples=settings.samples,
        seed=settings.seed,
    )
    if blocks.ids.max() >= (vocabulary := skeleton.model.get_input_embeddings().weight.shape[0]):
        raise DataError(f"{folder}: its tokenizer gives ids past its vocabulary of {vocabulary}")
    return blocks


def collect(
    skeleton: Skeleton,
    facts: ModelFacts,
    blocks: Blocks,
    settings: Calibration,
    work: Path,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> tuple[dict[str, ExpertStats], dict[str, Probe]]:
    """Walk token blocks through a model and return the sums and probes of each MoE layer, by its key.

    All blocks are of one length, so nothing is padded and every position counts. Finished layers are kept in `work`,
    from where a later call with the same arguments goes on.
    """
    return _Run(skeleton, facts, blocks, settings, work, processes or Processes()).collect(progress)


class _Run:
    """One process's share of a calibration, able to go on where an interrupted one stopped."""

    def __init__(
        self,
        skeleton: Skeleton,
        facts: ModelFacts,
        blocks: Blocks,
        settings: Calibration,
        work: Path,
        processes: Processes,
    ) -> None:
        if len(blocks.ids) < processes.world:
            few = f"{len(blocks.ids)} blocks cannot be split over {processes.world} processes"
            raise DataError(f"{few}; give more text or start fewer")
        self.skeleton, self.facts, self.processes = skeleton, facts, processes
        self.mine = work / f"rank-{processes.rank}"
        memory = parse_bytes(settings.activation_memory)
        self.store = ActivationStore(memory, self.mine, skeleton.device, processes.wait)
        ids = np.array_split(blocks.ids, processes.world)[processes.rank]
        self.walk = Walk(skeleton, ids, settings.batch_size, self.store)
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
            layers[layer.key] = self.processes.merged(local.layers[layer.key])
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
        """Open the last layer that every process has finished and return the number of the next; 0 where none is."""
        batches = len(self.walk.batches)
        latest = self.store.latest(batches)
        if latest is None or not all(self._is_there(x.key) for x in self.skeleton.layers if x.index <= latest):
            latest = -1
        common = self.processes.minimum(latest)
        if not self.processes.minimum(self.store.resume(common, batches)):
            return 0
        logger.info("going on at layer %d of an interrupted calibration in %s", common + 1, self.mine.parent)
        return common + 1

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self._load(key).layers)
        except StatsError:
            return False

    def _file(self, key: str) -> Path:
        return self.mine / f"stats-{key}.safetensors"

    def _load(self, key: str) -> Stats:
        return load_stats(self._file(key))


def _run_key(skeleton: Skeleton, blocks: Blocks, settings: Calibration, processes: Processes) -> str:
    """Hash everything that the sums depend on, so that only the same run is ever continued."""
    parts = [__version__, skeleton.checkpoint.fingerprint, blocks.digest, str(skeleton.dtype), str(skeleton.device)]
    identity = json.dumps([*parts, settings.experts, settings.batch_size, processes.world])
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _only(kept: Path, folder: Path) -> None:
    """Remove all else from a folder: what runs with other settings left there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)


def _publish(finished: Path, target: Path) -> None:
    """Make the statistics appear as the last act: whenever a run is killed, they are there or the work folder is."""
    _only(finished, finished.parent)
    try:
        os.replace(finished, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({reason(error)})") from None
    _tidy(finished.parent)


def _tidy(folder: Path) -> None:
    """Remove a folder in the work folder, and the work folder with the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


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
