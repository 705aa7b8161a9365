"""Recover: train a compressed model, or what stands in for its experts, and write what comes out."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy._version import __version__
from understudy.checkpoint import resolve
from understudy.data import Blocks
from understudy.errors import OutputError, UnderstudyError, reason
from understudy.facts import parse_bytes
from understudy.held import free_target, held, work_folder
from understudy.methods import all_methods
from understudy.plans import Plan, load_plan
from understudy.processes import Processes, join_processes
from understudy.recipe import Recovery, settings_from
from understudy.recovery import Recovered, layers_said, objective, said, write_file, write_recovered
from understudy.runtime import pick_device
from understudy.shards import MAX_SHARD
from understudy.skeleton import Skeleton
from understudy.tokens import load_tokenizer, longest_sequence
from understudy.training import trainable
from understudy.training.fading import Fade
from understudy.training.lessons import lessons_for
from understudy.training.whole import check_original, keep_originals, load_whole

if TYPE_CHECKING:
    from understudy.training.loop import Run
    from understudy.training.teacher import Teacher

Progress = Callable[[str, int, int], None]
_FADED = (0.2,)  # of the paper's grid one of the two that were usually best


def recover(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    settings: Recovery | None = None,
    materialise: bool = False,
    max_shard_size: str | None = None,
    blocks: Blocks | None = None,
    **options: Any,
) -> Recovered | None:
    """Train a model and write it to `out`, in the layout and the dtypes that it had.

    Checkpoints are kept in a work folder beside `out` until the end: a call that was interrupted goes on from there.
    Several processes, as `accelerate launch` starts them, share the work.

    Args:
        model: a compressed folder, or any model of the family; it is only read.
        out: the new folder; it appears when it is complete and verified, never before.
        teacher: the original model, for distillation and for stand-ins that begin as the experts that they replace.
        progress: called with (what is going on, done, all).
        settings: every setting; or give them by name (`train`, `steps`, `lr`, ... of `recipe.Recovery`).
        materialise: write every expert at full size, so that the folder is an ordinary checkpoint that loads anywhere
            and saves no memory.
        max_shard_size: size of a shard file, as `5GB`.
        blocks: text to train on in the place of `train`, drawn already.

    Returns:
        What was written; None in every process but the first, where there are several.

    Raises:
        UnderstudyError: bad model, teacher, data or settings; what can be known to fail fails before any training.
        NumericError: the loss is not finite; the last good checkpoint stays in the work folder.
    """
    max_shard = parse_bytes(max_shard_size) if max_shard_size else MAX_SHARD
    report = progress or (lambda what, done, total: None)
    job = _Job(model, out, teacher, settings_from(Recovery, settings, options), report, blocks)
    if materialise:
        job.check_ordinary()
    with held(job.target) if job.processes.rank == 0 else nullcontext():
        runs = job.train()
        result = job.write(runs, materialise, max_shard) if job.processes.rank == 0 else None
    job.processes.wait()
    return result


class _Job:
    """One call of `recover`: what it was told, opened and checked."""

    def __init__(
        self, model: str | os.PathLike[str], out: str | os.PathLike[str], teacher: str | os.PathLike[str] | None,
        settings: Recovery, report: Progress, blocks: Blocks | None,
    ) -> None:  # fmt: skip
        if not settings.train and blocks is None:
            raise UnderstudyError("give text to train on with --train")
        self.settings, self.report, self.target = settings, report, free_target(out)
        self.folder = resolve(model)
        if self.target.absolute().is_relative_to(self.folder.absolute()):
            raise OutputError(f"{self.target} lies inside {self.folder}, which is only read; choose another --out")
        self.processes: Processes = join_processes(pick_device(settings.device))
        self.student = self._open(self.folder)
        self.plan = _plan_of(self.folder)
        gone = [key for key, kinds in self.plan.layers.items() if "condense" in kinds] if self.plan else []
        self.condensed = trainable.condensed_blocks(self.student.model, self.student.layers, gone)
        if settings.loss != "repair" and settings.rounds != Recovery.model_fields["rounds"].default:
            raise UnderstudyError("--rounds has no effect without --loss repair; leave it out")
        self.layerwise = settings.loss in ("layers", "repair")
        usual = trainable.usual(self.student.model, self.student.layers, self.condensed)
        self.what = trainable.in_layers(settings, usual) if self.layerwise else settings.train_what or usual
        if self.layerwise and self.processes.world > 1:
            raise UnderstudyError(
                f"--loss {settings.loss} runs in one process; start it without accelerate launch or torchrun"
            )
        self.rank = settings.rank or trainable.usual_rank(self.student.model, self.student.layers)
        self.end_ratios = self._end_ratios()
        self.fades = [Fade(r, settings.steps, settings.schedule) for r in self.end_ratios]
        self.distils = settings.loss != "lm"
        self.teacher = None if teacher is None else self._open_teacher(teacher)
        self._check_outline()
        if settings.seq_len > (limit := longest_sequence(self.student.config)):
            raise UnderstudyError(f"--seq-len {settings.seq_len} is more than the {limit} positions of {self.folder}")
        tokenizer = load_tokenizer(self.folder, settings.trust_remote_code) if blocks is None else None
        self.train_part, self.held_part = lessons_for(settings, tokenizer, blocks)
        self.work = work_folder(self.target) / self._key()

    def _open(self, folder: Path, device: str = "cpu") -> Skeleton:
        s = self.settings
        return Skeleton(folder, dtype=s.dtype, device=device, trust_remote_code=s.trust_remote_code)

    def _end_ratios(self) -> tuple[float, ...]:
        """What was asked for, else the method's own; without bases there is nothing to fade into."""
        if self.layerwise:
            return (0.0,)
        modules: list[Any] = [self.student.model.get_submodule(layer.name) for layer in self.student.layers]
        bases = [m.bases for m in modules if getattr(m, "bases", None) is not None and m.bases.dominants]
        given = self.settings.end_ratio
        near = self.plan is not None and self.plan.how.get("shared_base", {}).get("start") == "residual"
        if near or not bases:
            if any(given) or (given and not bases):
                why = "what shares bases starts near its originals" if bases else "no experts share bases to fade into"
                raise UnderstudyError(f"{self.folder}: --end-ratio has no effect: {why}")
            return (0.0,)
        method = all_methods().get(self.plan.method) if self.plan else None
        return tuple(dict.fromkeys(given)) or (_FADED if method is None or method.fades else (0.0,))

    def _open_teacher(self, teacher: str | os.PathLike[str]) -> Skeleton:
        if not self.distils and not any(self.end_ratios):
            raise UnderstudyError("--teacher has no effect: nothing distils and no originals fade out; leave it out")
        skeleton = self._open(resolve(teacher))
        if skeleton.has_stand_ins:
            raise UnderstudyError(f"{teacher} holds stand-ins itself; give as --teacher the original model")
        if self.layerwise or any(self.end_ratios):
            check_original(skeleton, self.student, self.plan, fewer=self.layerwise)
        return skeleton

    def _check_outline(self) -> None:
        """Find out on the meta device what cannot be trained."""
        s = self.settings
        if self.teacher is None and (self.distils or any(self.end_ratios)):
            why = f"--loss {s.loss} distils from it"
            if any(self.end_ratios):
                why = f"the originals fade out over {max(self.end_ratios):g} of the steps (--end-ratio)"
            raise UnderstudyError(f"give the original model with --teacher: {why}")
        outline = self._open(self.folder)
        trainable.prepare(outline.model, outline.layers, self.what, self.rank, s.seed, self.condensed)
        if s.weight_decay and trainable.masked_rows(outline.model):
            raise UnderstudyError("--weight-decay would shrink experts that are not trained; leave it out")
        named = dict(outline.model.named_parameters())
        self.names = trainable.trained(outline.model)
        self.trained = sum(named[name].numel() for name in self.names)

    def _key(self) -> str:
        """Hash everything that the weights depend on, so that only the same run is ever continued."""
        told = self.settings.model_dump(exclude={"save_every", "end_ratio", "device"})
        models = [s.checkpoint.fingerprint for s in (self.student, self.teacher) if s is not None]
        texts = [self.train_part.digest, self.held_part.digest]
        identity = json.dumps([__version__, models, texts, told, self.what, self.rank, self.processes.world])
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def train(self) -> list[Run]:
        """Make one run for each end ratio, those that an interrupted call left undone."""
        from understudy.training.loop import Run

        if self.processes.rank == 0:
            for other in work_folder(self.target).iterdir():  # of other settings
                if other != self.work:
                    shutil.rmtree(other, ignore_errors=True)
        runs = []
        with self._asking() as answers:
            for fade in self.fades:
                folder = self.work / f"end-{fade.end_ratio:g}"
                done = folder / "run.json"
                if not self.processes.minimum(done.exists()):
                    run = self._run(fade, answers, folder)
                    if self.processes.rank == 0:
                        write_file(done, json.dumps(asdict(run)))
                    self.processes.wait()
                runs.append(Run(**json.loads(done.read_text(encoding="utf-8"))))
        return runs

    def _asking(self) -> AbstractContextManager[Teacher | None]:
        if not self.distils or self.layerwise or self.teacher is None:
            return nullcontext(None)
        from understudy.training.teacher import open_teacher

        device, s = str(pick_device(self.settings.device)), self.settings
        teacher = Skeleton(self.teacher.checkpoint.folder, device=device, trust_remote_code=s.trust_remote_code)
        # weights, and gradients and two moments of what is trained, in four bytes each
        beside = 4 * sum(e.numel for e in self.student.checkpoint.entries.values()) + 12 * self.trained
        return open_teacher(
            teacher, (self.train_part, self.held_part), beside_bytes=beside, work=self.work, processes=self.processes,
            progress=self.report,
        )  # fmt: skip

    def _run(self, fade: Fade, answers: Teacher | None, folder: Path) -> Run:
        from understudy.training.checkpoints import save_trained

        run, state = self._layer_by_layer(folder) if self.layerwise else self._together(fade, answers, folder)
        if self.processes.rank == 0:
            try:
                save_trained(state, folder)
            except OSError as error:
                raise OutputError(f"{folder}: cannot be written ({reason(error)})") from None
        gc.collect()
        return run

    def _together(self, fade: Fade, answers: Teacher | None, folder: Path) -> tuple[Run, dict[str, Any]]:
        """Train the model whole in memory, and return what was trained."""
        from understudy.training.loop import train
        from understudy.training.sharded import trained

        s = self.settings
        model = load_whole(self.student)
        trainable.prepare(model, self.student.layers, self.what, self.rank, s.seed, self.condensed)
        if fade.end_ratio and self.teacher is not None:
            keep_originals(model, self.student, self.teacher)
        fades = any(self.end_ratios)
        run = train(
            model,
            s,
            self.train_part,
            self.held_part,
            fade=fade if fades else None,
            teacher=answers,
            folder=folder,
            progress=partial(self.report, f"train (end ratio {fade.end_ratio:g})" if fades else "train"),
        )
        return run, trained(model) if self.processes.rank == 0 else {}

    def _layer_by_layer(self, folder: Path) -> tuple[Run, dict[str, Any]]:
        """Train one layer in memory at a time, and return what was trained."""
        from understudy.layerwise.train import What, train_layers

        assert self.teacher is not None
        device = str(pick_device(self.settings.device))
        student, teacher = (self._open(x.checkpoint.folder, device) for x in (self.student, self.teacher))
        what = What(self.what, self.rank, self.condensed, self.names)
        text = self.train_part, self.held_part
        return train_layers(student, teacher, text, self.settings, what, folder, self.report)

    def write(self, runs: Sequence[Run], materialise: bool, max_shard: int) -> Recovered:
        """Write the best run's model, verify it, and let it appear."""
        from safetensors.torch import load_file

        from understudy.training.checkpoints import WEIGHTS

        s, best = self.settings, min(range(len(runs)), key=lambda n: objective(runs[n], self.settings.loss))
        state = load_file(self.work / f"end-{runs[best].end_ratio:g}" / WEIGHTS)
        nbytes = write_recovered(
            self.folder,
            state,
            self._facts(runs, best) | {"materialised": materialise},
            work=self.work,
            target=self.target,
            trust_remote_code=s.trust_remote_code,
            report=self.report,
            max_shard=max_shard,
        )
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):
            self.work.parent.rmdir()
        notes = [*self.train_part.notes, *said(runs, best), *layers_said(runs[best])]
        if materialise:
            notes.append("nothing is saved: every expert was written at full size (--materialise)")
        figures = tuple(asdict(run) for run in runs)
        return Recovered(self.target, nbytes, self.what, self.trained, figures, best, tuple(notes))

    def check_ordinary(self) -> None:
        """Refuse stand-ins that cannot be written at full size."""
        from understudy.full_size import ordinary

        ordinary(self._open(self.folder))

    def _facts(self, runs: Sequence[Run], best: int) -> dict[str, Any]:
        """Say what the model came from and how it was trained."""
        return {
            "format": 1,
            "understudy": __version__,
            "model": {"folder": self.folder.name, "fingerprint": self.student.checkpoint.fingerprint},
            "teacher": self.teacher and {"fingerprint": self.teacher.checkpoint.fingerprint},
            "settings": self.settings.model_dump(),
            "train_what": self.what,
            "rank": self.rank,
            "trained": self.trained,
            "sequences": {"trained": len(self.train_part), "held_out": len(self.held_part)},
            "digests": {"trained": self.train_part.digest, "held_out": self.held_part.digest},
            "runs": [asdict(run) for run in runs],
            "chosen": best,
        }


def _plan_of(folder: Path) -> Plan | None:
    """Return the plan that a folder was made by, where it is there."""
    path = folder / "understudy" / "plan.yaml"
    return load_plan(path) if path.is_file() else None
