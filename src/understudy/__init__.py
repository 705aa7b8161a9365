"""Understudy: shrink Mixture-of-Experts language models by replacing the experts they can spare.

Importing this package is cheap and teaches transformers to load folders with stand-ins, whichever of the two is
imported first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from understudy._version import __version__

_COMMANDS = {
    "inspect": "understudy.stages.inspect",
    "calibrate": "understudy.stages.calibrate",
    "plan": "understudy.stages.select",
    "search": "understudy.stages.search",
    "show": "understudy.stages.review",
    "check": "understudy.stages.review",
    "diff": "understudy.stages.review",
    "apply": "understudy.stages.apply",
    "compress": "understudy.stages.compress",
    "recover": "understudy.stages.recover",
    "eval": "understudy.stages.evaluate:evaluate",  # not to hide the builtin there
    "compare": "understudy.stages.compare",
    "report": "understudy.reports",
}
_WATCHED = "transformers.modeling_utils"


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Runs `understudy.loading.hook` right after transformers' model loader is imported, and not before.

    transformers and torch take seconds to import; planning needs neither, so they are not imported for the hook's sake.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_then_hook(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("understudy.loading").hook()

            spec.loader.exec_module = exec_then_hook  # type: ignore[method-assign]  # of this loader alone
        return spec


if _WATCHED in sys.modules:
    importlib.import_module("understudy.loading").hook()
else:
    sys.meta_path.insert(0, _AfterTransformers())


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        module, _, function = _COMMANDS[name].partition(":")
        return getattr(importlib.import_module(module), function or name)
    raise AttributeError(f"module 'understudy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_COMMANDS])


__all__ = [
    "__version__",
    "apply",
    "calibrate",
    "check",
    "compare",
    "compress",
    "diff",
    "eval",
    "inspect",
    "plan",
    "recover",
    "report",
    "search",
    "show",
]
