"""Evaluate: what a model makes of held-out text and tasks, how large it is, and how far it is from its original."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy._version import __version__
from understudy.activations import ActivationStore
from understudy.checkpoint import resolve
from understudy.data import BUNDLED, Blocks, token_blocks
from understudy.errors import DataError, UnderstudyError
from understudy.facts import parse_bytes
from understudy.harness import Harness
from understudy.quality import ALL, Quality, measure, vocabulary
from understudy.recipe import Evaluation, settings_from
from understudy.sizes import RouteCounter, count_params
from understudy.skeleton import Skeleton
from understudy.tokens import load_tokenizer, longest_sequence, same_tokenizer_files
from understudy.walk import Walk

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]

FORMAT = 1
_TEXT_ONLY = ("samples", "seq_len", "seed", "activation_memory")  # settings without effect where no text is read
_TASKS_ONLY = ("include_path", "limit", "num_fewshot")


@dataclass(frozen=True)
class Metrics:
    """Figures of one model; those by source of text have the total of all sources under "all".

    Attributes:
        perplexity: exponential of the mean negative log-likelihood, in nats a predicted token; empty without text.
        kl: mean KL(original || model) in nats a predicted token; None without an original or text, as those below.
        kl_by_source: the same for each source.
        top1_agreement: share of predicted positions at which both models find the same token most likely.
        top1_by_source: the same for each source.
        bytes: of all tensors of the checkpoint.
        params: `total`, `routed` (in routed experts and their stand-ins), `active` (that a token passes through).
        tasks: lm-eval's results by task and metric.
        against: perplexity, bytes, params and tasks of the original, None without one.
        provenance: what was evaluated, on what, with which settings.
        notes: what a reader of the figures should know, a sentence each.
    """

    perplexity: dict[str, float]
    kl: float | None
    kl_by_source: dict[str, float] | None
    top1_agreement: float | None
    top1_by_source: dict[str, float] | None
    bytes: int
    params: dict[str, int]
    tasks: dict[str, dict[str, float | None]]
    against: dict[str, Any] | None
    provenance: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `--json` prints it and `metrics.json` holds it."""
        return {"format": FORMAT, **asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class _Subject:
    """A model under evaluation."""

    given: str
    folder: Path
    skeleton: Skeleton

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
    _check_settings(chosen)
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
    counter = RouteCounter(subject.skeleton)
    quality = None if blocks is None else _read_text(subject, original, blocks, chosen, counter, report)
    tasks = [
        _answer_tasks(harness, who, chosen, f"tasks {what}", report)
        for who, what in ((subject, "model"), (original, "original"))
    ]
    metrics = _gather(subject, original, quality, counter, tasks, chosen, blocks, harness)
    return _save(metrics, Path(model), subject)


def _check_settings(settings: Evaluation) -> None:
    """Refuse a setting without effect: whoever gave it expects one."""
    idle = _TEXT_ONLY if settings.tasks and not settings.data else ()
    idle += () if settings.tasks else _TASKS_ONLY
    fields = Evaluation.model_fields
    for name in idle:
        if getattr(settings, name) != fields[name].default:
            needed = "--data" if name in _TEXT_ONLY else "--tasks"
            raise UnderstudyError(f"--{name.replace('_', '-')} has no effect without {needed}; leave it out")


def _open(model: str | os.PathLike[str], settings: Evaluation) -> _Subject:
    folder = resolve(model)
    skeleton = Skeleton(
        folder, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )
    return _Subject(os.fspath(model), folder, skeleton)


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
    if original is not None and not same_tokenizer_files(subject.folder, original.folder):
        # files may differ by no more than who wrote them, so what counts is what they make of this text
        if _tokenised(subject, settings).digest != blocks.digest:
            raise DataError(
                f"the tokenizers of {subject.folder} and {original.folder} give different ids for the same text; give "
                "as --against the model that the first was made from"
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
    subject: _Subject,
    original: _Subject | None,
    blocks: Blocks,
    settings: Evaluation,
    counter: RouteCounter,
    report: Progress,
) -> Quality:
    # both hold the outputs of their last layer until the end, so they share what may be held in memory
    limit = parse_bytes(settings.activation_memory) // (1 if original is None else 2)

    def walk(who: _Subject) -> Walk:
        store = ActivationStore(limit, device=who.skeleton.device)
        return Walk(who.skeleton, blocks.ids, settings.batch_size, store)

    other = None if original is None else walk(original)
    return measure(walk(subject), other, blocks, observe=counter.observe, progress=report)


def _answer_tasks(
    harness: Harness | None, who: _Subject | None, settings: Evaluation, what: str, report: Progress
) -> dict[str, dict[str, float | None]]:
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


def _gather(
    subject: _Subject,
    original: _Subject | None,
    quality: Quality | None,
    counter: RouteCounter,
    tasks: list[dict[str, dict[str, float | None]]],
    settings: Evaluation,
    blocks: Blocks | None,
    harness: Harness | None,
) -> Metrics:
    compared = None
    if original is not None:
        compared = {
            "perplexity": (quality.original_perplexity if quality else None) or {},
            "bytes": original.skeleton.checkpoint.nbytes,
            "params": count_params(original.skeleton, {}),
            "tasks": tasks[1],
        }
    kl, top1 = (quality.kl, quality.top1) if quality else (None, None)
    return Metrics(
        perplexity=quality.perplexity if quality else {},
        kl=kl[ALL] if kl else None,
        kl_by_source=kl,
        top1_agreement=top1[ALL] if top1 else None,
        top1_by_source=top1,
        bytes=subject.skeleton.checkpoint.nbytes,
        params=count_params(subject.skeleton, counter.routes()),
        tasks=tasks[0],
        against=compared,
        provenance=_provenance(subject, original, settings, blocks, harness),
        notes=_notes(settings, blocks),
    )
