"""Read a model folder: safetensors headers, single tensors by position, and what identifies the model.

Weights are read with `pread` into fresh buffers instead of through a memory map: a map keeps every touched page of a
shard resident until it is closed, which would break the promise that memory is bounded by one layer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from understudy.errors import CheckpointError
from understudy.weights import DTYPES as DTYPES
from understudy.weights import SUPPORTED as SUPPORTED
from understudy.weights import TensorEntry as TensorEntry
from understudy.weights import Weights as Weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SAMPLE = 32  # bytes at each place of a tensor that enters the fingerprint


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check the header of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header does not describe its bytes.
    """
    hint = "fetch this file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: truncated ({size} bytes, header missing); {hint}")
            header = json.loads(f.read(length).decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: this shard is missing; {hint}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CheckpointError(f"{path}: not a safetensors file (its header is not JSON); {hint}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is no table); {hint}")
    header.pop("__metadata__", None)
    entries, begin, spans = {}, 8 + length, []
    for name, item in header.items():
        try:
            (a, b), dtype, shape = item["data_offsets"], item["dtype"], tuple(item["shape"])
            if not all(type(n) is int and n >= 0 for n in (a, b, *shape)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: corrupt header at tensor {name!r}; {hint}") from None
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {dtype}, which is not supported; use the {SUPPORTED} checkpoint"
            )
        if b - a != math.prod(shape) * DTYPES[dtype][1]:
            raise CheckpointError(f"{path}: corrupt header, the size of tensor {name!r} does not fit its shape; {hint}")
        entries[name] = TensorEntry(name, path.name, dtype, shape, begin + a, b - a)
        spans.append((a, b))
    end = 0
    for a, b in sorted(spans):
        if a != end:
            raise CheckpointError(f"{path}: corrupt header, its tensors overlap or leave gaps; {hint}")
        end = b
    if begin + end != size:
        state = "truncated" if size < begin + end else "corrupt"
        raise CheckpointError(f"{path}: {state}, {size} bytes where its header says {begin + end}; {hint}")
    return entries


class Checkpoint(Weights):
    """A model folder on disk, opened for reading; no weight is read before it is asked for.

    Raises:
        CheckpointError: no folder, no config.json, no safetensors, a shard missing or damaged, or an index that points
            outside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such model folder")
        self.config: dict[str, Any] = self._json("config.json")
        self.entries: dict[str, TensorEntry] = {}
        for file in self._files():
            found = read_header(self.folder / file)
            self.entries.update({k: v for k, v in found.items() if self._index is None or self._index.get(k) == file})
        if self._index is not None and (absent := sorted(set(self._index) - set(self.entries))):
            raise CheckpointError(
                f"{self.folder}: {len(absent)} tensors of the index are in no shard, the first is {absent[0]!r}; "
                "fetch the folder again"
            )

    def _json(self, name: str) -> dict[str, Any]:
        try:
            loaded = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder}: has no {name}, so it is not a model folder") from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{self.folder / name}: not valid JSON ({error}); fetch this file again") from None
        except OSError as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({error.strerror})") from None
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{self.folder / name}: not a JSON object; fetch this file again")
        return loaded

    @cached_property
    def _index(self) -> dict[str, str] | None:
        if (self.folder / SINGLE).exists() or not (self.folder / INDEX).exists():
            return None  # where both are there, transformers reads the single file
        weight_map = self._json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX}: has no weight_map; fetch this file again")
        return weight_map

    def _files(self) -> list[str]:
        if self._index is None:
            if not (self.folder / SINGLE).exists():
                raise CheckpointError(
                    f"{self.folder}: has neither {SINGLE} nor {INDEX}; only safetensors are read, convert it first"
                )
            return [SINGLE]
        files = sorted(set(map(str, self._index.values())))
        for file in files:
            # A shard may itself be a link into a download cache; what must not happen is an index that walks away.
            if os.path.basename(file) != file or "\\" in file or file in ("", ".", ".."):
                raise CheckpointError(f"{self.folder / INDEX}: points outside its folder ({file!r}); refused")
        return files

    @property
    def other_files(self) -> list[Path]:
        """Files beside the weights and config.json that belong to the model (tokenizer, generation config, ...)."""
        weights = set(self._files()) | {INDEX, "config.json", "README.md", "report.html"}
        ours = (p for p in sorted(self.folder.iterdir()) if p.is_file() and p.name not in weights)
        foreign = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".pkl", ".pickle")
        kept = [p for p in ours if not p.name.startswith(".") and p.suffix not in foreign and ".index." not in p.name]
        return kept + sorted((self.folder / "additional_chat_templates").glob("*.jinja"))

    def fill(self, entry: TensorEntry, start: int, view: memoryview) -> None:
        """Read from the shard."""
        path, done, wanted = self.folder / entry.file, 0, len(view)
        try:
            with path.open("rb", buffering=0) as f:
                f.seek(entry.start + start)
                while done < wanted:
                    got = f.readinto(view[done:])
                    if not got:
                        raise CheckpointError(f"{path}: ends inside tensor {entry.name!r}; fetch this file again")
                    done += got
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    @cached_property
    def fingerprint(self) -> str:
        """Identify the weights: names, dtypes, shapes and a few bytes of every tensor; not the sharding.

        Thirty-two bytes of either end, and of every expert in a stack, tell a fine-tuned sibling from its parent
        without reading the whole folder.
        """
        parts: dict[str, bytes] = {}
        by_file: dict[str, list[TensorEntry]] = defaultdict(list)
        for entry in self.entries.values():
            by_file[entry.file].append(entry)
        for file, entries in by_file.items():
            try:
                with (self.folder / file).open("rb") as f:
                    parts.update({entry.name: _sample(f, entry) for entry in entries})
            except OSError as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error.strerror})") from None
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
            digest.update(parts[name])
        return digest.hexdigest()[:32]


def _sample(file: BinaryIO, entry: TensorEntry) -> bytes:
    size = min(entry.nbytes, _SAMPLE)
    rows = entry.shape[0] if len(entry.shape) > 2 and entry.nbytes else 1
    found = b""
    for start in [*range(0, entry.nbytes or 1, entry.nbytes // rows or 1), entry.nbytes - size]:
        file.seek(entry.start + start)
        found += file.read(min(size, entry.nbytes - start))
    return found


def resolve(model: str | os.PathLike[str]) -> Path:
    """Turn a local folder or a hub id into a local folder; a local folder never touches the network.

    Raises:
        CheckpointError: neither a folder nor a repository that the hub client can fetch.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    text = str(model)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(f"{text}: no such model folder, and not the form of a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.md", "LICENSE*", "*.py"]
    again = ["original/*", "consolidated*"]  # the same weights in another form
    try:
        return Path(snapshot_download(text, allow_patterns=wanted, ignore_patterns=again))
    except Exception as error:  # the hub client raises its own, requests' and OS errors; all mean the same to a user
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{text}: no such folder, and the hub could not deliver it ({reason})") from None
