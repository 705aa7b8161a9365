"""Compare: many methods at equal bytes on the same held-out text, each with several calibrations.

Plans are cut from one calibration a seed, and no smaller model is written unless tasks ask for it. Every record is a
file as soon as it is there, so that a call that was interrupted goes on, and a later one adds to what is there.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from understudy._version import __version__
from understudy.calibrations import Calibrated, Calibrations
from understudy.checkpoint import resolve
from understudy.comparison import (
    PLANS,
    RESULTS,
    Original,
    Record,
    ResultSet,
    load_records,
    load_results,
    record_name,
    save_record,
    save_results,
)
from understudy.contest import (
    Entrant,
    budget,
    check_same,
    check_settings,
    command_line,
    in_order,
    read_entrants,
)
from understudy.data import Blocks, parse_specs, token_blocks
from understudy.errors import DataError, DependencyError, OutputError, PlanError, UnderstudyError
from understudy.facts import ModelFacts
from understudy.harness import Harness
from understudy.held import held
from understudy.layout import model_facts
from understudy.plans import Plan
from understudy.quality import ALL, vocabulary
from understudy.recipe import Calibration, Comparison, repairing, settings_from
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.stages.calibrate import calibrate
from understudy.stages.recover import recover
from understudy.stages.select import PlanResult, make_plan
from understudy.stats import Stats
from understudy.tokens import load_tokenizer, longest_sequence
from understudy.trial import Trial
from understudy.virtual import planned

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Tasks = dict[str, dict[str, float | None]]  # value by task and metric
_MODEL = ".model-"  # start of the name of a folder for a model while it is written
_NOT_SEQUENTIAL = (
    "not sequential: with this kind or these settings the statistics are those of the whole model, where the method "
    "takes those of a layer from the model as compressed before it"
)


def compare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    settings: Comparison | None = None,
    **options: Any,
) -> ResultSet:
    """Compare methods on one model at equal bytes, and write what was found to the folder `out`.

    Args:
        model: a local folder or a hub id; it is only read.
        out: the folder of `understudy.comparison`; one of an earlier call on the same model and text is added to.
        progress: called with (what is going on, done, all).
        settings: every setting; or give them by name (`methods`, `ratios`, `seeds`, ... of `recipe.Comparison`).

    Raises:
        UnderstudyError: bad model, text, methods, tasks or settings, or a folder that holds something else. A method
            that cannot be applied, or not as far as the budget asks, is no error: its record says why.
    """
    chosen = settings_from(Comparison, settings, options)
    entrants = read_entrants(chosen.methods)
    check_settings(chosen)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UnderstudyError("compare runs in one process; start it without torchrun")
    report = progress or (lambda what, done, total: None)
    folder, target = resolve(model), Path(out)
    source = Skeleton(folder, dtype=chosen.dtype, device=chosen.device, trust_remote_code=chosen.trust_remote_code)
    if source.has_stand_ins:
        raise PlanError(f"{folder} holds stand-ins already; compare on the original model")
    blocks = _blocks(source, folder, chosen)
    harness = None
    if chosen.tasks:
        harness = Harness(chosen.tasks, chosen.include_path, {"pretrained": str(folder.absolute())})
    with held(target):
        run = _Run(os.fspath(model), folder, source, blocks, chosen, target, harness, report)
        return run.run(entrants)


def _blocks(source: Skeleton, folder: Path, settings: Comparison) -> Blocks:
    """Cut the test text into blocks; that the calibration text is there is seen to as well."""
    parse_specs(settings.data)
    limit = longest_sequence(source.config)
    for flag, length in (("seq-len", settings.seq_len), ("test-seq-len", settings.test_seq_len)):
        if length > limit:
            raise DataError(f"--{flag} {length} is more than the {limit} positions of {folder}")
    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    blocks = token_blocks(settings.test, tokenizer, seq_len=settings.test_seq_len, samples=settings.test_samples)
    if ALL in blocks.names:
        raise DataError(f"a source of text is named {ALL!r}, which stands for the total; rename its file or folder")
    if blocks.ids.max() >= (ids := vocabulary(source)):
        raise DataError(f"{folder}: its tokenizer gives ids past its vocabulary of {ids}")
    return blocks


class _Run:
    """One call, and the folder that it writes to."""

    def __init__(
        self,
        model: str,
        folder: Path,
        source: Skeleton,
        blocks: Blocks,
        settings: Comparison,
        target: Path,
        harness: Harness | None,
        report: Progress,
    ) -> None:
        self.model, self.folder, self.source, self.settings = model, folder, source, settings
        self.target, self.harness, self.report = target, harness, report
        self.told: set[str] = set()
        self.facts: ModelFacts = model_facts(source, model)
        drawn = {name: int((blocks.source == i).sum()) for i, name in enumerate(blocks.names)}
        self.described = settings.model_dump(mode="json") | {"digest": blocks.digest, "blocks": drawn}
        self.again = command_line(model, os.fspath(target), settings)
        tokenizer = load_tokenizer(folder, settings.trust_remote_code)
        self.trial = Trial(source, blocks, settings, tokenizer)
        self.calibrations = Calibrations(target, settings, tokenizer, self._calibrate)

    def run(self, entrants: list[Entrant]) -> ResultSet:
        """Make every record that is not there yet, seed by seed."""
        there = self._open()
        records = {record.name: record for record in load_records(self.target)}
        tasks = [
            (seed, ratio, entrant, record_name(entrant.label, ratio, seed))
            for seed in self.settings.seeds
            for ratio in self.settings.ratios
            for entrant in entrants
        ]
        # what was skipped is tried again: it costs little, and the reason may be gone
        missing = [task for task in tasks if task[3] not in records or records[task[3]].skipped]
        if there is None or missing:
            figures = self.trial.walk_original(self.report)
        results = there or self._new(figures)
        for seed in dict.fromkeys(task[0] for task in missing):
            mine = [task for task in missing if task[0] == seed]
            sharing = [entrant for _, _, entrant, _ in mine if not entrant.sequential]
            calibrated = self.calibrations.shared(seed, sharing) if sharing else None
            for task in mine:
                _, ratio, entrant, name = task
                self.report("compare", len(tasks) - len(missing) + missing.index(task), len(tasks))
                before = [r for r in records.values() if (r.label, r.ratio) == (entrant.label, ratio)]
                whole = not any(r.speed or r.examples for r in before)
                records[name] = self._record(entrant, ratio, seed, calibrated, whole)
                save_record(records[name], self.target)
                self._save(results, records)
        self.report("compare", len(tasks), len(tasks))
        return self._save(results, records)

    # ---- the folder -------------------------------------------------------------------------------------------

    def _open(self) -> ResultSet | None:
        """Return what the folder holds, None where there is nothing; refuse a folder that holds something else."""
        if (self.target / RESULTS).exists():
            there = load_results(self.target)
            check_same(there, self.facts, self.described, self.target)
            for left in self.target.glob(f"{_MODEL}*"):  # by a call that was killed
                shutil.rmtree(left, ignore_errors=True)
            more = {"settings": self.described, "commands": list(dict.fromkeys([*there.commands, self.again]))}
            return there.model_copy(update=more | {"understudy": __version__})
        if self.target.is_dir() and any(path.suffix != ".tmp" for path in self.target.iterdir()):
            raise OutputError(f"{self.target} holds something else than a comparison; choose another --out")
        return None

    def _new(self, original: Original) -> ResultSet:
        if self.harness is not None:
            original = original.model_copy(update={"tasks": self._ask(self.folder)})
        notes = list(self.trial.blocks.notes)
        if both := set(self.settings.data) & set(self.settings.test):
            notes.append(f"{', '.join(sorted(both))} is both calibrated on and tested on; the figures flatter")
        results = ResultSet(
            understudy=__version__,
            model=self.facts,
            original=original,
            settings=self.described,
            commands=[self.again],
            notes=notes,
        )
        return self._save(results, {})

    def _save(self, results: ResultSet, records: dict[str, Record]) -> ResultSet:
        results = results.model_copy(update={"results": in_order(records.values(), results, self.settings)})
        save_results(results, self.target)
        return results

    def _calibrate(self, file: Path, settings: Calibration, blocks: Blocks) -> Stats:
        report = partial(self.report, f"calibrate {file.stem.removeprefix('stats-')}")
        return calibrate(self.model, file, settings=settings, blocks=blocks, progress=report)

    # ---- one record -------------------------------------------------------------------------------------------

    def _record(self, entrant: Entrant, ratio: float, seed: int, calibrated: Calibrated | None, whole: bool) -> Record:
        """Plan, evaluate and measure one method; one that cannot be applied gives a record that says why."""
        size, begun = budget(self.facts, ratio), time.monotonic()
        record = Record(
            name=record_name(entrant.label, ratio, seed),
            label=entrant.label,
            method=entrant.method.name,
            kind=entrant.kind,
            options=entrant.options | ({"repair": str(entrant.repair)} if entrant.repair else {}),
            ratio=ratio,
            seed=seed,
            budget_bytes=size,
            sequential=entrant.sequential,
        )
        try:
            if entrant.sequential:
                calibrated = self.calibrations.sequential(entrant, ratio, seed)
            assert calibrated is not None
            made = self._plan(entrant, ratio, seed, size, calibrated.stats)
            found = self._evaluate(record, entrant, made, calibrated, whole)
        except (OutputError, DependencyError):
            raise
        except UnderstudyError as error:
            if (told := f"{entrant.label} at {ratio:g}: skipped, {error}") not in self.told:  # once for all seeds
                logger.warning("%s", told)
            self.told.add(told)
            return record.model_copy(update={"skipped": str(error), "seconds": time.monotonic() - begun})
        if entrant.method.sequential and not entrant.sequential:
            found["notes"].append(_NOT_SEQUENTIAL)
        return record.model_copy(update=found | {"seconds": time.monotonic() - begun})

    def _plan(self, entrant: Entrant, ratio: float, seed: int, size: int, stats: Stats) -> PlanResult:
        """Plan for the budget; where layers were calibrated as compressed by the ratio, by that if it is within."""
        if entrant.sequential:
            made = make_plan(stats, entrant.selection(seed, ratio=ratio))
            if made.expected_bytes <= size:
                return made
        return make_plan(stats, entrant.selection(seed, size=f"{size}B"))

    def _evaluate(
        self, record: Record, entrant: Entrant, made: PlanResult, calibrated: Calibrated, whole: bool
    ) -> dict[str, Any]:
        """Return the fields of a record that come of its plan."""
        plan = made.plan.model_copy(update={"stats": calibrated.digest})
        file = plan.save(self.target / PLANS / f"{record.name}.yaml")
        notes = list(made.notes)
        with self._made(plan, calibrated.stats, record.seed, entrant.repair) as (model, folder):
            found, kl_N = self.trial.figures(model)
            if whole:
                more, problems = self.trial.run_whole(model, kl_N)
                found, notes = found | more, notes + problems
            if self.harness is not None and folder is not None:
                found["tasks"] = self._ask(folder)
        kinds = sorted({kind for kinds in plan.layers.values() for kind in kinds})
        found |= {"stats": calibrated.file.name, "plan": str(file.relative_to(self.target))}
        return found | {"notes": notes, "kind": "+".join(kinds) or "none"}

    @contextmanager
    def _made(self, plan: Plan, stats: Stats, seed: int, rounds: int) -> Iterator[tuple[Skeleton, Path | None]]:
        """Give the model of a plan, and its folder where it is written: for lm-eval, which loads folders, or repaired.

        It is there for as long as it is needed.
        """
        s = self.settings
        if self.harness is None and not rounds:
            yield planned(self.source, plan, stats), None
            return
        with tempfile.TemporaryDirectory(dir=self.target, prefix=_MODEL) as place:
            folder = apply(self.folder, plan, f"{place}/cut", stats=stats, trust_remote_code=s.trust_remote_code).folder
            if not rounds:
                yield planned(self.source, plan, stats), folder
                return
            blocks, settings = self.calibrations.blocks(seed), repairing(s, seed, rounds)
            recover(folder, f"{place}/model", teacher=self.folder, settings=settings, blocks=blocks)
            folder = Path(place) / "model"
            trust = s.trust_remote_code
            yield Skeleton(folder, dtype=s.dtype, device=s.device, trust_remote_code=trust), folder

    def _ask(self, folder: Path) -> Tasks:
        assert self.harness is not None
        settings, dtype = self.settings, str(self.source.dtype).removeprefix("torch.")
        return self.harness.run(
            folder,
            dtype=dtype,
            device=str(self.source.device),
            batch_size=settings.batch_size,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            trust_remote_code=settings.trust_remote_code,
        )
