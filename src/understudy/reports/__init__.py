"""Reports: what a compressed model, or a comparison, is and what it cost, as one page of HTML that needs nothing else.

No model is loaded: a report reads what other commands left in the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.comparison import RESULTS
from understudy.errors import OutputError, UnderstudyError, reason
from understudy.reports import compared, single
from understudy.reports.markup import Html

FILE = "report.html"
LARGEST = 3_000_000  # bytes of a page


@dataclass(frozen=True)
class Report:
    """The page that was written: where, how large, of what, and what a reader would miss in it."""

    path: Path
    nbytes: int
    about: str  # "comparison" or "model"
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `--json` prints it."""
        return {"out": str(self.path), "about": self.about, "bytes": self.nbytes, "notes": list(self.notes)}


def report(folder: str | os.PathLike[str]) -> Report:
    """Write `report.html` into a folder that `compare`, `compress` or `apply` wrote.

    A page that would weigh more than 3 MB leaves out maps and examples of all but the leading methods.

    Raises:
        UnderstudyError: the folder holds nothing to report on, or what it holds cannot be read.
        OutputError: the page cannot be written.
        DependencyError: the package that draws charts is missing.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UnderstudyError(f"{place}: there is no such folder; give one that compare or compress wrote")
    draw: Callable[[Path, bool], tuple[Html, list[str]]]
    if (place / RESULTS).is_file():
        about, draw = "comparison", compared.page
    elif (place / "understudy" / "plan.yaml").is_file() or (place / "understudy" / "metrics.json").is_file():
        about, draw = "model", single.page
    else:
        raise UnderstudyError(
            f"{place}: nothing to report on; it holds neither {RESULTS} (of `understudy compare`) nor "
            "understudy/plan.yaml (of `understudy compress`)"
        )
    for full in (True, False):
        text, notes = draw(place, full)
        data = text.encode("utf-8", "replace")  # half a surrogate pair, say, from a cut text
        if len(data) <= LARGEST:
            break
    return Report(_write(place / FILE, data), len(data), about, tuple(notes))


def _write(path: Path, data: bytes) -> Path:
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)})") from None
    return path
