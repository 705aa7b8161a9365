"""The work folder beside an output: where a run works until the output is complete. One run at a time holds it.

The kernel lets go of the lock when a process dies, however it dies, so what a killed run left is told from what a
living one is writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from understudy.errors import OutputError, reason

try:
    import fcntl
except ImportError:  # not on Windows, where two runs with one output are not told apart
    fcntl = None  # type: ignore[assignment]  # not on this system


def work_folder(target: Path) -> Path:
    """Return where a run works until `target` is complete."""
    return target.with_name(f".{target.name}.partial")


def free_target(out: str | os.PathLike[str]) -> Path:
    """Make sure that a model folder can be put there, an empty folder may be, and return where it really is.

    Raises:
        OutputError: something is there already.
    """
    target = Path(out)
    if target.is_symlink() or target.name in ("", ".."):
        target = target.resolve()  # what is renamed in the end must lie on the same disk
    if os.path.ismount(target):
        raise OutputError(f"{target} is a mount point, which cannot be replaced; choose a new folder inside it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"{target} exists already{' and is not empty' * target.is_dir()}; choose another --out")
    return target


@contextmanager
def held(target: Path) -> Iterator[Path]:
    """Make the work folder of an output and hold it while the context is open; what a killed run left is still in it.

    Raises:
        OutputError: it cannot be made, or another run holds it.
    """
    work, handle = work_folder(target), None
    try:
        work.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            handle = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({reason(error)})") from None
    try:
        if handle is not None and not _lock(handle, work):
            raise OutputError(f"{target}: another run is writing it; wait for that one, or choose another --out")
        try:
            yield work
        finally:
            with suppress(OSError):
                work.rmdir()  # where nothing came of it
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, work: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), os.stat(work))  # the other run may just have renamed it
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True  # a file system without locks, or without any on folders (NFS)
