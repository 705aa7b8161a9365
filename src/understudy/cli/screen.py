"""What a command shows: its result on stdout, and progress, notes and errors on stderr, other packages silenced."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from understudy.errors import UnderstudyError

if TYPE_CHECKING:  # rich takes a tenth of a second, which --json does not need
    from rich.console import RenderableType
    from rich.progress import Progress

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_WIDTH = 120  # of tables that go to a file or a pipe


class Screen:
    """Where one command shows what it does; silent but for errors in every process but the first of several."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK") or 0)
        self.debug = bool(os.environ.get("UNDERSTUDY_DEBUG"))
        self.err = sys.stderr  # as long as we work, sys.stderr is elsewhere
        self._bar: Progress | None = None
        self._what = ""

    def step(self, what: str, done: int, total: int) -> None:
        """Move the one bar, which is there on terminals only."""
        if self.rank or not self.err.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
            console = Console(file=self.err)
            self._bar = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.add_task(what, total=total)
            self._bar.start()
        task = self._bar.task_ids[0]
        if what != self._what:
            self._what = what
            self._bar.reset(task, description=what)
        self._bar.update(task, completed=done, total=total)

    def say(self, text: str) -> None:
        """Write a line to stderr, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.err.write(f"{text}\n")

    def show(self, data: dict[str, Any], view: Callable[[dict[str, Any]], RenderableType], as_json: bool) -> None:
        """Write the result to stdout."""
        if self.rank:
            return
        if as_json:
            sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
            return
        from rich.console import Console

        width = None if sys.stdout.isatty() else _WIDTH
        Console(markup=False, emoji=False, highlight=False, width=width).print(view(data))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keep stdout clean and other packages quiet while a command works; for debugging they talk on stderr."""
        if not self.debug:
            for name, value in _QUIET.items():
                os.environ.setdefault(name, value)
        ours, handler = logging.getLogger("understudy"), _Notes(self)
        nobody = logging.NullHandler()  # without any handler, Python writes the warnings of every package to stderr
        level = ours.level
        ours.addHandler(handler)
        ours.setLevel(logging.INFO if self.err.isatty() else logging.WARNING)
        logging.getLogger().addHandler(nobody)
        try:
            with contextlib.ExitStack() as stack:
                if self.debug:
                    stack.enter_context(contextlib.redirect_stdout(self.err))
                else:
                    nowhere = _nowhere()
                    stack.enter_context(contextlib.redirect_stdout(nowhere))
                    stack.enter_context(contextlib.redirect_stderr(nowhere))  # bars that no setting turns off
                    stack.enter_context(warnings.catch_warnings())
                    warnings.simplefilter("ignore")
                yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
            ours.removeHandler(handler)
            ours.setLevel(level)
            logging.getLogger().removeHandler(nobody)

    def fail(self, error: BaseException) -> int:
        """Write the one line that an error gets, and return the exit code."""
        text, code = explain(error)
        process = f" (process {self.rank})" if self.rank else ""
        self.say(f"error{process}: {text}")
        return code


class _Notes(logging.Handler):
    """Log records of understudy as lines on stderr."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        if not self.screen.rank:
            kind = "warning" if record.levelno >= logging.WARNING else "note"
            self.screen.say(f"{kind}: {_line(record.getMessage())}")


@functools.cache
def _nowhere() -> TextIO:
    """A stream that is never closed: other packages keep it for their loggers."""
    return open(os.devnull, "w", encoding="utf-8")


def explain(error: BaseException) -> tuple[str, int]:
    """Return one line about an error, and the exit code: 2 for what people can mend, 130 for Ctrl-C, 1 for our bugs."""
    text = _line(error)
    if isinstance(error, UnderstudyError):
        return text, 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if _is_disk_full(error, text):
        where = getattr(error, "filename", None)
        return f"disk full{f', {where} cannot be written' if where else ''}; free some space and run this again", 2
    if _is_out_of_memory(error, text):
        return f"out of memory ({text[:200] or 'no more to be had'}); try a smaller --batch-size or another --device", 2
    if isinstance(error, OSError):
        return f"{error.filename or type(error).__name__}: {error.strerror or text}", 2
    return f"{type(error).__name__}: {text[:500]} (not foreseen; UNDERSTUDY_DEBUG=1 shows where it happened)", 1


def _is_disk_full(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in text  # safetensors has an error of its own for it


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in text  # torch on CPU


def _line(text: object) -> str:
    return " ".join(str(text).split())
