"""Outputs of the last finished layer, batch by batch: in memory up to a limit, past it in memory-mapped files.

With a folder, every finished layer is also written there, so that an interrupted walk goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from understudy.errors import OutputError, reason


class ActivationStore:
    """Two generations of layer outputs: the one that is read and the one that is being written.

    Args:
        limit: bytes that may be held in memory.
        folder: where finished layers are kept for resuming; without it nothing outlives the store.
        device: where `get` puts tensors.
        wait: called when a layer is on disk and before the one below it is removed; processes that wait there for each
            other always have a layer in common to go on from.

    Raises:
        OutputError: the disk is full or not writable.
    """

    def __init__(
        self,
        limit: int,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit, self.device, self.persistent, self.wait = limit, torch.device(device), folder is not None, wait
        if folder is None:
            self._own = tempfile.TemporaryDirectory(prefix="understudy-")  # goes with the store
            folder = Path(self._own.name)
        self.folder = folder
        self._read: dict[int, Any] = {}
        self._written: dict[int, Any] = {}
        self._held = 0
        self._last: Path | None = None

    def put(self, number: int, output: Any) -> None:
        """Take the output (any nest of tensors) of a batch for the layer that is being walked; the last one counts."""
        if not isinstance(earlier := self._written.pop(number, Path()), Path):
            self._held -= _bytes_of(earlier)
        moved = pytree.tree_map(lambda x: x.to("cpu") if isinstance(x, torch.Tensor) else x, output)
        size = _bytes_of(moved)
        # What is read and what is written live side by side, hence the factor.
        if 2 * (self._held + size) <= self.limit:
            self._held += size
            self._written[number] = moved
        else:
            self._written[number] = self._write(self._next(), number, moved)

    def get(self, number: int) -> Any:
        """The output of a batch at the last committed layer, on `device`."""
        value = self._read[number]
        if isinstance(value, Path):
            value = _load(value)
        return pytree.tree_map(lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, value)

    def commit(self, layer: int) -> None:
        """Make what was put the generation that is read; on disk, too, if the store is persistent."""
        on_disk = self.persistent or any(isinstance(v, Path) for v in self._written.values())
        final = self._layer(layer)
        if on_disk:
            staging = self._next()
            if self.persistent:
                for number, value in self._written.items():
                    if not isinstance(value, Path):
                        self._write(staging, number, value)
            with _disk(final):
                shutil.rmtree(final, ignore_errors=True)
                os.replace(staging, final)
            for number, value in self._written.items():
                if isinstance(value, Path):
                    self._written[number] = final / value.name
        self.wait()
        self._read, self._written, self._held = self._written, {}, 0
        if self._last is not None:
            shutil.rmtree(self._last, ignore_errors=True)
        self._last = final if on_disk else None

    def latest(self, batches: int) -> int | None:
        """Return the last layer that an earlier store committed whole to the same folder; None where there is none."""
        layers = (int(path.name.split("-")[1]) for path in self.folder.glob("layer-*"))
        return max((n for n in layers if self._is_whole(n, batches)), default=None)

    def resume(self, layer: int, batches: int) -> bool:
        """Make a layer that an earlier store committed the one that is read, and drop all else; False if it is gone."""
        whole = self._is_whole(layer, batches)
        for path in [*self.folder.glob("layer-*"), self._next()]:
            if not whole or path != self._layer(layer):
                shutil.rmtree(path, ignore_errors=True)
        self._read = {n: self._layer(layer) / _name(n) for n in range(batches)} if whole else {}
        self._last = self._layer(layer) if whole else None
        return whole

    def _is_whole(self, layer: int, batches: int) -> bool:
        try:
            for number in range(batches):
                with safe_open(self._layer(layer) / _name(number), framework="pt"):
                    pass  # the header is there and fits the size of the file
        except (OSError, SafetensorError):
            return False
        return True

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}"

    def _next(self) -> Path:
        return self.folder / "next"

    def _write(self, folder: Path, number: int, value: Any) -> Path:
        path = folder / _name(number)
        leaves, spec = pytree.tree_flatten(value)
        tensors = {str(i): t.contiguous().clone() for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)}
        rest = {str(i): x for i, x in enumerate(leaves) if not isinstance(x, torch.Tensor)}
        header = {"spec": pytree.treespec_dumps(spec), "rest": json.dumps(rest)}
        with _disk(path):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata=header)
        return path


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: activations cannot be written ({reason(error)}); free some space there") from None


def _bytes_of(value: Any) -> int:
    return sum(t.nbytes for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def _name(number: int) -> str:
    return f"{number:06d}.safetensors"


def _load(path: Path) -> Any:
    tensors = load_file(path)  # memory-mapped: pages come in as they are used
    with safe_open(path, framework="pt") as f:
        header = f.metadata()
    leaves: dict[int, Any] = {int(k): v for k, v in tensors.items()}
    leaves.update({int(k): v for k, v in json.loads(header["rest"]).items()})
    return pytree.tree_unflatten([leaves[i] for i in range(len(leaves))], pytree.treespec_loads(header["spec"]))
