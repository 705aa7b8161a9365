"""Text to token blocks: tokenise the documents of a source, join them, cut, draw (N blocks, S = seq_len tokens)."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from understudy.errors import DataError, DependencyError
from understudy.sources import Document, Source, documents, parse_specs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Blocks", "Document", "Source", "documents", "parse_specs", "token_blocks"]

log = logging.getLogger(__name__)

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20  # tokenised in one call

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Blocks:
    """The drawn blocks: sources in order, within a source in the order of its text."""

    ids: np.ndarray  # int32 [N, S]
    source: np.ndarray  # int16 [N], index into names
    names: tuple[str, ...]
    notes: tuple[str, ...]  # shortfalls and such, one sentence each
    digest: str  # sha256 over seq_len and ids: which tokens exactly

    def of(self, name: str) -> np.ndarray:
        """Return the blocks of one source, int32 [n, S]."""
        if name not in self.names:
            raise DataError(f"there is no source {name!r} in these blocks; there are: {', '.join(self.names)}")
        return self.ids[self.source == self.names.index(name)]


def token_blocks(
    specs: Sequence[str] | str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    samples: int | None,
    seed: int = 0,
) -> Blocks:
    """Cut sources of text into blocks of `seq_len` tokens and draw `samples` of them; None takes all.

    Documents are tokenised as the tokenizer does by default, joined within a source by its end-of-text token, and cut
    from the start into blocks that do not overlap; the rest is dropped. Each source gives its share of the samples
    (equal, or by weight; largest remainder, earlier sources first), drawn without replacement by a generator of seed
    [seed, index of the source]. A source with fewer blocks gives all it has, and a note says so: the others do not make
    up for it. A hub dataset is read from its start only as far as max(4 x share, share + 64) blocks, and the draw is
    among these; where all blocks are taken, it is read to its end. A fast tokenizer needs some 700 bytes of memory for
    each token of the document at hand, so a large text is better given as JSONL or a folder than as one file.

    Raises:
        DataError: what `parse_specs` and `documents` raise, a source too short for one block or with no share of the
            samples, weights where all blocks are taken, or chats that the tokenizer has no template for.
    """
    if seq_len < 1 or seed < 0 or (samples is not None and samples < 1):
        raise DataError(f"seq_len ({seq_len}) and samples ({samples}) must be at least 1, and seed ({seed}) at least 0")
    sources = parse_specs(specs)
    shares = _shares(sources, samples)
    notes: list[str] = []
    drawn: list[np.ndarray] = []
    joins = False
    for index, (source, share) in enumerate(zip(sources, shares, strict=True)):
        limit = None
        if source.kind == "hub" and share is not None:
            limit = max(4 * share, share + 64) * seq_len
        elif source.kind == "hub":
            log.warning("%s is read to its end; with a number of samples less would do", source.name)
        joined = _joined(source, tokenizer, limit)
        joins |= joined.count > 1
        blocks = joined.blocks(seq_len)
        there = len(blocks)
        if not there:
            have = f"{source.name} has {len(joined.tokens)} tokens, and one block needs {seq_len}"
            raise DataError(f"{have}: give more text, or a smaller seq_len")
        size = there if share is None else min(share, there)
        if share is not None and there < share:
            notes.append(f"{source.name} has only {there} of the {share} blocks that are its share; all are used")
        choice = np.random.default_rng([seed, index]).choice(there, size=size, replace=False)
        drawn.append(blocks[np.sort(choice)])
        log.info("%s: %d of %d blocks of %d tokens", source.name, size, there, seq_len)
    if joins:
        notes += separator_notes(tokenizer)
    for note in notes:
        log.warning("%s", note)
    ids = np.concatenate(drawn)
    origin = np.repeat(np.arange(len(sources), dtype=np.int16), [len(part) for part in drawn])
    digest = hashlib.sha256(f"{seq_len}:".encode() + ids.astype("<i4").tobytes()).hexdigest()
    return Blocks(ids, origin, tuple(source.name for source in sources), tuple(notes), digest)


def _shares(sources: list[Source], samples: int | None) -> Sequence[int | None]:
    if len(sources) > np.iinfo(np.int16).max:
        raise DataError(f"{len(sources)} sources are too many: give the folder, which is one source, not a pattern")
    weights = [Fraction(repr(source.weight)) for source in sources]  # exact, so that ties are ties
    if samples is None:
        if len(set(weights)) > 1:
            raise DataError("weights have no effect where all blocks are taken: give samples, or no weights")
        return [None] * len(sources)
    quotas = [samples * weight / sum(weights) for weight in weights]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(sources)), key=lambda index: shares[index] - quotas[index])  # stable: earlier first
    for index in by_remainder[: samples - sum(shares)]:
        shares[index] += 1
    if not all(shares):
        name = sources[shares.index(0)].name
        raise DataError(f"{name} gets none of the {samples} samples: raise samples or its weight, or leave it out")
    return shares


@dataclass(eq=False)
class Joined:
    """Tokens of documents, one after the other, with the separator between any two."""

    separator: int | None
    tokens: array[int] = field(default_factory=lambda: array("i"))
    count: int = 0  # documents with at least one token

    def add(self, ids: Sequence[int]) -> None:
        """Add the tokens of one document; an empty one leaves no trace."""
        if not ids:
            return
        if self.count and self.separator is not None:
            self.tokens.append(self.separator)
        self.tokens.extend(ids)
        self.count += 1

    def blocks(self, seq_len: int) -> np.ndarray:
        """Cut from the start into blocks that do not overlap, int32 [N, S]; the rest is dropped."""
        assert self.tokens.itemsize == 4
        there = len(self.tokens) // seq_len
        return np.frombuffer(self.tokens, dtype=np.int32)[: there * seq_len].reshape(there, seq_len)


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that stands between documents: end-of-text, else the separator, else none."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def separator_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say what stands between documents where it is not the end-of-text token."""
    if tokenizer.eos_token_id is not None:
        return []
    how = "with nothing between them" if separator_of(tokenizer) is None else "by its separator token"
    return [f"the tokenizer has no end-of-text token; documents are joined {how}"]


def _joined(source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Joined:
    """Return the joined tokens of a source (the first `limit`)."""
    joined = Joined(separator_of(tokenizer))
    for batch in batches(documents(source), characters):
        rows = iter(text_tokens([document for document in batch if isinstance(document, str)], tokenizer))
        for document in batch:
            joined.add(next(rows) if isinstance(document, str) else _chat_tokens(document, tokenizer, source.name))
        if limit is not None and len(joined.tokens) >= limit:
            del joined.tokens[limit:]
            break
    return joined


def batches(found: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Group what a tokenizer is to take in one call, `size` being the characters of an item."""
    batch: list[T] = []
    total = 0
    for item in found:
        batch.append(item)
        total += size(item)
        if len(batch) >= _BATCH_DOCUMENTS or total >= _BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def characters(document: Document) -> int:
    """Count the characters of a document, roughly those of a chat."""
    return len(document) if isinstance(document, str) else sum(len(str(turn["content"])) for turn in document)


def text_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[list[int]]:
    """Tokenise texts, of any length: no warning about those longer than the model's context, they are cut anyway."""
    return tokenizer(texts, verbose=False, **options)["input_ids"] if texts else []


def _chat_tokens(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    options: dict[str, Any] = {} if template_in_code(tokenizer, name) else {"tokenizer_kwargs": {"verbose": False}}
    with template_errors(messages, name):
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    return list(encoded["input_ids"] if isinstance(encoded, Mapping) else encoded)


def template_in_code(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template is a program of the tokenizer's, as Mistral's own is, and takes no further arguments.

    Raises:
        DataError: there is no chat template at all; `name` is that of the source.
    """
    in_code = not hasattr(tokenizer, "chat_template")
    if not in_code and tokenizer.chat_template is None:
        raise DataError(f"{name} has chats, and the tokenizer has no chat template: give it one, or name other text")
    return in_code


@contextmanager
def template_errors(messages: list[dict[str, Any]], name: str) -> Iterator[None]:
    """Say which chat a template refuses, in one line."""
    try:
        yield
    except ImportError as error:
        raise DependencyError(f"{name} has chats, which need jinja2: pip install understudy[data]") from error
    except Exception as error:  # the template is a program of the model's, and raises whatever it likes
        start = str(messages[0])[:80]
        raise DataError(f"{name}: the chat template refuses the chat that starts {start} ({error})") from error
