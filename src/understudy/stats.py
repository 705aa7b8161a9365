"""Calibration statistics of experts: sums that add up over batches, processes, machines and runs.

Letters: E experts, H hidden size, g the gate (the weight that the router gives a route at the seam, renormalised where
the family does so), y the output of an expert before its gate. Sums run over the routes that chose the expert.
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

FORMAT = 1


@dataclass(frozen=True)
class ExpertStats:
    """Sums of one MoE layer, merged with `+`; float64, any array type with NumPy's arithmetic."""

    tokens: Any  # [] tokens that entered the layer
    count: Any  # [E] routes
    gate_sum: Any  # [E] sum g
    gate_sq_sum: Any  # [E] sum g^2
    norm_sum: Any  # [E] sum |y|
    gated_norm_sum: Any  # [E] sum g |y|
    mean: Any  # [E, H] mean y
    scatter: Any  # [E] sum |y - mean|^2
    weighted_mean: Any  # [E, H] mean y, weighted by g^2
    weighted_scatter: Any  # [E] sum g^2 |y - weighted_mean|^2

    def __add__(self, other: ExpertStats) -> ExpertStats:
        """Merge two disjoint samples; the second moments by Chan's pairwise rule (Chan, Golub, LeVeque 1983)."""
        mean, scatter = _chan(self.count, self.mean, self.scatter, other.count, other.mean, other.scatter)
        weighted_mean, weighted_scatter = _chan(
            self.gate_sq_sum,
            self.weighted_mean,
            self.weighted_scatter,
            other.gate_sq_sum,
            other.weighted_mean,
            other.weighted_scatter,
        )
        return ExpertStats(
            tokens=self.tokens + other.tokens,
            count=self.count + other.count,
            gate_sum=self.gate_sum + other.gate_sum,
            gate_sq_sum=self.gate_sq_sum + other.gate_sq_sum,
            norm_sum=self.norm_sum + other.norm_sum,
            gated_norm_sum=self.gated_norm_sum + other.gated_norm_sum,
            mean=mean,
            scatter=scatter,
            weighted_mean=weighted_mean,
            weighted_scatter=weighted_scatter,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All sums by name, as they are stored."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}


def _chan(weight_a: Any, mean_a: Any, m2_a: Any, weight_b: Any, mean_b: Any, m2_b: Any) -> tuple[Any, Any]:
    total = weight_a + weight_b
    share_b = weight_b / (total + (total == 0))  # where neither side saw a route, 0 and not 0/0
    delta = mean_b - mean_a
    return mean_a + delta * share_b[:, None], m2_a + m2_b + (delta * delta).sum(-1) * weight_a * share_b


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
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        for key, layer in self.layers.items():
            for name, value in layer.arrays().items():
                vector = name in ("mean", "weighted_mean")
                tensors[f"layers.{key}.{name}"] = np.asarray(value, np.float32 if vector else np.float64, "C")
        for key, probe in self.probes.items():
            for name in ("hidden", "index", "weights"):
                tensors[f"layers.{key}.probe.{name}"] = np.ascontiguousarray(getattr(probe, name))
        header = {"format": FORMAT, "model": self.model.model_dump(), "data": self.data}
        target = Path(path)
        partial = target.with_name(target.name + ".tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = partial.stat().st_mode  # safetensors lets nobody but the owner read what it writes
            save_file(tensors, partial, metadata={"understudy": json.dumps(header, sort_keys=True)})
            partial.chmod(mode)
            os.replace(partial, target)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OutputError(f"{target}: cannot be written ({reason(error)})") from None
        return target


def load_stats(path: str | os.PathLike[str], only: Collection[str] | None = None) -> Stats:
    """Read what `Stats.save` wrote; `only` these fields of `ExpertStats` and no probes, the other fields are then None.

    The vectors are nearly all of the file, and planning does without them.

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
            tensors = {name: f.get_tensor(name) for name in wanted}
        model, data = ModelFacts.model_validate(header["model"]), header["data"]
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError, ValidationError) as error:
        why = " ".join(str(error).split())[:200]
        raise StatsError(f"{file}: not a statistics file of understudy, or damaged ({why}); calibrate again") from None
    names = [f.name for f in fields(ExpertStats) if only is None or f.name in only]
    left_out = {f.name: None for f in fields(ExpertStats) if f.name not in names}
    layers, probes = {}, {}
    for key in model.layers:
        part = _under(tensors, f"layers.{key}.")
        if missing := [n for n in names if n not in part]:
            raise StatsError(f"{file}: layer {key} lacks {', '.join(missing)}; calibrate again")
        layers[key] = ExpertStats(**{n: part[n].astype(np.float64) for n in names}, **left_out)
        if probe := _under(part, "probe."):
            probes[key] = Probe(**probe)
    return Stats(model, data, layers, probes)


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def file_hash(path: str | os.PathLike[str]) -> str:
    """Hash of an artefact, by which its children name their parent."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:32]
