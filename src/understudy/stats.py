"""Calibration statistics of a model as a file: the sums of every MoE layer, what data they are of, and a few tokens.

They add up over batches, processes, machines and runs. Letters: E experts, H hidden size, K top-k.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from understudy.errors import OutputError, StatsError, reason
from understudy.facts import ModelFacts
from understudy.headers import head_of
from understudy.sums import MAPPED, exact_in, group_of, groups_for, is_vector, required_fields
from understudy.sums import ExpertStats as ExpertStats

FORMAT = 1
# groups of sums that cost time or room and are asked for
EXTRA = ("sets", "subsets", "dense", "candidates", "channels", "grams", "gradients", "modulation", "low_rank")


@dataclass(frozen=True)
class Probe:
    """A few tokens as one MoE layer met them at the seam, kept to verify a compressed layer against its source."""

    hidden: np.ndarray  # [n, H] float32
    index: np.ndarray  # [n, K] int64, expert ids
    weights: np.ndarray  # [n, K] float32


@dataclass(frozen=True)
class Stats:
    """Everything that one calibration leaves: facts of the model, what data, sums and probes by layer key."""

    model: ModelFacts
    data: dict[str, Any]  # sources, samples, seq_len, seed, digest of the tokens, notes
    layers: dict[str, ExpertStats]
    probes: dict[str, Probe] = field(default_factory=dict)

    def __add__(self, other: Stats) -> Stats:
        """Merge runs over the same model on different text.

        Raises:
            StatsError: the runs saw different models.
        """
        if self.model.fingerprint != other.model.fingerprint:
            raise StatsError(
                f"statistics of two models cannot be merged: {self.model.source} ({self.model.fingerprint}) and "
                f"{other.model.source} ({other.model.fingerprint})"
            )
        merged = {key: self.layers[key] + other.layers[key] for key in self.layers}
        return Stats(self.model, {"merged": [self.data, other.data]}, merged, self.probes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, under a temporary name first; equal statistics give equal bytes.

        Raises:
            OutputError: the disk is full or not writable.
        """
        tensors: dict[str, np.ndarray] = {}
        for key, layer in self.layers.items():
            for name, value in layer.arrays().items():
                tensors[f"layers.{key}.{name}"] = np.asarray(value, _stored_dtype(name), "C")
        for key, probe in self.probes.items():
            for name in ("hidden", "index", "weights"):
                tensors[f"layers.{key}.probe.{name}"] = np.ascontiguousarray(getattr(probe, name))
        header = {"format": FORMAT, "model": self.model.model_dump(), "data": self.data}
        target = Path(path)
        partial = target.with_name(target.name + ".tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(partial, tensors, {"understudy": json.dumps(header, sort_keys=True)})
            os.replace(partial, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OutputError(f"{target}: cannot be written ({reason(error)})") from None
        return target


def load_stats(path: str | os.PathLike[str], only: Collection[str] | None = None) -> Stats:
    """Read what `Stats.save` wrote; `only` these fields of `ExpertStats` and no probes, the other fields are then None.

    The vectors are nearly all of the file, and planning does without them. Fields of `MAPPED` may be many gigabytes:
    they are read-only maps of the file, of which only what is looked at is read.

    Raises:
        StatsError: no such file, not statistics, or of another format version.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise StatsError(f"{file}: no such statistics file; `understudy calibrate` writes one")
    try:
        with safe_open(file, framework="numpy") as f:
            header = json.loads((f.metadata() or {})["understudy"])
            if header.get("format") != FORMAT:
                raise StatsError(f"{file}: statistics of format {header.get('format')}, this version reads {FORMAT}")
            wanted = [name for name in f.keys() if only is None or name.rsplit(".", 1)[-1] in only]  # noqa: SIM118
            large = [name for name in wanted if name.rsplit(".", 1)[-1] in MAPPED]
            tensors = {name: f.get_tensor(name) for name in wanted if name not in large}
        tensors |= _mapped(file, large)
        model, data = ModelFacts.model_validate(header["model"]), header["data"]
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError, ValidationError) as error:
        why = " ".join(str(error).split())[:200]
        raise StatsError(f"{file}: not a statistics file of understudy, or damaged ({why}); calibrate again") from None
    known = [f.name for f in fields(ExpertStats)]
    needed = [name for name in required_fields() if only is None or name in only]
    layers, probes = {}, {}
    for key in model.layers:
        part = _under(tensors, f"layers.{key}.")
        if missing := [n for n in needed if n not in part]:
            raise StatsError(f"{file}: layer {key} lacks {', '.join(missing)}; calibrate again")
        layers[key] = ExpertStats(**{n: part[n].astype(exact_in(n), copy=False) if n in part else None for n in known})
        if probe := _under(part, "probe."):
            probes[key] = Probe(**probe)
    return Stats(model, data, layers, probes)


def require(stats: Stats, needs: Collection[str], what: str) -> None:
    """Make sure that every layer has these fields; `what` needs them, in words.

    Raises:
        StatsError: a field is missing; says how to collect it.
    """
    for key, layer in stats.layers.items():
        lacking = [name for name in needs if getattr(layer, name) is None]
        if not lacking:
            continue
        group = group_of(lacking[0])
        how = "calibrate again; if they still lack it, this family does not show it"
        if stats.data.get("weights_only") and group not in ("weights", "base"):
            how = "they are of the weights alone, so calibrate on text"
        elif groups := [x for x in EXTRA if x in groups_for(lacking)]:
            how = f"calibrate with --collect {','.join(groups)}"
        elif group == "base":
            how = "calibrate with --base MODEL, the checkpoint that this one was trained from"
        raise StatsError(f"{what} needs {', '.join(lacking)}, which the statistics of layer {key} lack; {how}")


def _write(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file one tensor after the other; safetensors' own would copy all of them first."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    kinds = {"f": "F", "i": "I"}
    dtypes = {name: f"{kinds[tensors[name].dtype.kind]}{8 * tensors[name].itemsize}" for name in names}
    with file.open("wb") as f:
        f.write(head_of(((n, dtypes[n], tensors[n].shape, tensors[n].nbytes) for n in names), metadata))
        for name in names:
            f.write(tensors[name].reshape(-1).view(np.uint8).data)


def _mapped(file: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Map float32 tensors of a safetensors file, whose header was found to be sound."""
    if not names:
        return {}
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    found: dict[str, np.ndarray] = {}
    for name in names:
        entry = header[name]
        start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        if entry["dtype"] != "F32" or 0 in shape:  # neither is what `save` writes of a family with neurons
            raise KeyError(name)
        found[name] = np.memmap(file, np.float32, "r", start, shape)
    return found


def _stored_dtype(name: str) -> type:
    return np.int32 if name == "topk_sets" else np.float32 if is_vector(name) else np.float64


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def file_hash(path: str | os.PathLike[str]) -> str:
    """Hash of an artefact, by which its children name their parent."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:32]
