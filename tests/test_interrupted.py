"""Killed at any moment, a run leaves no partial output, and the next one succeeds with the very same bytes.

`benchmarks/kill.py` does the same with fresh processes and more kills.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small
from understudy.stages.apply import apply
from understudy.stages.calibrate import calibrate
from understudy.stages.select import plan as make_plan
from understudy.stats import file_hash

KILLS = 3
# Forked from a process that has imported everything and computed nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "pytest"])


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """Let the process that forks find what it is to import: it starts without the path of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.model_folder(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=8, intermediate_size=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.text_file(tmp_path_factory.mktemp("data") / "text.txt", words=2000)


def at_work(ready: Any, run: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    ready.send("imports are done")
    run(*arguments, **options)
    ready.send("done")


def start(run: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Start a run in a process of its own, and say where it reports; it is at work when this returns."""
    reports, ready = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=at_work, args=(ready, run, *arguments), kwargs=options)
    process.start()
    ready.close()
    assert reports.poll(120)
    reports.recv()
    return process, reports


def seconds(run: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Run to the end."""
    process, reports = start(run, *arguments, **options)
    begin = time.perf_counter()
    assert reports.poll(120)
    reports.recv()  # or an end of file, where it failed
    took = time.perf_counter() - begin
    process.join(120)
    assert process.exitcode == 0
    return took


def kill(run: Callable[..., Any], after: float, *arguments: Any, **options: Any) -> None:
    """Kill -9 a run after so many seconds of work."""
    process, _ = start(run, *arguments, **options)
    time.sleep(after)
    process.kill()
    process.join(120)


def contents(path: Path) -> Any:
    return small.hashes(path) if path.is_dir() else file_hash(path)


def check(run: Callable[..., Any], folder: Path, source: Path, *arguments: str, **options: Any) -> None:
    """Kill a run at moments spread over its duration."""
    untouched = small.hashes(source)
    seconds(run, str(source), *arguments, str(folder / "first" / "out"), **options)
    duration = seconds(run, str(source), *arguments, str(folder / "second" / "out"), **options)
    reference = contents(folder / "first" / "out")
    assert contents(folder / "second" / "out") == reference
    for number, moment in enumerate(np.random.default_rng(0).random(KILLS)):
        target = folder / f"killed-{number}" / "out"
        kill(run, (number + moment) / KILLS * duration, str(source), *arguments, str(target), **options)
        assert small.hashes(source) == untouched
        if target.exists():  # just before the end
            assert contents(target) == reference, "a partial output appeared"
        else:
            target.parent.mkdir(exist_ok=True)
            assert small.beside(target) <= {".out.partial"}
            seconds(run, str(source), *arguments, str(target), **options)
            assert contents(target) == reference
        assert small.beside(target) == set(), "something is left over"
    assert small.hashes(source) == untouched


def test_calibrate_killed(source: Path, data: str, tmp_path: Path) -> None:
    check(calibrate, tmp_path, source, data=data, samples=24, seq_len=64, batch_size=2)


def test_apply_killed(source: Path, data: str, tmp_path: Path) -> None:
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.yaml"
    calibrate(source, stats, data=data, samples=4, seq_len=64)
    make_plan(stats, plan, method="mone", ratio=0.5)
    check(apply, tmp_path, source, str(plan), stats=str(stats), max_shard_size="200KB")
