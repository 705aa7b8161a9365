"""Loader of the task files in this folder, wherever lm-evaluation-harness is started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def load(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the rows of ``file``, which lies beside this module, as the split ``test``.

    The harness would look for ``data_files`` in the current folder. Building the split from rows also leaves nothing
    in the data-set cache. The keyword arguments left over are the metadata that the harness hands to every loader.
    """
    with (Path(__file__).parent / file).open(encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
