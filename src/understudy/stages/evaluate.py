"""Evaluate: what a model makes of held-out text and tasks, how large it is, and how far it is from its original."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from understudy._version import __version__
from understudy.activations import ActivationStore
from understudy.checkpoint import resolve
from understudy.comparison import Example
from understudy.data import Blocks, token_blocks
from understudy.errors import DataError, UnderstudyError
from understudy.examples import FILE as EXAMPLES
from understudy.examples import save_examples, worst_examples
from understudy.facts import parse_bytes
from understudy.harness import Harness
from understudy.metrics import Metrics
from understudy.quality import ALL, Quality, measure, vocabulary
from understudy.recipe import Evaluation, settings_from
from understudy.sizes import RouteCounter, count_params
from understudy.skeleton import Skeleton
from understudy.sources import BUNDLED
from understudy.tokens import load_tokenizer, longest_sequence, same_tokenizer_files
from understudy.walk import Walk

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Tasks = dict[str, dict[str, float | None]]  # value by task and metric

# settings without effect where no text is read, or no tasks are run
_TEXT_ONLY = ("samples", "seq_len", "seed", "activation_memory", "examples")
_TASKS_ONLY = ("include_path", "limit", "num_fewshot")


@dataclass(frozen=True)
class _Subject:
    """A model under evaluation."""

    given: str
    folder: Path
    skeleton: Skeleton
    routes: RouteCounter

    def facts(self) -> dict[str, str]:
        dtype = str(self.skeleton.dtype).removeprefix("torch.")
        return {"source": self.given, "fingerprint": self.skeleton.checkpoint.fingerprint, "dtype": dtype}


def evaluate(
    model: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    settings: Evaluation | None = None,
    **options: Any,
) -> Metrics:
    """Measure a model on text and tasks, alone or against the original that it comes from.

    Text is read with the tokenizer of the original, and both models are walked layer by layer; lm-eval tasks load the
    models whole, one after the other. Without data and tasks the bundled text is read; with tasks alone, none is.
    The active parameters of layers with stand-ins are measured on the text; without text they are what experts that
    are all equally likely would give. A local `model` gets the figures as `understudy/metrics.json`, too.

    Args:
        model: a local folder or a hub id.
        against: the original, likewise.
        progress: called with (what is going on, done, all).
        settings: every setting; or give them by name (`data`, `tasks`, `samples`, ... of `recipe.Evaluation`).

    Raises:
        UnderstudyError: bad models, data, tasks or settings; two models that do not read text alike.
    """
    chosen = settings_from(Evaluation, settings, options)
    _check_settings(chosen, compared=against is not None)
    report = progress or (lambda what, done, total: None)
    subject = _open(model, chosen)
    original = None if against is None else _open(against, chosen)
    if original is not None:
        _check_same_vocabulary(subject, original)
    reads_text = bool(chosen.data) or not chosen.tasks
    blocks = _blocks(subject, original, chosen) if reads_text else None
    harness = None
    if chosen.tasks:
        harness = Harness(chosen.tasks, chosen.include_path, {"pretrained": str(subject.folder.absolute())})
    quality = None if blocks is None else _read_text(subject, original, blocks, chosen, report)
    examples, failed = _examples(subject, original, blocks, quality, chosen, report)
    tasks = [
        _answer_tasks(harness, who, chosen, f"tasks {what}", report)
        for who, what in ((subject, "model"), (original, "original"))
    ]
    metrics = Metrics(
        **_figures(subject, quality, tasks[0]),
        against=None if original is None else _figures_of_original(original, quality, tasks[1]),
        provenance=_provenance(subject, original, chosen, blocks, harness),
        notes=(*_notes(chosen, blocks), *failed),
    )
    return _save(metrics, examples, Path(model), subject)


def _check_settings(settings: Evaluation, compared: bool) -> None:
    """Refuse a setting without effect: whoever gave it expects one."""
    idle: tuple[str, ...] = _TASKS_ONLY
    if settings.tasks:
        idle = () if settings.data else _TEXT_ONLY
    fields = Evaluation.model_fields
    for name in (*idle, *(() if compared else ("examples",))):
        if getattr(settings, name) != fields[name].default:
            needed = "--data" if name in _TEXT_ONLY and name in idle else "--tasks" if name in idle else "--against"
            raise UnderstudyError(f"--{name.replace('_', '-')} has no effect without {needed}; leave it out")


def _open(model: str | os.PathLike[str], settings: Evaluation) -> _Subject:
    folder = resolve(model)
    skeleton = Skeleton(
        folder, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )
    return _Subject(os.fspath(model), folder, skeleton, RouteCounter(skeleton))


def _check_same_vocabulary(subject: _Subject, original: _Subject) -> None:
    mine, theirs = vocabulary(subject.skeleton), vocabulary(original.skeleton)
    if mine != theirs:
        raise DataError(
            f"{subject.folder} chooses among {mine} tokens and {original.folder} among {theirs}: give as --against the "
            "model that the first was made from"
        )


def _blocks(subject: _Subject, original: _Subject | None, settings: Evaluation) -> Blocks:
    """Cut the text into blocks, with the tokenizer of the original where there is one; the model's must agree."""
    for who in (subject, original):
        if who is not None and settings.seq_len > (limit := longest_sequence(who.skeleton.config)):
            raise DataError(f"--seq-len {settings.seq_len} is more than the {limit} positions of {who.folder}")
    reader = original or subject
    blocks = _tokenised(reader, settings)
    differ = original is not None and not same_tokenizer_files(subject.folder, original.folder)
    # files may differ by no more than who wrote them, so what counts is what they make of this text
    if differ and _tokenised(subject, settings).digest != blocks.digest:
        raise DataError(
            f"the tokenizers of {subject.folder} and {reader.folder} give different ids for the same text; give as "
            "--against the model that the first was made from"
        )
    if ALL in blocks.names:
        raise DataError(f"a source of text is named {ALL!r}, which stands for the total; rename its file or folder")
    if blocks.ids.max() >= (ids := vocabulary(reader.skeleton)):
        raise DataError(f"{reader.folder}: its tokenizer gives ids past its vocabulary of {ids}")
    return blocks


def _tokenised(who: _Subject, settings: Evaluation) -> Blocks:
    return token_blocks(
        settings.data,
        load_tokenizer(who.folder, settings.trust_remote_code),
        seq_len=settings.seq_len,
        samples=settings.samples,
        seed=settings.seed,
    )


def _read_text(
    subject: _Subject, original: _Subject | None, blocks: Blocks, settings: Evaluation, report: Progress
) -> Quality:
    both = [who for who in (subject, original) if who is not None]
    # each holds the outputs of its last layer until the end, so they share what may be held in memory
    limit = parse_bytes(settings.activation_memory) // len(both)
    stores = [ActivationStore(limit, device=who.skeleton.device) for who in both]
    walks = [Walk(w.skeleton, blocks.ids, settings.batch_size, s) for w, s in zip(both, stores, strict=True)]
    return measure([(walk, who.routes.observe) for walk, who in zip(walks, both, strict=True)], blocks, report)


def _examples(
    subject: _Subject,
    original: _Subject | None,
    blocks: Blocks | None,
    quality: Quality | None,
    settings: Evaluation,
    report: Progress,
) -> tuple[list[Example], tuple[str, ...]]:
    """Let both models go on with the blocks on which they differ most; where they cannot, a note says why."""
    if original is None or blocks is None or quality is None or quality.kl_by_block is None or not settings.examples:
        return [], ()
    report("examples", 0, 1)
    tokenizer = load_tokenizer(original.folder, settings.trust_remote_code)
    try:
        found = worst_examples(
            subject.skeleton, original.skeleton, blocks, quality.kl_by_block, tokenizer, count=settings.examples
        )
    except UnderstudyError as error:
        return [], (f"no examples were generated: {error}",)
    report("examples", 1, 1)
    return found, ()


def _answer_tasks(
    harness: Harness | None, who: _Subject | None, settings: Evaluation, what: str, report: Progress
) -> Tasks:
    if harness is None or who is None:
        return {}
    report(what, 0, 1)
    dtype = settings.dtype if settings.dtype == "auto" else who.facts()["dtype"]
    found = harness.run(
        who.folder,
        dtype=dtype,
        device=str(who.skeleton.device),
        batch_size=settings.batch_size,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        trust_remote_code=settings.trust_remote_code,
    )
    report(what, 1, 1)
    return found


def _figures(subject: _Subject, quality: Quality | None, tasks: Tasks) -> dict[str, Any]:
    kl, top1 = (quality.kl, quality.top1) if quality else (None, None)
    return {
        "perplexity": quality.perplexity if quality else {},
        "kl": kl[ALL] if kl else None,
        "kl_by_source": kl,
        "top1_agreement": top1[ALL] if top1 else None,
        "top1_by_source": top1,
        "bytes": subject.skeleton.checkpoint.nbytes,
        "params": count_params(subject.skeleton, subject.routes.means()),
        "tasks": tasks,
    }


def _figures_of_original(original: _Subject, quality: Quality | None, tasks: Tasks) -> dict[str, Any]:
    return {
        "perplexity": (quality.original_perplexity if quality else None) or {},
        "bytes": original.skeleton.checkpoint.nbytes,
        "params": count_params(original.skeleton, original.routes.means()),
        "tasks": tasks,
    }


def _provenance(
    subject: _Subject,
    original: _Subject | None,
    settings: Evaluation,
    blocks: Blocks | None,
    harness: Harness | None,
) -> dict[str, Any]:
    """What the figures depend on; no times and no machine, so that equal runs leave equal files."""
    found: dict[str, Any] = {
        "understudy": __version__,
        "model": subject.facts(),
        "against": original.facts() if original else None,
        "batch_size": settings.batch_size,
        "data": None,
        "tasks": None,
    }
    if blocks is not None:
        drawn = {name: int((blocks.source == i).sum()) for i, name in enumerate(blocks.names)}
        specs = list(settings.data) or [BUNDLED]
        data = {"specs": specs, "blocks": drawn, "seq_len": settings.seq_len, "seed": settings.seed}
        found["data"] = {**data, "digest": blocks.digest}
    if harness is not None:
        few = {"limit": settings.limit, "num_fewshot": settings.num_fewshot}
        found["tasks"] = {"names": harness.names, "lm_eval": harness.version, **few}
    return found


def _notes(settings: Evaluation, blocks: Blocks | None) -> tuple[str, ...]:
    notes = list(blocks.notes) if blocks else []
    if blocks and not settings.data:
        notes.append("the text is the bundled one, which calibrate reads by default, too; name other text with --data")
    if settings.limit is not None:
        notes.append(f"of each task only the first {settings.limit} items were run")
    return tuple(notes)


def _save(metrics: Metrics, examples: list[Example], given: Path, subject: _Subject) -> Metrics:
    """Write metrics and examples into a local model folder; where that cannot be, a note says so."""
    note = f"{subject.given} is no local folder, so no metrics.json was written"
    if given.expanduser() == subject.folder:
        try:
            target = metrics.save(subject.folder / "understudy" / "metrics.json")
            target.with_name(EXAMPLES).unlink(missing_ok=True)  # of an earlier evaluation, on other text perhaps
            if examples:
                save_examples(examples, target.with_name(EXAMPLES), metrics.provenance)
            return metrics
        except OSError as error:
            note = f"metrics.json was not written into {subject.folder} ({error.strerror})"
    logger.warning("%s", note)
    return replace(metrics, notes=(*metrics.notes, note))
