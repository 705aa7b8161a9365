"""Every error that a user can cause, as one tree.

    UnderstudyError                 anything below; the command line prints it as one line and exits with code 2
    ├── UnsupportedModelError       not a Mixture-of-Experts model, or one whose experts cannot be observed at the seam
    ├── CheckpointError             missing, truncated, corrupt or unsafe model folder
    ├── NumericError                NaN or infinity in weights or activations
    ├── DataError                   text that cannot be read, is empty, or is too little
    ├── StatsError                  statistics of another model, or without what a score needs
    ├── PlanError                   a plan that is malformed, impossible, or made for another model
    ├── OutputError                 the output folder is taken, or cannot be written (disk full)
    └── DependencyError             an optional package is missing; the message names the extra that brings it

Each message says what is wrong, where, and what to do. A broken invariant of our own is an `assert`, never of these.
"""

import re


class UnderstudyError(ValueError):
    """Base of every error a user can cause."""


class UnsupportedModelError(UnderstudyError):
    """The model is not a Mixture-of-Experts model, or its experts cannot be reached at the seam."""


class CheckpointError(UnderstudyError):
    """A model folder is missing, incomplete, damaged or unsafe."""


class NumericError(UnderstudyError):
    """NaN or infinity in weights or activations."""


class DataError(UnderstudyError):
    """Text cannot be read, is empty, or is too little."""


class StatsError(UnderstudyError):
    """Statistics belong to another model or lack what was asked of them."""


class PlanError(UnderstudyError):
    """A plan is malformed, impossible, or made for another model."""


class OutputError(UnderstudyError):
    """The output exists already or cannot be written."""


class DependencyError(UnderstudyError):
    """An optional dependency is not installed."""


def reason(error: Exception) -> str:
    """Say in a few words what the system reports; safetensors wraps it in a text of its own."""
    wrapped = re.search(r"I/O error: (.*?) \(os error", str(error))
    if wrapped:
        return wrapped.group(1)
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
