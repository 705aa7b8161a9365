"""Tensors of a model by name: what lies where, and how it becomes torch tensors; from a folder or from elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
SUPPORTED = "float32, bfloat16 or float16"  # of weights, for people


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: where it lies, `dtype` as safetensors spells it, `start` and `nbytes` in bytes."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // DTYPES[self.dtype][1]


class Weights(ABC):
    """The tensors of a model by name, with its config; where their bytes come from is the business of subclasses.

    Attributes:
        folder: the model folder, for messages and for what lies beside the weights.
        config: config.json.
        entries: every tensor by name.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]

    @abstractmethod
    def fill(self, entry: TensorEntry, start: int, view: memoryview) -> None:
        """Put the bytes of a tensor from `start` on into a buffer of bytes.

        Raises:
            CheckpointError: they cannot be read.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What identifies the weights, 32 hexadecimal digits."""

    def release(self) -> None:  # noqa: B027 (nothing to let go of is the rule)
        """Let go of what was only kept because the next tensor might need it, too."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.nbytes for e in self.entries.values())

    def raw(self, entry: TensorEntry, start: int = 0, nbytes: int | None = None) -> bytearray:
        """Read the bytes of one tensor, or a part of them."""
        buffer = bytearray(entry.nbytes - start if nbytes is None else nbytes)
        self.fill(entry, start, memoryview(buffer))
        return buffer

    def read(self, name: str) -> Any:
        """Read one tensor as a `torch.Tensor` of its own dtype and shape."""
        import torch

        entry = self.entries[name]
        dtype = getattr(torch, DTYPES[entry.dtype][0])
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self.raw(entry), dtype=dtype).reshape(entry.shape)

    def read_into(self, name: str, out: Any) -> None:
        """Read one tensor into a contiguous CPU `torch.Tensor` of its shape, converting to the dtype of `out`."""
        import torch

        entry = self.entries[name]
        if getattr(torch, DTYPES[entry.dtype][0]) == out.dtype:
            self.fill(entry, 0, memoryview(out.view(torch.uint8).numpy()).cast("B"))
        else:
            out.copy_(self.read(name))

    def lazy(self, name: str) -> LazyTensor:
        """A tensor that is read when it is indexed, as transformers' loader expects of a safetensors slice."""
        return LazyTensor(self, name)


class LazyTensor:
    """Looks like a safetensors slice: `x[...]` reads it, `get_dtype` and `get_shape` do not."""

    def __init__(self, checkpoint: Weights, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, item: Any) -> Any:
        return self._checkpoint.read(self._name)[item]

    def get_dtype(self) -> str:
        """Dtype as safetensors spells it."""
        return self._checkpoint.entries[self._name].dtype

    def get_shape(self) -> list[int]:
        """Shape."""
        return list(self._checkpoint.entries[self._name].shape)
