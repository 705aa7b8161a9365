"""Text to token blocks: tokenise the documents of a source, join them, cut, draw (N blocks, S = seq_len tokens)."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.errors import DataError, DependencyError
from understudy.sources import Document, Source, documents, parse_specs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Blocks", "Document", "Source", "documents", "parse_specs", "token_blocks"]

log = logging.getLogger(__name__)

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20  # tokenised in one call


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
    eos = tokenizer.eos_token_id
    separator = tokenizer.sep_token_id if eos is None else eos
    notes: list[str] = []
    drawn: list[np.ndarray] = []
    joins = False
    for index, (source, share) in enumerate(zip(sources, shares, strict=True)):
        limit = None
        if source.kind == "hub" and share is not None:
            limit = max(4 * share, share + 64) * seq_len
        elif source.kind == "hub":
            log.warning("%s is read to its end; with a number of samples less would do", source.name)
        tokens, count = _tokens(source, tokenizer, separator, limit)
        joins |= count > 1
        there = len(tokens) // seq_len
        if not there:
            have = f"{source.name} has {len(tokens)} tokens, and one block needs {seq_len}"
            raise DataError(f"{have}: give more text, or a smaller seq_len")
        blocks = np.frombuffer(tokens, dtype=np.int32)[: there * seq_len].reshape(there, seq_len)
        size = there if share is None else min(share, there)
        if share is not None and there < share:
            notes.append(f"{source.name} has only {there} of the {share} blocks that are its share; all are used")
        choice = np.random.default_rng([seed, index]).choice(there, size=size, replace=False)
        drawn.append(blocks[np.sort(choice)])
        log.info("%s: %d of %d blocks of %d tokens", source.name, size, there, seq_len)
    if joins and eos is None:
        how = "with nothing between them" if separator is None else "by its separator token"
        notes.append(f"the tokenizer has no end-of-text token; documents are joined {how}")
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


def _tokens(
    source: Source, tokenizer: PreTrainedTokenizerBase, separator: int | None, limit: int | None
) -> tuple[array[int], int]:
    """Return the joined tokens of a source (the first `limit`), and from how many documents they come."""
    tokens, count = array("i"), 0
    assert tokens.itemsize == 4
    for batch in _batches(documents(source)):
        texts = [document for document in batch if isinstance(document, str)]
        # verbose=False: no warning about documents longer than the model's context, they are cut anyway
        rows = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        for document in batch:
            ids = next(rows) if isinstance(document, str) else _chat_tokens(document, tokenizer, source.name)
            if not ids:
                continue
            if count and separator is not None:
                tokens.append(separator)
            tokens.extend(ids)
            count += 1
        if limit is not None and len(tokens) >= limit:
            return tokens[:limit], count
    return tokens, count


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in found:
        batch.append(document)
        size += len(document)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _chat_tokens(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    # Mistral's own tokenizer has its template in code: no such attribute, and it takes no further arguments.
    in_code = not hasattr(tokenizer, "chat_template")
    if not in_code and tokenizer.chat_template is None:
        raise DataError(f"{name} has chats, and the tokenizer has no chat template: give it one, or name other text")
    options: dict[str, Any] = {} if in_code else {"tokenizer_kwargs": {"verbose": False}}
    try:
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    except ImportError as error:
        raise DependencyError(f"{name} has chats, which need jinja2: pip install understudy[data]") from error
    except Exception as error:  # the template is a program of the model's, and raises whatever it likes
        start = str(messages[0])[:80]
        raise DataError(f"{name}: the chat template refuses the chat that starts {start} ({error})") from error
    return list(encoded["input_ids"] if isinstance(encoded, Mapping) else encoded)
