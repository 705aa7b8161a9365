"""Benchmark tasks through lm-eval's own runner, so that figures equal those of lm-eval's own command line.

lm-eval loads the model by itself from the folder, whole; `import understudy` has taught transformers how.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from understudy.errors import DataError, DependencyError, UnderstudyError


class Harness:
    """A choice of lm-eval tasks, found and readable.

    Args:
        tasks: names of tasks, groups or tags, patterns of names, or task files (`.yaml`); commas separate several.
        include_path: folder with task files of one's own; they come before lm-eval's of the same name.
        metadata: what tasks that build their data for a model are told of it.

    Raises:
        DependencyError: lm-eval is not installed.
        DataError: a task is unknown, or its file or its data cannot be read.
    """

    def __init__(self, tasks: Sequence[str], include_path: str | None, metadata: dict[str, Any]) -> None:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise DependencyError(f"--tasks need lm-eval ({error}): pip install understudy[eval]") from None
        self.version: str = lm_eval.__version__
        wanted = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
        folder = Path(include_path).expanduser() if include_path else None
        if folder is not None and not folder.is_dir():
            raise DataError(f"--include-path {include_path}: there is no such folder")
        # lm-eval takes many seconds to scan the thousands of tasks it comes with, which one's own rarely need
        own_only = folder is not None and not any(set(name) & set("*?[") for name in wanted)
        with _stdout_to_stderr():
            if own_only:
                self._manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
                if self._load(wanted, folder, quietly=True):
                    return
            self._manager = TaskManager(include_path=str(folder) if folder else None, metadata=metadata)
            self._load(wanted, folder)

    def _load(self, wanted: list[str], folder: Path | None, quietly: bool = False) -> bool:
        """Find the tasks and open their data; set `names` to what lm-eval calls them."""
        names: list[str] = []
        for name in wanted:
            if name.endswith(".yaml"):
                found = [str(Path(name).absolute())] if Path(name).is_file() else []
            else:
                found = self._manager.match_tasks([name])
            if not found and quietly:
                return False
            if not found:
                _blame_file(folder)
                where = f" or in {folder}" if folder else "; --include-path names a folder with tasks of your own"
                raise DataError(f"task {name!r} is not among those of lm-eval{where}")
            names += [f for f in found if f not in names]
        try:
            self._manager.load(list(names))
        except Exception as error:  # tasks are programs, and data sets raise errors of many packages
            if quietly:
                return False  # a group may name tasks of lm-eval's own
            raise DataError(f"tasks {', '.join(wanted)} cannot be loaded: {_reason(error)}") from None
        self.names = names
        return True

    def run(
        self,
        folder: Path,
        *,
        dtype: str,
        device: str,
        batch_size: int,
        limit: int | None = None,
        num_fewshot: int | None = None,
        trust_remote_code: bool = False,
    ) -> dict[str, dict[str, float | None]]:
        """Load the model and answer the tasks: `{task: {metric: value}}` with lm-eval's names, groups among them.

        A metric comes with its `_stderr` (None where lm-eval has none); a filter other than `none` stays in the name.

        Raises:
            DataError: lm-eval cannot run the tasks on this model.
        """
        from lm_eval import evaluator, simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # for its record it asks git about the current folder, and where that is no repository git complains on stderr
        evaluator.get_git_commit_hash = lambda: None
        more = {"trust_remote_code": True} if trust_remote_code else {}
        with _stdout_to_stderr():
            try:
                # An absolute path: lm-eval looks up anything of the form owner/name on the hub.
                path = str(folder.absolute())
                lm = HFLM(pretrained=path, dtype=dtype, device=device, batch_size=batch_size, **more)
                # By name, not the loaded tasks: their data may be drawn with the seeds that are set in there.
                results = simple_evaluate(
                    model=lm,
                    tasks=list(self.names),
                    task_manager=self._manager,
                    batch_size=batch_size,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    log_samples=False,
                )
            except UnderstudyError:
                raise
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise DataError(f"{folder}: tasks {', '.join(self.names)} failed ({_reason(error)})") from error
            finally:
                lm = None
                gc.collect()
        assert results is not None
        named = {task: _metrics(found) for task, found in results["results"].items()}
        return {task: metrics for task, metrics in named.items() if metrics}


def _metrics(found: dict[str, Any]) -> dict[str, float | None]:
    """Keep `metric,filter` entries; the rest is names and counts."""
    metrics: dict[str, float | None] = {}
    for key, value in found.items():
        if "," in key:
            number = float(value) if not isinstance(value, str) else math.nan  # "N/A"
            metrics[key.removesuffix(",none")] = None if math.isnan(number) else number
    return metrics


def _blame_file(folder: Path | None) -> None:
    """Name a task file that cannot be read: lm-eval passes over it in silence, and its tasks are then unknown."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.rglob("*.yaml")) if folder else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever the yaml reader finds
            raise DataError(f"{path}: not a readable task file ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _stdout_to_stderr() -> Any:
    """Keep what tasks print out of machine-readable output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
