"""Compress: calibrate, plan and apply in one go; they meet in files, in a work folder beside the output."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from understudy._version import __version__
from understudy.card import Card, commands, read_card
from understudy.checkpoint import resolve
from understudy.data import Blocks, token_blocks
from understudy.errors import OutputError, PlanError, StatsError, UnderstudyError, reason
from understudy.facts import ModelFacts, format_bytes, parse_bytes
from understudy.held import free_target, held, work_folder
from understudy.kinds import get_kind
from understudy.kinds.block_drop import BLOCK_DROP
from understudy.methods import get_method
from understudy.processes import join_processes
from understudy.ranking import planning_needs
from understudy.recipe import Calibration, Selection, repairing, settings_from
from understudy.rehearsal import made_up
from understudy.runtime import pick_device
from understudy.sequential import as_planned, with_needs
from understudy.stages.apply import apply
from understudy.stages.calibrate import calibrate
from understudy.stages.inspect import Inspection, inspect
from understudy.stages.recover import recover
from understudy.stages.select import PlanResult, check_settings, make_plan
from understudy.stats import EXTRA, load_stats
from understudy.sums import groups_for
from understudy.tokens import load_tokenizer

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
_FEW_BACK = 4  # blocks for gradients, or all that there are
_OF_BOTH = ("main_k", "vectors", "renormalise")  # settings of the calibration and of the plan


@dataclass(frozen=True)
class Compressed:
    """What `compress` wrote; bytes are those of tensors, before and after."""

    folder: Path
    plan: PlanResult
    nbytes: int
    source_nbytes: int
    loads: str
    notes: tuple[str, ...] = ()  # on the form of what was written

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `--json` prints it."""
        plan = self.plan.plan
        return {
            "out": str(self.folder),
            "method": self.plan.plan.method,
            "experts": self.plan.facts.experts,
            "replaced": sum(len(plan.replaced(key)) for key in plan.layers),
            "bytes": self.nbytes,
            "load_bytes": self.plan.load_bytes,
            "source_bytes": self.source_nbytes,
            "loads": self.loads,
            "notes": [*self.plan.notes, *self.notes],
        }


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    selection: Selection | None = None,
    max_shard_size: str | None = None,
    repair: int = 0,
    **options: Any,
) -> Compressed | None:
    """Calibrate a model, choose experts to replace, and write the smaller model to `out`, with its artefacts and card.

    Statistics are kept in a work folder beside `out` until the end: a call that was interrupted goes on from there.

    Args:
        model: a local folder or a hub id; it is only read.
        out: the new folder; it appears when it is complete and verified, never before.
        progress: called with (what is going on, done, all).
        calibration: settings of the calibration; or give them by name.
        selection: settings of the plan; or give them by name. A `seed` given by name is that of both.
        max_shard_size: size of a shard file, as `5GB`.
        repair: rounds in which each layer of what the plan leads to is repaired, as by `recover` with the loss
            `repair`, on the blocks of the calibration; 0 for none.

    Returns:
        What was written; None in every process but the first, where there are several.

    Raises:
        UnderstudyError: as `calibrate`, `plan` and `apply`; what can be known to fail fails before the calibration.
    """
    calibration, selection = _settings(calibration, selection, options)
    if max_shard_size:
        parse_bytes(max_shard_size)
    if repair < 0:
        raise UnderstudyError(f"--repair {repair} is below 0; give rounds, or leave it out")
    if repair and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UnderstudyError("--repair runs in one process; start it without torchrun")
    if repair and check_settings(selection)[1].name == BLOCK_DROP.name:
        raise PlanError("--repair follows every decoder layer of the original, and block_drop leaves some out")
    target = free_target(out)
    calibration = _collecting(calibration, selection)
    found = inspect(model, trust_remote_code=calibration.trust_remote_code)
    if found.facts is None:
        raise StatsError(f"{model} holds stand-ins already; compress the original model")
    rehearsed = _rehearse(found.facts, calibration, selection, target, copies=2 if repair else 1)
    if get_method(selection.method).sequential and calibration.sequential is None:
        ratio = selection.ratio if rehearsed is None else rehearsed.ratio
        calibration = with_needs(as_planned(calibration, selection.method, ratio))
    report = progress or (lambda what, done, total: None)
    processes = join_processes(pick_device(calibration.device))
    with held(_work_name(target)) if processes.rank == 0 else nullcontext():
        work = work_folder(_work_name(target))
        stats_file = work / f"stats-{_identity(found.facts, calibration)}.safetensors"
        if not processes.minimum(_usable(stats_file, model, calibration)):
            if processes.rank == 0:
                stats_file.unlink(missing_ok=True)
            processes.wait()
            calibrate(model, stats_file, settings=calibration, progress=partial(report, "calibrate"))
        if processes.rank:
            return None
        planned = make_plan(stats_file, selection)
        recipe = _write_recipe(work, model, calibration, selection, max_shard_size, repair)
        again = commands(found.model, os.fspath(target), calibration, selection, max_shard_size, repair)
        cut = work / target.name if repair else target
        shutil.rmtree(work / target.name, ignore_errors=True)  # of a call that was killed
        applied = apply(
            model,
            planned.plan,
            cut,
            stats=stats_file,
            max_shard_size=max_shard_size,
            trust_remote_code=calibration.trust_remote_code,
            artefacts={"stats.safetensors": stats_file, "recipe.json": recipe},
            extra_files={"README.md": _write_card(work, target.name, found, planned, stats_file, again)},
            progress=report,
        )
        notes = applied.notes
        if repair:
            recovered = recover(
                cut,
                target,
                teacher=model,
                settings=repairing(calibration, calibration.seed, repair),
                blocks=_drawn(cut, calibration),
                max_shard_size=max_shard_size,
                progress=report,
            )
            notes += recovered.notes if recovered else ()
        shutil.rmtree(work, ignore_errors=True)
    return Compressed(target, planned, applied.nbytes, applied.source_nbytes, applied.loads, notes)


def _work_name(target: Path) -> Path:
    return target.with_name(f"{target.name}.compress")


def _settings(
    calibration: Calibration | None, selection: Selection | None, options: dict[str, Any]
) -> tuple[Calibration, Selection]:
    """Share named options out: each goes to the settings that know it, a seed to both."""
    mine = {name: options[name] for name in options if name in Calibration.model_fields}
    theirs = {name: options[name] for name in options if name in Selection.model_fields}
    mine |= {name: value for name, value in options.items() if name not in theirs}  # unknown ones are refused there
    return settings_from(Calibration, calibration, mine), settings_from(Selection, selection, theirs)


def _collecting(calibration: Calibration, selection: Selection) -> Calibration:
    """Add to what is collected all that the plan and its stand-ins need.

    Raises:
        PlanError: settings that contradict each other.
        StatsError: the method compares with a base checkpoint, and none is given.
    """
    method, kind, _ = check_settings(selection)
    groups = groups_for({*planning_needs(method, selection), *kind.needs})
    if "base" in groups and calibration.base is None:
        raise StatsError(f"method {method.name} needs --base MODEL, the checkpoint that this one was trained from")
    collect = tuple(group for group in EXTRA if group in groups or group in calibration.collect)
    update: dict[str, Any] = {"collect": collect}
    if "gradients" in collect and calibration.gradient_samples is None and method.gradients < 1:
        back = max(math.ceil(method.gradients * calibration.samples), _FEW_BACK)
        update["gradient_samples"] = back if back < calibration.samples else None
    if selection.fit:  # vectors are fitted for what the plan will say
        update |= {name: getattr(selection, name) for name in _OF_BOTH}
    elif "modulation" not in collect:  # these flags were meant for the plan
        update |= {name: Calibration.model_fields[name].default for name in _OF_BOTH}
    return calibration.model_copy(update=update)


def _rehearse(
    facts: ModelFacts, calibration: Calibration, selection: Selection, target: Path, copies: int
) -> PlanResult | None:
    """Plan on made-up statistics: what is wrong with the settings or out of the model's reach shows without any text.

    Raises:
        PlanError: settings that contradict each other, or that no plan can meet.
        StatsError: the method needs text, and none is to be read.
        OutputError: there is not enough room on the disk.
    """
    stats = made_up(facts, planning_needs(get_method(selection.method), selection), calibration.weights_only)
    if stats is None:
        logger.info("%s: the width of its experts is not known before the calibration", facts.source)
        return None
    planned = make_plan(stats, selection)
    needed = copies * planned.expected_bytes
    place = next(folder for folder in target.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise OutputError(f"{target}: {format_bytes(needed)} are needed, {format_bytes(free)} are free")
    return planned


def _identity(facts: ModelFacts, calibration: Calibration) -> str:
    """Name the settings that statistics depend on."""
    settings = calibration.model_dump(exclude={"activation_memory"})
    return hashlib.sha256(json.dumps([__version__, facts.fingerprint, settings]).encode()).hexdigest()[:12]


def _usable(stats_file: Path, model: str | os.PathLike[str], calibration: Calibration) -> bool:
    """Whether an interrupted call left statistics of the same settings and, to the token, the same text."""
    if not stats_file.exists():
        return False
    try:
        digest = load_stats(stats_file, only=()).data.get("digest")
    except UnderstudyError:
        return False
    if calibration.weights_only:
        return True
    blocks = _drawn(resolve(model), calibration)
    if digest == blocks.digest:
        logger.info("going on with the statistics of an interrupted call, %s", stats_file)
    return digest == blocks.digest


def _drawn(folder: Path, calibration: Calibration) -> Blocks:
    return token_blocks(
        calibration.data,
        load_tokenizer(folder, calibration.trust_remote_code),
        seq_len=calibration.seq_len,
        samples=calibration.samples,
        seed=calibration.seed,
    )


def _write_recipe(
    work: Path,
    model: str | os.PathLike[str],
    calibration: Calibration,
    selection: Selection,
    max_shard_size: str | None,
    repair: int,
) -> Path:
    recipe = {
        "format": 1,
        "understudy": __version__,
        "model": os.fspath(model),
        "calibration": calibration.model_dump(),
        "selection": selection.model_dump(),
        "apply": {"max_shard_size": max_shard_size},
        "repair": repair,
    }
    return _write(work / "recipe.json", json.dumps(recipe, indent=2) + "\n")


def _write_card(
    work: Path, name: str, found: Inspection, planned: PlanResult, stats_file: Path, again: list[str]
) -> Path:
    used = {kind for kinds in planned.plan.layers.values() for kind in kinds}
    data = load_stats(stats_file, only=()).data
    card = Card(
        name=name,
        source=found.model,
        source_card=read_card(resolve(found.model)),
        facts=planned.facts,
        plan=planned.plan,
        paper=get_method(planned.plan.method).paper,
        kinds={kind: get_kind(kind).description for kind in used},
        nbytes=planned.expected_bytes,
        stock=all(get_kind(kind).renumbers for kind in used),
        vllm=found.vllm,
        data=data,
        notes=[*data.get("notes", ()), *planned.notes],
        commands=again,
    )
    return _write(work / "README.md", card.text())


def _write(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)})") from None
    return path
