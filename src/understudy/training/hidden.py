"""What the last layer of a model puts out for many sequences, kept in files: made once, by all processes together."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from understudy._version import __version__
from understudy.activations import ActivationStore
from understudy.errors import OutputError, reason
from understudy.facts import format_bytes
from understudy.processes import Processes
from understudy.skeleton import Skeleton
from understudy.walk import Walk

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_WALKED_TOKENS = 4096  # that run through a layer together


class HiddenStates:
    """What the last layer puts out for each of some sequences `[N, S]`, all different, in files.

    Batches of the walk take turns among the processes, and each process has a folder for its own; a folder whose name
    ends with the number of processes is unfinished. A batch is the same whatever the number of processes, and so are
    its bits.
    """

    def __init__(self, skeleton: Skeleton, ids_NS: np.ndarray, work: Path, processes: Processes) -> None:
        self.skeleton, self.ids, self.processes = skeleton, ids_NS, processes
        self.batch_size = max(1, _WALKED_TOKENS // ids_NS.shape[1])
        self.batches = [ids_NS[i : i + self.batch_size] for i in range(0, len(ids_NS), self.batch_size)]
        self.row_of = {digest(ids_S): row for row, ids_S in enumerate(ids_NS)}
        self.last = len(skeleton.decoder_layers) - 1
        self.finished = work / f"teacher-{self._key()}"
        self.unfinished = work / f"{self.finished.name}.of-{processes.world}"
        self.parts: list[ActivationStore] = []

    def _key(self) -> str:
        """Hash everything that the hidden states depend on."""
        skeleton = self.skeleton
        model = [skeleton.checkpoint.fingerprint, str(skeleton.dtype), skeleton.device.type]
        identity = json.dumps([__version__, *model, self.ids.shape, self.batch_size]).encode()
        return hashlib.sha256(identity + self.ids.tobytes()).hexdigest()[:12]

    def provide(self, report: Progress) -> None:
        """Find the files of an earlier run, or walk the model and write them."""
        if not self.processes.minimum(self._open()):
            self._tidy()
            self._check_room()
            self._walk(report)
            if self.processes.rank == 0:
                self._publish()
            self.processes.wait()
            if not self.processes.minimum(self._open()):
                raise OutputError(f"{self.finished}: not every process finds it whole; use a disk that all share")
        logger.info("%s: the teacher's hidden states of %d sequences", self.finished, len(self.ids))

    def of(self, ids_BS: np.ndarray) -> Any:
        """The last layer's output for some of the sequences, on the model's device."""
        rows = [self.row_of.get(digest(ids_S)) for ids_S in ids_BS]
        assert None not in rows, "the teacher was not walked over this sequence: name it when opening the teacher"
        places = [divmod(row, self.batch_size) for row in rows if row is not None]
        batches = {number: self._output(number) for number, _ in places}  # mapped: only the rows below are read

        def row(place: tuple[int, int]) -> list[Any]:
            leaves = pytree.tree_leaves(batches[place[0]])
            assert all(len(x) == len(self.batches[place[0]]) for x in leaves if isinstance(x, Tensor))
            return [x[place[1]] if isinstance(x, Tensor) else x for x in leaves]

        together = [
            torch.stack(same).to(self.skeleton.device) if isinstance(same[0], Tensor) else same[0]
            for same in zip(*map(row, places), strict=True)
        ]
        return pytree.tree_unflatten(together, pytree.tree_structure(batches[places[0][0]]))

    def _output(self, number: int) -> Any:
        part, place = number % len(self.parts), number // len(self.parts)
        return self.parts[part].get(place)

    def _open(self) -> bool:
        """Open what an earlier walk finished; False where there is none, or not all of it."""
        world = len(list(self.finished.glob("part-*")))
        self.parts = [ActivationStore(0, self.finished / f"part-{rank}") for rank in range(world)]
        counts = [len(self._share(rank, world)) for rank in range(world)]
        return world > 0 and all(part.resume(self.last, n) for part, n in zip(self.parts, counts, strict=True))

    def _share(self, rank: int, world: int) -> list[np.ndarray]:
        """Batches that a process walks; one too many has something to do, too."""
        return self.batches[rank::world] or self.batches[:1]

    def _tidy(self) -> None:
        """Remove all that cannot be gone on from: damaged, of another teacher or text, of fewer or more processes."""
        if self.processes.rank == 0:
            for path in self.finished.parent.glob("teacher-*"):
                if path != self.unfinished:
                    shutil.rmtree(path, ignore_errors=True)
        self.processes.wait()

    def _check_room(self) -> None:
        """Refuse to begin where the disk is too small; two layers' outputs live side by side."""
        place = next(folder for folder in self.finished.absolute().parents if folder.exists())
        hidden = self.skeleton.config.get_text_config().hidden_size
        needed = 2 * self.ids.size * hidden * self.skeleton.dtype.itemsize
        there = sum(path.stat().st_size for path in self.unfinished.rglob("*.safetensors"))
        free = shutil.disk_usage(place).free
        if not self.processes.minimum(free + there >= needed):
            raise OutputError(
                f"{place}: {format_bytes(needed)} are needed for the teacher's hidden states, {format_bytes(free)} are "
                "free; make room, train for fewer steps, or use --loss lm"
            )

    def _walk(self, report: Progress) -> None:
        """Take this process's share through all layers, from the last that every process has finished."""
        processes, mine = self.processes, self._share(self.processes.rank, self.processes.world)
        folder = self.unfinished / f"part-{processes.rank}"
        store = ActivationStore(0, folder, self.skeleton.device, processes.wait)
        latest = store.latest(len(mine))
        common = processes.minimum(-1 if latest is None else latest)
        start = common + 1 if processes.minimum(store.resume(common, len(mine))) else 0
        walk = Walk(self.skeleton, np.concatenate(mine), self.batch_size, store)
        with walk.ready():
            walk.through_layers(start=start, done=lambda index: report("walk teacher", index + 1, walk.depth))

    def _publish(self) -> None:
        try:
            os.replace(self.unfinished, self.finished)
        except OSError as error:
            raise OutputError(f"{self.finished}: cannot be written ({reason(error)})") from None


def digest(ids_S: np.ndarray) -> bytes:
    """Name a sequence by its tokens, whatever text it comes from."""
    return hashlib.blake2b(np.ascontiguousarray(ids_S, np.int32).tobytes(), digest_size=16).digest()
