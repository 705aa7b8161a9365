"""Calibrate: one streamed pass over text that collects every statistic of every expert."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from understudy._version import __version__
from understudy.checkpoint import Checkpoint, resolve
from understudy.collection import Progress, collect, collect_weights
from understudy.collectors.base import open_base
from understudy.data import Blocks, token_blocks
from understudy.errors import DataError, NumericError, OutputError, StatsError, UnderstudyError, reason
from understudy.facts import ModelFacts
from understudy.held import held, work_folder
from understudy.layout import model_facts
from understudy.processes import Processes, join_processes
from understudy.recipe import Calibration, settings_from
from understudy.runtime import pick_device
from understudy.sequential import Sequential, with_needs
from understudy.skeleton import Skeleton
from understudy.standins import main_k_of
from understudy.stats import Stats, load_stats
from understudy.tokens import load_tokenizer, longest_sequence

logger = logging.getLogger(__name__)


def calibrate(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    settings: Calibration | None = None,
    blocks: Blocks | None = None,
    **options: Any,
) -> Stats:
    """Run text through a model, layer by layer, and write the statistics of its experts to `out`.

    Args:
        model: a local folder or a hub id.
        out: the statistics file; a work folder beside it holds finished layers until the end, and a later call with the
            same model, data and settings goes on from there.
        progress: called with (finished layers, all layers).
        settings: every setting; or give them by name (`data`, `samples`, `seq_len`, ... of `recipe.Calibration`). With
            `weights_only` no text is read, and only what the weights themselves say is written.
        blocks: what these settings draw, where that is known already; large text takes long to tokenise.

    Raises:
        UnderstudyError: bad model, data or settings, or an output that exists already.
    """
    chosen = _checked(settings_from(Calibration, settings, options))
    target = Path(out)
    if target.exists():
        raise OutputError(f"{target} exists already; choose another --out or remove it")
    processes = join_processes(pick_device(chosen.device))
    folder = resolve(model)
    skeleton = Skeleton(
        folder,
        dtype=chosen.dtype,
        device=chosen.device,
        experts=chosen.experts,
        trust_remote_code=chosen.trust_remote_code,
    )
    if skeleton.has_stand_ins:
        raise StatsError(f"{folder} holds stand-ins already; calibrate the original model")
    facts = model_facts(skeleton, str(model))
    if "modulation" in chosen.collect and (several := [x.top_k for x in skeleton.layers if x.top_k > 1]):
        main_k_of(chosen.main_k, several)  # before any text is run
    base = open_base(skeleton, chosen.base) if chosen.base else None
    if chosen.weights_only:
        found = _of_weights(skeleton, facts, chosen, base, progress)  # every process reads them all
        if processes.rank == 0:
            with held(target):
                found.save(target)
        processes.wait()
        return found
    remake = Sequential(facts, chosen) if chosen.sequential else None
    blocks = blocks or _blocks(skeleton, folder, chosen)
    with held(target) if processes.rank == 0 else nullcontext():
        work = work_folder(target) / _run_key(skeleton, blocks, chosen, base, processes)
        finished = work / "stats.safetensors"
        stats = None
        if not processes.minimum(finished.exists()):  # else a run was killed while it tidied up
            _only(work, work.parent)
            try:
                layers, probes = collect(skeleton, facts, blocks, chosen, work, progress, processes, base, remake)
            except NumericError:  # going on from there would end there again
                _tidy(work)
                raise
            stats = Stats(facts, _data_facts(blocks, chosen), layers, probes)
        if processes.rank == 0:
            if stats is not None:
                stats.save(finished)
            _publish(finished, target)
    processes.wait()
    if processes.rank:
        _tidy(work)  # where the processes do not share a disk
    stats = load_stats(target) if target.exists() or stats is None else stats
    if processes.rank == 0:
        _report_unseen(stats)
    return stats


def _checked(settings: Calibration) -> Calibration:
    """Refuse settings that would have no effect."""
    if settings.weights_only and (unused := [x for x in ("data", "collect", "sequential") if getattr(settings, x)]):
        raise UnderstudyError(f"--weights-only reads no text; leave out --{unused[0]}")
    for name in ("main_k", "vectors", "renormalise"):
        if "modulation" not in settings.collect and getattr(settings, name) != Calibration.model_fields[name].default:
            flag = name.replace("_", "-")
            raise UnderstudyError(f"--{flag} has no effect without --collect modulation; add that, or leave it out")
    if settings.gradient_samples and "gradients" not in settings.collect:
        raise UnderstudyError("--gradient-samples has no effect without --collect gradients; add that, or leave it out")
    if settings.vectors not in (1, 3):
        raise UnderstudyError(f"--vectors {settings.vectors}: an expert has 1 vector or 3; give one of these")
    return with_needs(settings)


def _of_weights(
    skeleton: Skeleton, facts: ModelFacts, settings: Calibration, base: Checkpoint | None, progress: Progress | None
) -> Stats:
    layers = collect_weights(skeleton, settings, progress, base)
    return Stats(facts, _data_facts(None, settings) | {"weights_only": True}, layers)


def _blocks(skeleton: Skeleton, folder: Path, settings: Calibration) -> Blocks:
    """Tokenise and draw the text, as far as the model can take it."""
    limit = longest_sequence(skeleton.config)
    if settings.seq_len > limit:
        raise DataError(f"--seq-len {settings.seq_len} is more than the {limit} positions of {folder}")
    blocks = token_blocks(
        settings.data,
        load_tokenizer(folder, settings.trust_remote_code),
        seq_len=settings.seq_len,
        samples=settings.samples,
        seed=settings.seed,
    )
    if blocks.ids.max() >= (vocabulary := skeleton.model.get_input_embeddings().weight.shape[0]):
        raise DataError(f"{folder}: its tokenizer gives ids past its vocabulary of {vocabulary}")
    return blocks


def _run_key(
    skeleton: Skeleton, blocks: Blocks, settings: Calibration, base: Checkpoint | None, processes: Processes
) -> str:
    """Hash everything that the sums depend on, so that only the same run is ever continued."""
    parts = [__version__, skeleton.checkpoint.fingerprint, blocks.digest, str(skeleton.dtype), str(skeleton.device)]
    groups = [sorted(settings.collect), settings.dense_tokens, base and base.fingerprint]
    groups += [settings.sequential, settings.sequential_ratio, settings.gradient_samples]
    groups += [settings.main_k, settings.vectors, settings.renormalise, settings.fit_tokens]
    identity = json.dumps([*parts, *groups, settings.experts, settings.batch_size, processes.world])
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _only(kept: Path, folder: Path) -> None:
    """Remove all else from a folder: what runs with other settings left there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)


def _publish(finished: Path, target: Path) -> None:
    """Make the statistics appear as the last act: whenever a run is killed, they are there or the work folder is."""
    _only(finished, finished.parent)
    try:
        os.replace(finished, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({reason(error)})") from None
    _tidy(finished.parent)


def _tidy(folder: Path) -> None:
    """Remove a folder in the work folder, and the work folder with the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _data_facts(blocks: Blocks | None, settings: Calibration) -> dict[str, Any]:
    """Say what the sums are of; of no text where there is none."""
    named = enumerate(blocks.names) if blocks else ()
    return {
        "specs": list(settings.data),
        "blocks": {name: int((blocks.source == i).sum()) for i, name in named if blocks},
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "digest": blocks.digest if blocks else "",
        "collect": sorted(settings.collect),
        "gradient_samples": settings.gradient_samples,
        "base": settings.base,
        "sequential": settings.sequential and f"{settings.sequential} at {settings.sequential_ratio:g}",
        "notes": list(blocks.notes) if blocks else [],
    }


def _report_unseen(stats: Stats) -> None:
    unseen = {key: int((layer.count == 0).sum()) for key, layer in stats.layers.items()}
    if total := sum(unseen.values()):
        worst = max(unseen, key=lambda key: unseen[key])
        logger.warning(
            "%d of %d experts saw no token (most in layer %s: %d); their scores are 0 and a constant in their place "
            "would be the zero vector; give more or other text to reach them",
            total,
            stats.model.experts,
            worst,
            unseen[worst],
        )
