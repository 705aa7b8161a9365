"""What an interrupted search left: a JSON file beside what it was to write, good for the same settings only."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from understudy._version import __version__
from understudy.errors import OutputError, reason


class Left:
    """Values by name that outlive a search until it ends.

    Args:
        file: where they are kept.
        settings: all that the values depend on, as JSON takes it; the version of understudy is added.
    """

    def __init__(self, file: Path, settings: Any) -> None:
        self.file = file
        self.run = hashlib.sha256(json.dumps([__version__, settings]).encode()).hexdigest()[:16]
        self.values: dict[str, Any] = {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(found, dict) and found.pop("run", None) == self.run:
            self.values = found

    def keep(self, **values: Any) -> None:
        """Write these values beside those that are there, under a temporary name first.

        Raises:
            OutputError: the file cannot be written.
        """
        self.values |= values
        partial = self.file.with_name(self.file.name + ".tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"run": self.run, **self.values}), encoding="utf-8")
            os.replace(partial, self.file)
        except OSError as error:
            raise OutputError(f"{self.file}: cannot be written ({reason(error)})") from None

    def end(self) -> None:
        """Remove the file."""
        self.file.unlink(missing_ok=True)
