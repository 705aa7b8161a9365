"""Write a model folder: tensors as byte ranges of source shards or as new bytes, streamed, never held as a whole.

The kernel copies kept ranges from file to file where it can, so what is kept is kept byte for byte and writing is about
as fast as copying.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from understudy.checkpoint import INDEX, SINGLE, Checkpoint
from understudy.errors import OutputError, reason
from understudy.facts import format_bytes
from understudy.headers import head_of
from understudy.weights import DTYPES, TensorEntry, Weights

CHUNK = 8 << 20
MAX_SHARD = 5_000_000_000  # bytes, transformers' own default order of size


@dataclass(frozen=True)
class Range:
    """Bytes `start` to `start + nbytes` of one source tensor."""

    entry: TensorEntry
    start: int
    nbytes: int


@dataclass(eq=False)
class Lazy:
    """Bytes that are computed when they are needed; equal ones every time."""

    nbytes: int
    compute: Callable[[], bytes | bytearray]
    digest: bytes | None = None  # of what was written

    def read(self) -> bytes | bytearray:
        """Compute the bytes."""
        data = self.compute()
        assert len(data) == self.nbytes
        return data


Part = Range | bytes | Lazy


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its name, dtype as safetensors spells it, shape, and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(size_of(p) for p in self.parts)


def size_of(part: Part) -> int:
    """Return the bytes of a part."""
    return len(part) if isinstance(part, bytes) else part.nbytes


def whole(entry: TensorEntry, name: str | None = None) -> Piece:
    """Keep a source tensor as it is, under its own name or another."""
    return Piece(name or entry.name, entry.dtype, entry.shape, (Range(entry, 0, entry.nbytes),))


def rows(entry: TensorEntry, kept: Sequence[int], instead: Mapping[int, Lazy] | None = None) -> Piece:
    """Keep some rows (dim 0) of a source tensor, in the given order; neighbours become one range.

    `instead` gives the bytes of rows that are not the source's.
    """
    assert entry.shape
    row = entry.nbytes // entry.shape[0]
    parts: list[Part] = []
    for index in kept:
        last = parts[-1] if parts else None
        if instead and index in instead:
            parts.append(instead[index])
        elif isinstance(last, Range) and last.start + last.nbytes == index * row:
            parts[-1] = Range(entry, last.start, last.nbytes + row)
        else:
            parts.append(Range(entry, index * row, row))
    return Piece(entry.name, entry.dtype, (len(kept), *entry.shape[1:]), tuple(parts))


def write_folder(
    folder: Path,
    source: Weights,
    pieces: Sequence[Piece],
    *,
    max_shard: int = MAX_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write shards and index into an existing folder.

    `progress` is called with (bytes written, all bytes).

    Raises:
        OutputError: the disk is full or not writable.
        CheckpointError: the source ends early.
    """
    shards = _split(pieces, max_shard)
    total, done = sum(p.nbytes for p in pieces), 0
    free = shutil.disk_usage(folder).free
    if free < total:
        raise OutputError(f"{folder}: {format_bytes(total)} are needed there, {format_bytes(free)} are free")
    weight_map: dict[str, str] = {}
    try:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map.update(dict.fromkeys((p.name for p in shard), name))
            with (folder / name).open("wb", buffering=0) as out:
                _write_all(out, head_of(((p.name, p.dtype, p.shape, p.nbytes) for p in shard), {"format": "pt"}))
                for piece in shard:
                    for part in piece.parts:
                        _copy(part, source, out)
                    done += piece.nbytes
                    if progress:
                        progress(done, total)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = f"disk full, {format_bytes(total)} are needed" if full else reason(error)
        raise OutputError(f"{folder}: cannot be written ({why})") from None


def write_rest(folder: Path, source: Checkpoint, config: dict[str, Any]) -> None:
    """Write the config beside the shards, and copy what else lies beside those of the source."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in source.other_files:
        copy = folder / path.relative_to(source.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _split(pieces: Sequence[Piece], max_shard: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return [sorted(shard, key=lambda p: -DTYPES[p.dtype][1]) for shard in shards]


def _copy(part: Part, source: Weights, out: BinaryIO) -> None:
    if isinstance(part, Lazy):
        data = part.read()
        part.digest = hashlib.sha256(data).digest()
        _write_all(out, data)
        return
    if isinstance(part, bytes):
        _write_all(out, part)
        return
    offset, left = part.entry.start + part.start, part.nbytes
    with (source.folder / part.entry.file).open("rb", buffering=0) as f:
        try:
            while left:
                copied = os.copy_file_range(f.fileno(), out.fileno(), left, offset)
                if not copied:
                    break
                offset, left = offset + copied, left - copied
        except (AttributeError, OSError) as error:
            # Not this pair of file systems, or not this system at all; a full disk is reported, not worked around.
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
    while left:
        chunk = source.raw(part.entry, offset - part.entry.start, min(left, CHUNK))
        _write_all(out, chunk)
        offset, left = offset + len(chunk), left - len(chunk)


def _write_all(out: BinaryIO, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
