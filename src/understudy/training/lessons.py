"""What a model is trained on: sequences of tokens with the labels of the loss (N sequences, S = seq_len tokens).

Plain text is joined and cut into blocks, and every token is learnt. A chat is a sequence of its own, of which the
assistant's turns are learnt (`answers`), padded on the right. A file may hold both.
"""

from __future__ import annotations

import hashlib
import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from understudy.data import Blocks, Joined, batches, characters, separator_notes, separator_of, text_tokens
from understudy.errors import DataError
from understudy.recipe import Recovery
from understudy.sources import Document, Source, documents, parse_specs
from understudy.training.answers import answered

log = logging.getLogger(__name__)

NOT_LEARNT = -100  # the label that the loss looks past, in torch and in transformers
_REPAIRED_ON = 512  # sequences, unless told otherwise
MOST_HELD_OUT = 256  # sequences: more say little more, and cost time at every look


@dataclass(frozen=True, eq=False)
class Lessons(Dataset[dict[str, torch.Tensor]]):
    """Sequences to train on, or to measure on: sources in order, within a source blocks of text, then chats.

    Labels stand where their token stands; the loss shifts them, as transformers' models do.
    """

    ids: np.ndarray  # int32 [N, S]
    labels: np.ndarray  # int32 [N, S], -100 where the loss does not look
    mask: np.ndarray  # bool [N, S], False where it is padding
    digest: str  # sha256 over the three: which lessons exactly
    notes: tuple[str, ...] = ()  # what was left out and such, one sentence each

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        return {
            "input_ids": torch.from_numpy(self.ids[index].astype(np.int64)),
            "attention_mask": torch.from_numpy(self.mask[index].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[index].astype(np.int64)),
            "index": torch.tensor(index),
        }


def lessons(
    specs: Sequence[str] | str,
    tokenizer: Any,
    *,
    seq_len: int,
    seed: int,
    held_out: float,
    limit: int | None = None,
) -> tuple[Lessons, Lessons]:
    """Return the sequences to train on and those held out, from all text that the data specs name.

    Documents are joined and cut as `token_blocks` does it, all blocks taken; a chat is cut off after seq_len tokens,
    and left out if no answer is left. Of all sequences the share `held_out`, at least 1 and at most 256, is drawn by
    `seed` and never trained on; nor is a sequence that equals one of them. A document that was cut may still stand in
    both parts, with different stretches of it.

    A weight says how often the training sequences of a source come: 2 twice, 0.5 half of them, drawn by `seed`.
    `limit` is how many sequences training can use at most. It keeps as many, drawn by `seed`, and hub datasets are
    read from their start only as far as that needs, where several share the limit by their weights; without a limit
    they are read to their end. The sequences held out of other text do not depend on it.

    Raises:
        DataError: what `parse_specs`, `documents` and `answered` raise, a source too short for one sequence, fewer
            than two different sequences, or a setting out of range.
    """
    if not specs:
        raise DataError("there is no text to train on: name some")
    if seq_len < 2 or seed < 0 or not 0 <= held_out < 1 or (limit is not None and limit < 1):
        settings = f"seq_len {seq_len}, seed {seed}, held_out {held_out}, limit {limit}"
        raise DataError(f"{settings}: must be at least 2, at least 0, from 0 to below 1, and at least 1")
    sources = parse_specs(specs)
    needs = _needs(sources, held_out, limit)
    texts = [_read(source, tokenizer, seq_len, need) for source, need in zip(sources, needs, strict=True)]
    notes = list(dict.fromkeys(note for text in texts for note in text.notes))
    whole = _together([text.sequences(tokenizer) for text in texts])
    train, held = _split(whole.ids, held_out, seed, notes)
    origin = np.repeat(np.arange(len(sources)), [len(text) for text in texts])
    # a hub dataset read to a limit has had its weight in how far it was read
    weights = [source.weight if need is None else 1 for source, need in zip(sources, needs, strict=True)]
    train = _weighted(train, origin, weights, seed)
    if limit is not None and len(train) > limit:
        train = np.sort(np.random.default_rng([seed, 1]).choice(train, size=limit, replace=False))
    for note in notes:
        log.warning("%s", note)
    log.info("%d sequences of %d tokens to train on, %d held out", len(train), seq_len, len(held))
    return whole.lessons(train, tuple(notes)), whole.lessons(held, ())


def lessons_for(settings: Recovery, tokenizer: Any, blocks: Blocks | None = None) -> tuple[Lessons, Lessons]:
    """Return the sequences to train on and those held out as settings ask for them; of `blocks`, if these are given.

    Raises:
        DataError: as `lessons`, or fewer than two different blocks.
    """
    s = settings
    if blocks is None:
        limit = s.sequences or (_REPAIRED_ON if s.loss == "repair" else s.steps * s.batch)
        return lessons(s.train, tokenizer, seq_len=s.seq_len, seed=s.seed, held_out=s.held_out, limit=limit)
    ids, notes = np.ascontiguousarray(blocks.ids, np.int32), list[str]()
    train, held = _split(ids, s.held_out, s.seed, notes)
    whole = _Sequences(ids, ids, np.full(len(ids), ids.shape[1]))
    return whole.lessons(train, tuple(notes)), whole.lessons(held, ())


def _needs(sources: list[Source], held_out: float, limit: int | None) -> list[int | None]:
    """Return how many sequences to read of each source; None is all."""
    hubs = sum(source.weight for source in sources if source.kind == "hub")
    if limit is None:
        for source in sources:
            if source.kind == "hub":
                log.warning("%s is read to its end; with a limit less would do", source.name)
        return [None] * len(sources)
    wanted = min(math.ceil(limit / (1 - held_out)) + 1, limit + MOST_HELD_OUT)
    return [math.ceil(wanted * source.weight / hubs) if source.kind == "hub" else None for source in sources]


def _split(ids: np.ndarray, share: float, seed: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those held out, both in order."""
    count = len(ids)
    if count < 2:
        raise DataError(f"the text gives {count} sequence, and two are needed (one is held out): give more text")
    size = min(max(round(share * count), 1), MOST_HELD_OUT, count - 1)
    held = np.sort(np.random.default_rng([seed, 0]).choice(count, size=size, replace=False))
    train = np.delete(np.arange(count), held)
    # a chat that stands twice in the data would let training see what is held out
    seen = {ids[row].tobytes() for row in held}
    fresh = np.array([ids[row].tobytes() not in seen for row in train], dtype=bool)
    if not fresh.any():
        raise DataError(
            f"each of the {count} sequences equals a held-out one: give more text that does not repeat itself"
        )
    if not fresh.all():
        notes.append(f"{len(train) - fresh.sum()} sequences equal held-out ones and are not trained on")
    return train[fresh], held


def _weighted(rows: np.ndarray, origin: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Repeat the rows of each source as often as it weighs; of a fraction a share is drawn."""
    parts = []
    for index, weight in enumerate(weights):
        mine = rows[origin[rows] == index]
        times = int(weight)
        drawn = np.random.default_rng([seed, 2, index]).permutation(mine)[: round((weight - times) * len(mine))]
        parts.append(np.sort(np.concatenate([np.tile(mine, times), drawn])))
    found = np.concatenate(parts)
    if not len(found):
        raise DataError("the weights leave no sequence to train on: raise them, or give more text")
    return found


@dataclass(frozen=True, eq=False)
class _Sequences:
    ids: np.ndarray  # int32 [N, S]
    labels: np.ndarray  # int32 [N, S]; `ids` itself where every token is learnt
    lengths: np.ndarray  # int64 [N], tokens that are no padding

    def lessons(self, rows: np.ndarray, notes: tuple[str, ...]) -> Lessons:
        ids = self.ids[rows]
        labels = ids if self.labels is self.ids else self.labels[rows]
        mask = np.arange(ids.shape[1]) < self.lengths[rows, None]
        digest = hashlib.sha256(f"{ids.shape[1]}:".encode())
        for part in (ids.astype("<i4", copy=False), labels.astype("<i4", copy=False), mask):
            digest.update(np.ascontiguousarray(part).data)
        return Lessons(ids, labels, mask, digest.hexdigest(), notes)


def _together(parts: list[_Sequences]) -> _Sequences:
    ids = np.concatenate([part.ids for part in parts])
    plain = all(part.labels is part.ids for part in parts)
    labels = ids if plain else np.concatenate([part.labels for part in parts])
    return _Sequences(ids, labels, np.concatenate([part.lengths for part in parts]))


@dataclass(eq=False)
class _Text:
    """What was read of one source: text joined, chats one after the other without padding."""

    name: str
    seq_len: int
    joined: Joined
    ids: array[int] = field(default_factory=lambda: array("i"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    notes: list[str] = field(default_factory=list)
    chats: int = 0  # read
    cut: int = 0  # kept, and longer than seq_len
    unlearnt: int = 0  # answers that cannot be told

    def __len__(self) -> int:
        return len(self.joined.tokens) // self.seq_len + len(self.lengths)

    def add_chats(self, chats: list[tuple[str, Any]], tokenizer: Any) -> None:
        """Keep the first seq_len tokens of each chat, if an answer is among them."""
        for chat in answered(chats, tokenizer, self.name):
            self.chats += 1
            self.unlearnt += chat.unlearnt
            ids, learnt = chat.ids[: self.seq_len], chat.learnt[: self.seq_len]
            if learnt[1:].any():  # nothing foretells the first token
                self.ids.frombytes(ids.tobytes())
                self.labels.frombytes(np.where(learnt, ids, NOT_LEARNT).astype(np.int32).tobytes())
                self.lengths.append(len(ids))
                self.cut += len(chat.ids) > self.seq_len

    def sequences(self, tokenizer: Any) -> _Sequences:
        """Return the blocks, then the chats with padding."""
        blocks = self.joined.blocks(self.seq_len)
        full = np.full(len(blocks), self.seq_len)
        if not self.lengths:
            return _Sequences(blocks, blocks, full)
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        ids = np.full((len(lengths), self.seq_len), next(pad for pad in pads if pad is not None), dtype=np.int32)
        labels = np.full_like(ids, NOT_LEARNT)
        there = np.arange(self.seq_len) < lengths[:, None]
        ids[there] = np.frombuffer(self.ids, dtype=np.int32)
        labels[there] = np.frombuffer(self.labels, dtype=np.int32)
        return _Sequences(
            np.concatenate([blocks, ids]), np.concatenate([blocks, labels]), np.concatenate([full, lengths])
        )


def _read(source: Source, tokenizer: Any, seq_len: int, need: int | None) -> _Text:
    """Read a source to its end, or until it gives as many sequences as needed."""
    text = _Text(source.name, seq_len, Joined(separator_of(tokenizer)))
    numbered = enumerate(documents(source), 1)
    for batch in batches(numbered, lambda item: characters(item[1])):
        texts = [document for _, document in batch if isinstance(document, str)]
        for ids in text_tokens(texts, tokenizer):
            text.joined.add(ids)
        chats: list[tuple[str, Document]] = [
            (f"{source.path}, document {number}", document) for number, document in batch if isinstance(document, list)
        ]
        text.add_chats(chats, tokenizer)
        hopeless = not text and text.chats >= (need or 0)  # a stream without answers may have no end
        if need is not None and (len(text) >= need or hopeless):
            break
    _take_stock(text, source, tokenizer)
    return text


def _take_stock(text: _Text, source: Source, tokenizer: Any) -> None:
    """Say what was left out of a source.

    Raises:
        DataError: nothing is left of it.
    """
    name, kept, tokens = text.name, len(text.lengths), len(text.joined.tokens)
    if not text and not text.chats:
        have = f"{name} has {tokens} tokens, and one sequence needs {text.seq_len}"
        raise DataError(f"{have}: give more text, or a smaller seq_len")
    if not text:
        none = f"none of the {text.chats} chats of {source.path} has an answer within {text.seq_len} tokens"
        raise DataError(f"{none}: raise seq_len, or give shorter chats")
    if kept < text.chats:
        without = f"{text.chats - kept} of the {text.chats} chats of {name} have no answer"
        text.notes.append(f"{without} within {text.seq_len} tokens and are left out")
    if text.cut:
        text.notes.append(
            f"{text.cut} of the {text.chats} chats of {name} are longer than {text.seq_len} tokens and cut"
        )
    if text.unlearnt:
        why = "the chat template writes them otherwise once more turns follow, or they open a chat"
        text.notes.append(f"{text.unlearnt} answers in the chats of {name} are not learnt: {why}")
    if text.chats and 0 < tokens < text.seq_len:
        text.notes.append(f"the {tokens} tokens of plain text in {name} do not fill one sequence and are left out")
    if text.joined.count > 1:
        text.notes += separator_notes(tokenizer)
