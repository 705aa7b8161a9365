"""The head of a safetensors file, to write one piece by piece; the format's own library wants all at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence


def head_of(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return what comes before the bytes of the tensors.

    Args:
        tensors: name, dtype as the format spells it, shape and size in bytes of each, as they will follow; with
            wide elements first, every tensor is aligned to its own element size, as readers that map files expect.
        metadata: text by name.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype, shape, nbytes in tensors:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        start += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
