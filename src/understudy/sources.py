"""Where text comes from: data specs, and the documents they name.

A data spec names one source of text (a glob pattern: one source for each match):

    notes.md   book.txt.xz               a text file is one document (any file that is not JSONL)
    chats.jsonl   web.jsonl.zst:body     a JSONL line is one document: the key named, else `text`, else chat `messages`
    corpus/                              a folder: all its files, recursively and sorted, hidden ones left out
    'corpus/*.jsonl'                     a glob pattern
    hf:name[config]:split:field          a hub dataset, streamed; `[config]`, split (`train`) and field are optional
    bundled                              the calibration text that comes with Understudy; the default

`.xz`, `.gz` and `.zst` are read as they stand. `=2` or `=0.5` at the end of a spec is its weight (of each match).
"""

from __future__ import annotations

import glob
import gzip
import importlib.resources
import io
import json
import lzma
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from understudy.errors import DataError, DependencyError

BUNDLED = "bundled"
Document = str | list[dict[str, Any]]  # text, or the messages of one chat

_JSONL = re.compile(r"(?P<path>.*?\.jsonl(\.(xz|gz|zst))?)(:(?P<field>.+))?", re.IGNORECASE)
_SUFFIXES = re.compile(r"(?<=.)(\.(txt|md|jsonl))?(\.(xz|gz|zst))?$", re.IGNORECASE)
_HUB = re.compile(r"hf:(?P<name>[^\[\]:]+)(\[(?P<config>[^\[\]:]+)\])?(:(?P<split>[^\[\]:]*)(:(?P<field>.+))?)?")


@dataclass(frozen=True)
class Source:
    """One source of text: where it is (`path`; of a hub dataset its name), how it is read, and what it weighs."""

    spec: str
    name: str
    kind: Literal["file", "folder", "hub"]
    path: str
    field: str | None = None
    weight: float = 1.0
    config: str | None = None
    split: str | None = None


def parse_specs(specs: Sequence[str] | str | None) -> list[Source]:
    """Read data specs into sources with distinct names; no spec at all means the bundled text.

    Raises:
        DataError: a malformed spec, a missing file, an empty folder or pattern, or the same text given twice.
    """
    specs = [specs] if isinstance(specs, str) else list(specs or [BUNDLED])
    sources = [source for spec in specs for source in _parse(spec)]
    _refuse_overlap(sources)
    return [replace(source, name=name) for source, name in zip(sources, _names(sources), strict=True)]


def _parse(spec: str) -> list[Source]:
    text, weight = _split_weight(spec)
    if text.startswith("hf:"):
        if not (match := _HUB.fullmatch(text)):
            raise DataError(f"data {spec!r} is not of the form hf:name[config]:split:field")
        name, config, split, field = match.group("name", "config", "split", "field")
        return [Source(spec, "", "hub", name, field, weight, config, split or "train")]
    if text == BUNDLED and not os.path.exists(text):
        path = str(importlib.resources.files("understudy") / "assets/calibration.txt.xz")
        if not os.path.exists(path):
            raise DataError("the bundled calibration text is not part of this installation: name text of your own")
        return [Source(spec, BUNDLED, "file", path, None, weight)]
    path, field = os.path.expanduser(text), None
    if not os.path.exists(path) and (match := _JSONL.fullmatch(path)):
        path, field = match.group("path", "field")
    paths = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not paths:
        head, _, key = text.rpartition(":")
        hint = f" (:{key} names a JSON key, which only .jsonl files have)" if os.path.exists(head) else ""
        raise DataError(f"data {spec!r}: there is no such file, folder or match{hint}")
    sources = []
    for path in paths:
        is_folder = os.path.isdir(path)
        if is_folder and not _files(path):
            raise DataError(f"data {spec!r}: the folder {path} holds no files")
        sources.append(Source(spec, "", "folder" if is_folder else "file", path, None if is_folder else field, weight))
    return sources


def _split_weight(spec: str) -> tuple[str, float]:
    if not spec.strip():
        raise DataError("a data spec is empty: name a file, a folder, a pattern or hf:dataset")
    head, equals, tail = spec.rpartition("=")
    if not equals or os.path.exists(os.path.expanduser(spec)):  # a name may itself end in =2
        return spec, 1.0
    try:
        weight = float(tail)
    except ValueError:
        if not (head.startswith("hf:") or os.path.exists(os.path.expanduser(head))):
            return spec, 1.0
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"data {spec!r}: the weight {tail!r} is not a positive number")
    return head, weight


def _refuse_overlap(sources: list[Source]) -> None:
    places = [Path(source.path) if source.kind == "hub" else Path(source.path).resolve() for source in sources]
    seen: dict[tuple[Any, ...], Source] = {}
    folders_first = sorted(range(len(sources)), key=lambda index: len(places[index].parts))
    for place, source in ((places[index], sources[index]) for index in folders_first):
        how = (source.kind == "hub", source.config, source.split, source.field or "text")
        for spot in [place] if source.kind == "hub" else [place, *place.parents]:
            if first := seen.get((how, spot)):
                twice = f"{source.path} is given twice, by {first.spec!r} and by {source.spec!r}"
                raise DataError(f"{twice}: give it once, with a weight (=2) if it should count more")
        seen[how, place] = source


def _names(sources: list[Source]) -> list[str]:
    """Name each source by its stem, and those that collide by as much more of their path as tells them apart."""

    def label(source: Source, level: int) -> str:
        if source.kind == "hub":
            name = f"{source.path}[{source.config}]" if source.config else source.path
            return f"{name}:{source.split}:{source.field or 'text'}" if level else name
        path = Path(source.path).absolute()
        if not level:
            return source.name or (path.name if source.kind == "folder" else _SUFFIXES.sub("", path.name))
        return "/".join(path.parts[-level:]) + (f":{source.field}" if source.field else "")

    levels = [0] * len(sources)
    while True:
        names = [label(source, level) for source, level in zip(sources, levels, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return names
        assert max(levels) < 1000, "sources that do not overlap have different full labels"
        levels = [level + (counts[name] > 1) for level, name in zip(levels, names, strict=True)]


def documents(source: Source) -> Iterator[Document]:
    """Yield the documents of a source in order, empty ones left out.

    Raises:
        DataError: what cannot be read or is not text, with the file and the line.
        DependencyError: `datasets` (for a hub dataset) or `zstandard` (for .zst) is not installed.
    """
    found: Iterable[Document]
    if source.kind == "hub":
        rows = enumerate(_hub_rows(source), 1)
        found = (_document(row, source.field, f"{source.name}, row {number}") for number, row in rows)
    else:
        paths = _files(source.path) if source.kind == "folder" else [source.path]
        found = (document for path in paths for document in _file_documents(path, source.field))
    return (document for document in found if document)


def _files(folder: str) -> list[str]:
    found = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [str(Path(folder, path)) for path in sorted(visible, key=lambda path: path.parts)]


def _file_documents(path: str, field: str | None) -> Iterator[Document]:
    empty = True
    with _reading(path) as stream:
        if _JSONL.fullmatch(path):
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where, empty = f"{path}, line {number}", False
                    try:
                        row = json.loads(_decode(line, path, number))
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise DataError(f"{where} is not JSON ({error}): mend or remove the line") from error
                    yield _document(row, field, where)
        else:
            text = _decode(stream.read(), path, 1)
            empty = not text.strip()
            yield text.replace("\r\n", "\n")  # the same tokens whatever system the file went through
    if empty:
        raise DataError(f"{path} is empty: leave it out, or fill it with text")


def _decode(content: bytes, path: str, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise DataError(f"{path}, line {line} is not UTF-8 text: convert it to UTF-8, or leave it out") from error


def _document(row: Any, field: str | None, where: str) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}: write one object with a text field on each line")
    key = field or ("messages" if "messages" in row and "text" not in row else "text")
    if key not in row:
        wanted = repr(key) if field else "'text' or 'messages'"
        have = ", ".join(map(repr, row)) or "none at all"
        raise DataError(f"{where} has no field {wanted}; it has {have}: name the one with the text")
    value = row[key]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} holds half of a surrogate pair, which is no text: remove the line") from error
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        return value
    kind = type(value).__name__
    raise DataError(f"{where}: field {key!r} is {kind}; name one that is text or a list of {{role, content}}")


@contextmanager
def _reading(path: str) -> Iterator[io.BufferedIOBase]:
    try:
        with _open(path) as stream:
            yield stream
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be decompressed ({error}): it is cut short or damaged; get it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check the file and its rights") from error


def _open(path: str) -> io.BufferedIOBase:
    suffix = Path(path).suffix.lower()
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DependencyError(f"{path} needs zstandard: pip install understudy[data]") from error
        return io.BufferedReader(_ZstdReader(open(path, "rb"), zstandard), 1 << 20)
    return lzma.open(path) if suffix == ".xz" else gzip.open(path) if suffix == ".gz" else open(path, "rb")


class _ZstdReader(io.RawIOBase):
    """All frames of a .zst file as one stream. `zstandard.open` stops after one, and takes a cut for an end."""

    def __init__(self, file: io.BufferedReader, zstandard: Any) -> None:
        self._file = file
        self._error = zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor(max_window_size=2**31)  # as `zstd --long=31` writes
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            between = self._frame is None or self._frame.eof
            data = (self._frame.unused_data if self._frame and between else b"") or self._file.read(1 << 17)
            if not data and not between:
                raise EOFError("its last frame has no end")
            if not data:
                return 0
            try:
                self._frame = self._frames.decompressobj() if between else self._frame
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise zlib.error(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _hub_rows(source: Source) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DependencyError(f"{source.spec!r} needs datasets: pip install understudy[data]") from error
    try:
        yield from load_dataset(source.path, source.config, split=source.split, streaming=True)
    except Exception as error:  # datasets and the network behind it raise whatever they like
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{source.spec!r} cannot be streamed ({reason}): check name, config, split, network") from error
