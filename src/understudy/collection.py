"""Collection: token blocks through a model, layer by layer, and the sums and probes of every MoE layer out of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from understudy.activations import ActivationStore
from understudy.backward import Backward, EveryLayer, check_gradients, sum_gradients
from understudy.checkpoint import Checkpoint
from understudy.collectors import Resident, Watch
from understudy.data import Blocks
from understudy.errors import DataError, StatsError
from understudy.facts import ModelFacts, parse_bytes
from understudy.moe import MoELayer
from understudy.processes import Processes
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stats import ExpertStats, Probe, Stats, load_stats
from understudy.tap import batch_stats
from understudy.walk import Walk

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
Remake = Callable[[MoELayer, ExpertStats, Any], Any]


@torch.no_grad()
def collect_weights(
    skeleton: Skeleton, settings: Calibration, progress: Progress | None = None, base: Checkpoint | None = None
) -> dict[str, ExpertStats]:
    """Return what the weights of each MoE layer say, by its key, with settings of `weights_only`: no token is read."""
    layers: dict[str, ExpertStats] = {}
    total = len(skeleton.decoder_layers)
    for index in sorted({layer.index for layer in skeleton.layers}):
        with skeleton.resident(index) as decoder:
            for layer in (x for x in skeleton.layers if x.index == index):
                sums = Watch(Resident(skeleton, layer, decoder, settings, base=base)).sums()
                layers[layer.key] = replace(_no_tokens(layer), **sums)
        if progress:
            progress(index + 1, total)
    if progress:
        progress(total, total)
    return layers


def _no_tokens(layer: MoELayer) -> ExpertStats:
    none = torch.empty(0)
    return batch_stats(torch.empty(0, layer.hidden_size), none, none.long(), layer.num_experts, tokens=0)


def collect(
    skeleton: Skeleton,
    facts: ModelFacts,
    blocks: Blocks,
    settings: Calibration,
    work: Path,
    progress: Progress | None = None,
    processes: Processes | None = None,
    base: Checkpoint | None = None,
    remake: Remake | None = None,
) -> tuple[dict[str, ExpertStats], dict[str, Probe]]:
    """Walk token blocks through a model and return the sums and probes of each MoE layer, by its key.

    `remake` makes the experts with which a layer runs for the layers behind it, once its own sums are known.

    All blocks are of one length, so nothing is padded and every position counts. Finished layers are kept in `work`,
    from where a later call with the same arguments goes on.
    """
    return _Run(skeleton, facts, blocks, settings, work, processes or Processes(), base, remake).collect(progress)


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
        base: Checkpoint | None,
        remake: Remake | None,
    ) -> None:
        if len(blocks.ids) < processes.world:
            few = f"{len(blocks.ids)} blocks cannot be split over {processes.world} processes"
            raise DataError(f"{few}; give more text or start fewer")
        self.skeleton, self.facts, self.processes, self.remake = skeleton, facts, processes, remake
        self.settings = settings
        self.mine = work / f"rank-{processes.rank}"
        memory = parse_bytes(settings.activation_memory)
        self.back: Backward | None = None
        parts = np.array_split(blocks.ids, processes.world)
        mine = skeleton, parts[processes.rank], settings.batch_size
        if "gradients" in settings.collect:
            check_gradients(skeleton)
            outputs = EveryLayer(memory, self.mine, skeleton.device, processes.wait)
            gradients = ActivationStore(memory, self.mine / "gradients", skeleton.device, processes.wait)
            samples = settings.gradient_samples and math.ceil(settings.gradient_samples / processes.world)
            self.back = Backward(*mine, outputs, gradients, samples)
            self.store: ActivationStore = outputs
        else:
            self.store = ActivationStore(memory, self.mine, skeleton.device, processes.wait)
        self.walk = Walk(*mine, self.store)
        first = sum(part.size for part in parts[: processes.rank])
        self.resident = partial(
            Resident, settings=settings, batches=self.walk.batches, first=first, total=blocks.ids.size, base=base
        )
        self.by_depth: dict[int, list[MoELayer]] = {}
        for layer in skeleton.layers:
            self.by_depth.setdefault(layer.index, []).append(layer)

    def collect(self, progress: Progress | None) -> tuple[dict[str, ExpertStats], dict[str, Probe]]:
        """Walk the layers that are not finished, then merge the sums of all processes in the order of their rank."""
        finished, depth = self._resume(), self.walk.depth
        total = 2 * depth - min(self.by_depth) if self.back else depth  # forth, and back to the first with experts

        def done(number: int) -> None:
            if progress:
                progress(number, total)

        def done_back(index: int) -> None:
            done(2 * depth - index)

        done(finished)
        if finished < total:
            with self.walk.ready():
                self.walk.through_layers(
                    self._observe,
                    start=finished,
                    done=lambda index: done(index + 1),
                    again=self._remade if self.remake else None,
                )
                if self.back:
                    grams = "grams" in self.settings.collect
                    sum_gradients(self.back, self._keep_more, self._has_gradients, self.processes, done_back, grams)
        layers, probes = {}, {}
        for layer in self.skeleton.layers:
            local = self._load(layer.key)
            layers[layer.key] = self.processes.merged(local.layers[layer.key])
            probes[layer.key] = local.probes[layer.key]
        return layers, probes

    @contextmanager
    def _observe(self, index: int, module: nn.Module) -> Iterator[None]:
        here = self.by_depth.get(index, [])
        watches = [Watch(self.resident(self.skeleton, layer, module)) for layer in here]
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.attached())
            yield
        # Saved before the activations are committed: a kill in between repeats the layer, never skips it.
        for layer, watch in zip(here, watches, strict=True):
            stats, probe = watch.result()
            only = self.facts.model_copy(update={"layers": {layer.key: self.facts.layers[layer.key]}})
            Stats(only, {}, {layer.key: stats}, {layer.key: probe}).save(self._file(layer.key))

    @contextmanager
    def _remade(self, index: int, module: nn.Module) -> Iterator[bool]:
        """Give the layer, for a while, the experts that are made of what was just summed up."""
        assert self.remake is not None
        model, own = self.skeleton.model, {}
        for layer in self.by_depth.get(index, []):
            experts = model.get_submodule(layer.name)
            stats = self.processes.merged(self._load(layer.key).layers[layer.key])
            if (made := self.remake(layer, stats, experts)) is not None:
                own[layer.name] = experts
                model.set_submodule(layer.name, made)
        try:
            yield bool(own)
        finally:
            for name, experts in own.items():
                model.set_submodule(name, experts)

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

    def _keep_more(self, key: str, sums: dict[str, np.ndarray]) -> None:
        """Put further sums beside those of the walk forth."""
        found = self._load(key)
        replace(found, layers={key: replace(found.layers[key], **sums)}).save(self._file(key))

    def _has_gradients(self, key: str) -> bool:
        return self._is_there(key) and self._load(key).layers[key].gradient_sq_sum is not None

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self._load(key).layers)
        except StatsError:
            return False

    def _file(self, key: str) -> Path:
        return self.mine / f"stats-{key}.safetensors"

    def _load(self, key: str) -> Stats:
        return load_stats(self._file(key))
