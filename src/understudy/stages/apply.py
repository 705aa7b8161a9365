"""Apply: cut a checkpoint by a plan, byte for byte, into a new folder that is verified before it appears."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from understudy._version import __version__
from understudy.checkpoint import Checkpoint, resolve
from understudy.entries import ids_of
from understudy.errors import NumericError, OutputError, PlanError, StatsError, UnderstudyError, reason
from understudy.facts import ModelFacts, parse_bytes
from understudy.held import free_target, held
from understudy.kinds import check_plan, expected_bytes, get_kind
from understudy.layout import expert_tensors, model_facts, vllm_refuses
from understudy.plans import Plan, load_plan
from understudy.shards import MAX_SHARD, write_folder, write_rest
from understudy.skeleton import Skeleton
from understudy.standins import declared, declared_absent, declared_modulated, declared_unrouted, known_to_engines
from understudy.stats import Stats, file_hash, load_stats, require
from understudy.verify import verify_folder
from understudy.virtual import outcome

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Applied:
    """What `apply` wrote: the folder, bytes of its tensors, bytes of the source's, and how it loads.

    `at_full_size`: stand-ins were written out as full experts, so that nothing is saved. `notes`: what people should
    know of the form in which it is written.
    """

    folder: Path
    nbytes: int
    source_nbytes: int
    loads: str
    at_full_size: bool = False
    notes: tuple[str, ...] = ()


def apply(
    model: str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    stats: Stats | str | os.PathLike[str] | None = None,
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
    materialise: bool = False,
    artefacts: dict[str, Path] | None = None,
    extra_files: dict[str, Path] | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Write the model that a plan decides on.

    Args:
        model: the source, a local folder or a hub id; it is only read.
        plan: the plan or its file.
        out: the new folder; it appears when it is complete and verified, never before.
        stats: statistics that the stand-ins are made of; `drop` needs none.
        max_shard_size: size of a shard file, as `5GB`.
        materialise: write experts that share weights or lost neurons at full size, each with its own copy, so that the
            folder is an ordinary checkpoint that loads anywhere and saves no memory.
        artefacts: files to carry along in `out/understudy/`, by name.
        extra_files: files to put beside the weights (a model card, say), by name.
        progress: called with (what is going on, done, all).

    Raises:
        UnderstudyError: plan, statistics and model do not belong together, the source is damaged, `out` is taken, the
            disk is full, or the result does not hold what the plan says.
    """
    target = free_target(out)
    limit = parse_bytes(max_shard_size) if max_shard_size else MAX_SHARD
    plan_file = None if isinstance(plan, Plan) else Path(plan)
    decided = plan if isinstance(plan, Plan) else load_plan(plan)
    known = stats if isinstance(stats, Stats) or stats is None else load_stats(stats)
    folder = resolve(model)
    source = Skeleton(folder, device="cpu", trust_remote_code=trust_remote_code)
    if source.has_stand_ins:
        raise PlanError(f"{folder} holds stand-ins already; apply the plan to the original model")
    facts = model_facts(source, str(model))
    check_plan(decided, facts)
    _check_stats(decided, known, facts)
    _check_parent(decided, stats)
    if target.absolute().is_relative_to(folder.absolute()):
        raise OutputError(f"{target} lies inside the source {folder}, which is only read; choose another --out")
    cut = outcome(source, decided, known, materialise)
    written = sum(p.nbytes for p in cut.pieces)
    assert written == (facts.nbytes if cut.at_full_size else expected_bytes(decided, facts))
    report = progress or (lambda what, done, total: None)
    with _staging(target) as staging:
        write_folder(staging, source.checkpoint, cut.pieces, max_shard=limit, progress=partial(report, "write"))
        cut.workshop.release()
        write_rest(staging, Checkpoint(folder), cut.config)
        _write_artefacts(staging, decided, plan_file, stats, artefacts or {})
        for name, path in (extra_files or {}).items():
            shutil.copyfile(path, staging / name)
        verify_folder(source, staging, decided, cut.pieces, known, trust_remote_code, partial(report, "verify"))
    loads = cut.readers or _loads(source, decided, cut.config)
    return Applied(target, written, source.checkpoint.nbytes, loads, cut.at_full_size, cut.notes)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Give a folder to write to that becomes the target in the end, or vanishes with whatever goes wrong."""
    with held(target) as staging:
        try:
            for left in staging.iterdir():  # by a killed run
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield staging
            os.replace(staging, target)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError):
                raise OutputError(f"{target}: cannot be written ({reason(error)})") from None
            if isinstance(error, UnderstudyError):  # people know the folder by the name that it would have had
                raise type(error)(str(error).replace(str(staging), str(target))) from None
            raise


def _loads(source: Skeleton, plan: Plan, config: dict[str, Any]) -> str:
    if "compression_config" not in config:
        return "stock transformers and vLLM"
    whole_layers = declared_absent(config) or declared_unrouted(config) or declared_modulated(config)
    if whole_layers or any(not known_to_engines(found) for found in (declared(config) or {}).values()):
        return "transformers after `import understudy`"
    changed = [layer for layer in source.layers if plan.layers.get(layer.key)]
    if any(vllm_refuses(layer, expert_tensors(source, layer)) for layer in changed):
        return "transformers after `import understudy`"
    return "transformers after `import understudy`, stock vLLM >= 0.33"


def _check_stats(plan: Plan, stats: Stats | None, facts: ModelFacts) -> None:
    needs = {
        kind: get_kind(kind).having(plan.how.get(kind, {})).needs for kinds in plan.layers.values() for kind in kinds
    }
    needed = [kind for kind, fields in needs.items() if fields]
    if stats is None and needed:
        raise StatsError(f"the plan has {', '.join(sorted(needed))}, made of statistics; give --stats")
    if stats is not None and stats.model.fingerprint != facts.fingerprint:
        raise StatsError(
            f"these statistics are of {stats.model.source} ({stats.model.fingerprint}), the model is {facts.source} "
            f"({facts.fingerprint}); calibrate this model"
        )
    for key, kinds in plan.layers.items():
        for kind, entry in kinds.items():
            if stats is None or not needs[kind]:
                continue
            require(stats, needs[kind], kind)
            for name in needs[kind]:
                value = np.asarray(getattr(stats.layers[key], name))
                rows = value[list(ids_of(entry))] if value.ndim else value
                if not np.isfinite(rows).all():
                    raise NumericError(f"layer {key}: the statistics hold NaN or infinity ({name}); calibrate again")


def _check_parent(plan: Plan, stats: Any) -> None:
    """Refuse statistics other than those that the plan was made from."""
    if plan.stats is None or not isinstance(stats, (str, os.PathLike)):
        return
    if (given := file_hash(stats)) != plan.stats:
        raise StatsError(
            f"the plan was made from statistics {plan.stats}, {os.fspath(stats)} is {given}; give those, or remove the "
            "line `stats:` from the plan to use others"
        )


def _write_artefacts(
    staging: Path,
    plan: Plan,
    plan_file: Path | None,
    stats: Any,
    more: dict[str, Path],
) -> None:
    """Keep the decision with the model: the plan as it was given, and what it came from."""
    folder = staging / "understudy"
    folder.mkdir()
    if plan_file is not None:
        shutil.copyfile(plan_file, folder / "plan.yaml")
    else:
        plan.save(folder / "plan.yaml")
    parents = {"plan": file_hash(folder / "plan.yaml")}
    if isinstance(stats, (str, os.PathLike)):
        parents["stats"] = file_hash(stats)
    note = {"format": 1, "understudy": __version__, "source": plan.model.source, "parents": parents}
    (folder / "provenance.json").write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, path in more.items():
        shutil.copyfile(path, folder / name)
