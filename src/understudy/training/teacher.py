"""The teacher of a distillation: the uncompressed model whole in memory, or its last hidden states kept on disk.

Where teacher and student do not fit together, the teacher is walked once, layer by layer, over all sequences that
training will see. What its last layer puts out is kept, two bytes times the hidden size a token instead of as many
logits as there are tokens, and its own norm and head make the logits when they are asked for.

Sequences run through the walk without a mask of their padding: they are padded on the right and every token looks back
only, so nothing but the padding itself is affected, and nobody looks at that.

Letters: N sequences, B sequences of a batch, S tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from understudy.errors import NumericError
from understudy.examples import free_memory
from understudy.facts import format_bytes
from understudy.processes import Processes
from understudy.quality import vocabulary
from understudy.skeleton import ROOT, Skeleton
from understudy.speed import whole
from understudy.training.hidden import HiddenStates, Progress, digest
from understudy.walk import Walk

if TYPE_CHECKING:
    from understudy.training.lessons import Lessons

logger = logging.getLogger(__name__)

_ROOM = 1.1  # times its weights is what a teacher takes while it answers


class Teacher(Protocol):
    """A model that says what it would predict."""

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits `[B, S, V]` in the teacher's dtype, without gradient; what is at padding means nothing.

        `batch` holds `input_ids` and `attention_mask`, `[B, S]`; the result is on their device.
        """
        ...


@contextmanager
def open_teacher(
    skeleton: Skeleton,
    lessons: Sequence[Lessons],
    *,
    beside_bytes: int,
    work: Path,
    processes: Processes | None = None,
    progress: Progress | None = None,
    streamed: bool | None = None,
    indices: Sequence[Sequence[int] | None] | None = None,
) -> Iterator[Teacher]:
    """Open a teacher: whole in memory where it fits there beside the training, else with its work done beforehand.

    All processes of a run call this together.

    Args:
        skeleton: the teacher, on the device and in the dtype that it is to run in.
        lessons: every text that it will be asked about, all of the same length: training part, held-out part.
        beside_bytes: what a process needs on that device besides the teacher.
        work: where its hidden states are kept, on a disk that all processes share. A later call with the same teacher
            and text uses them again, one with others removes them; the caller removes the last.
        processes: this process among those of the run; each walks a share of the sequences.
        progress: called with ("walk teacher", layers done, layers).
        streamed: whether to keep hidden states on disk; by default where memory is too small.
        indices: the sequences of each of `lessons` that will be asked about; None = all. Others cannot be asked about
            when streamed.

    Raises:
        UnsupportedModelError: the teacher predicts something else than tokens, or cannot be walked.
        OutputError: not enough room on the disk, or it cannot be written.
        NumericError: NaN or infinity in what the teacher computes.
    """
    processes, report = processes or Processes(), progress or (lambda what, done, total: None)
    vocabulary(skeleton)
    if streamed is None:
        streamed = not _fits(skeleton, beside_bytes, processes)
    if not streamed:
        with whole(skeleton):
            yield Resident(skeleton)
        return
    ids_NS = _sequences(lessons, indices or [None] * len(lessons))
    hidden = HiddenStates(skeleton, ids_NS, work, processes)
    hidden.provide(report)
    with skeleton.resident(ROOT):
        yield Streamed(skeleton, hidden)


class Resident:
    """A teacher that is whole in memory."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the model predicts, as `Teacher.logits`."""
        model: Any = self.skeleton.model
        ids_BS, mask_BS = (batch[name].to(self.skeleton.device) for name in ("input_ids", "attention_mask"))
        with _own_dtype(self.skeleton):
            logits = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
        if bool(logits.isnan().any()):
            raise NumericError(
                f"{self.skeleton.checkpoint.folder}: the teacher predicts NaN in {self.skeleton.dtype}; check it"
            )
        return logits.to(batch["input_ids"].device)


class Streamed:
    """A teacher of which only embeddings, norm and head are in memory; it knows the sequences it was walked over."""

    def __init__(self, skeleton: Skeleton, hidden: HiddenStates) -> None:
        self.skeleton, self._hidden = skeleton, hidden

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the model predicts, as `Teacher.logits`."""
        ids_BS = batch["input_ids"].cpu().numpy()
        rows: Any = _Rows(self._hidden.of(ids_BS))
        with _own_dtype(self.skeleton):
            logits = Walk(self.skeleton, ids_BS, len(ids_BS), rows).logits(0)
        return logits.to(batch["input_ids"].device)


class _Rows:
    """Stands for the store of a walk that is through: what its last layer put out for the one batch there is."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def get(self, number: int) -> Any:
        assert number == 0
        return self._output


def _sequences(lessons: Sequence[Lessons], indices: Sequence[Sequence[int] | None]) -> np.ndarray:
    """The different sequences among those that will be asked about, `[N, S]`, in their order."""
    found: dict[bytes, np.ndarray] = {}
    for part, wanted in zip(lessons, indices, strict=True):
        assert not (part.mask[:, 1:] > part.mask[:, :-1]).any(), "padding is on the right"
        for i in range(len(part)) if wanted is None else wanted:
            found.setdefault(digest(part.ids[i]), part.ids[i])
    return np.stack(list(found.values())).astype(np.int32)


def _fits(skeleton: Skeleton, beside_bytes: int, processes: Processes) -> bool:
    """Whether there is memory for the whole teacher in every process, beside what else it needs."""
    state = skeleton.model.state_dict().values()
    weights = int(_ROOM * sum(tensor.numel() for tensor in state) * skeleton.dtype.itemsize)
    # processes of one machine share its memory, but each has an accelerator of its own
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", processes.world)) if skeleton.device.type == "cpu" else 1
    free = free_memory(skeleton.device)
    fits = bool(processes.minimum((weights + beside_bytes) * sharing <= free))
    if not fits:
        logger.info(
            "%s: the teacher (%s) and the training (%s) do not fit together into %s; its hidden states go to the disk",
            *(skeleton.checkpoint.folder, format_bytes(weights), format_bytes(beside_bytes), format_bytes(free)),
        )
    return fits


def _own_dtype(skeleton: Skeleton) -> torch.autocast:
    """Keep mixed precision, which surrounds what is trained, out of the teacher."""
    return torch.autocast(skeleton.device.type, enabled=False)
