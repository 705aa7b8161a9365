"""The routers of the checkpoint that a model was trained from: how far its router moved says what it learnt to use."""

from __future__ import annotations

from typing import Any

from understudy.checkpoint import Checkpoint, resolve
from understudy.collectors import Collector
from understudy.collectors.weights import router_weight, row_norms
from understudy.errors import CheckpointError
from understudy.skeleton import Skeleton


class Base(Collector):
    """Norms of the router's rows in the checkpoint given as `--base`."""

    group = "base"
    reads_text = False

    def sums(self) -> dict[str, Any]:
        """Return the norms, where a base was given."""
        skeleton, base = self.resident.skeleton, self.resident.base
        key = _router_key(skeleton, router_weight(skeleton, self.resident.layer)) if base else None
        return {"base_router_norm": row_norms(base.read(key))} if base and key else {}


def open_base(skeleton: Skeleton, name: str) -> Checkpoint:
    """Open the checkpoint that a model was trained from: a local folder or a hub id.

    Raises:
        CheckpointError: it cannot be read, or is of another architecture.
    """
    base, mine = Checkpoint(resolve(name)), skeleton.checkpoint
    other = f"--base {name} is of another architecture than {mine.folder}"
    types = (base.config.get("model_type"), mine.config.get("model_type"))
    if types[0] != types[1]:
        raise CheckpointError(f"{other}: model type {types[0]!r}, not {types[1]!r}")
    for layer in skeleton.layers:
        for key, target in skeleton.targets.items():
            if not (target.startswith(layer.name + ".") or target in layer.router):
                continue
            shape = mine.entries[key].shape
            if key not in base.entries:
                raise CheckpointError(f"{other}: it has no tensor {key!r}")
            if base.entries[key].shape != shape:
                raise CheckpointError(f"{other}: {key!r} has shape {base.entries[key].shape}, not {shape}")
    return base


def _router_key(skeleton: Skeleton, target: str | None) -> str | None:
    """The one tensor of the checkpoint that a router's matrix is read from as it is, else None."""
    keys = [key for key, name in skeleton.targets.items() if name == target]
    if len(keys) != 1 or skeleton.checkpoint.entries[keys[0]].shape != tuple(skeleton.get(str(target)).shape):
        return None
    return keys[0]
