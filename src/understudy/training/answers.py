"""Which tokens of a chat its assistant wrote.

The chat is written out as text and tokenised once, as the chat template does it. An answer is a stretch of that text:

    where the template marks answers itself ({% generation %}), what it marks
    elsewhere, what stands between the chat up to the answer, with the prompt for one (`add_generation_prompt`), and
    the chat up to and with the answer; both must be how the whole chat starts, or the answer is not learnt from

Answers are found in text and not in tokens, since a token may reach over the border (a line break of the prompt with
one of the answer). In tokens a border lies where those of the text before it stop being those of the whole text: the
token that brings the answer's first character is the answer's, the one that brings the first character after it is not.
transformers' own mask (`return_assistant_tokens_mask`) asks the tokenizer for the token at a border character, which
tokenizers that trim their offsets do not know for white space; it then marks nothing at all, or all the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from understudy.data import batches, template_errors, template_in_code, text_tokens
from understudy.errors import DataError

Chat = list[dict[str, Any]]

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, eq=False)
class Answered:
    """One chat as tokens, up to its last answer."""

    ids: np.ndarray  # int32 [S]
    learnt: np.ndarray  # bool [S]: written by the assistant, the end of its turn included
    unlearnt: int  # answers that cannot be told from the rest, see `answered`


@dataclass(frozen=True)
class _Written:
    text: str
    spans: list[tuple[int, int]]  # of the answers, in characters
    unlearnt: int

    @property
    def cuts(self) -> list[str]:
        """The whole text, then what stands before each border of an answer inside it."""
        inside = [border for span in self.spans for border in span if border < len(self.text)]
        return [self.text, *(self.text[:border] for border in inside)]

    def answered(self, rows: Iterator[list[int]]) -> Answered:
        """Take the tokens of the cuts, in their order."""
        ids = np.array(next(rows), dtype=np.int32)
        learnt = np.zeros(len(ids), dtype=bool)
        for span in self.spans:
            start, end = (_shared(ids, next(rows)) if border < len(self.text) else len(ids) for border in span)
            learnt[start:end] = True
        return Answered(ids, learnt, self.unlearnt)


def answered(chats: Iterable[tuple[str, Chat]], tokenizer: Any, name: str) -> Iterator[Answered]:
    """Yield the tokens of chats and which of them are answers; each chat comes with a word on where it stands.

    What follows the last answer is left out. Without marks in the template, an answer is not learnt from where the
    template writes it otherwise once more turns follow (Qwen3 drops the thinking), or where it opens the chat.

    Raises:
        DataError: a chat without an assistant turn, one of whose answers none can be told, one that the template
            refuses, or a tokenizer without a template as text; `name` is that of the source.
        DependencyError: jinja2 is not installed.
    """
    written = (_write(messages, tokenizer, name, where) for where, messages in chats)
    for batch in batches(written, lambda one: sum(map(len, one.cuts))):
        rows = iter(text_tokens([cut for one in batch for cut in one.cuts], tokenizer, add_special_tokens=False))
        yield from (one.answered(rows) for one in batch)


def _shared(ids: np.ndarray, others: list[int]) -> int:
    """Return how many tokens two lists start with alike."""
    n = min(len(ids), len(others))
    differ = np.flatnonzero(ids[:n] != np.array(others[:n], dtype=np.int32))
    return int(differ[0]) if len(differ) else n


def _write(messages: Chat, tokenizer: Any, name: str, where: str) -> _Written:
    turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    start = str(messages[0])[:80]
    if not turns:
        problem = f"{where} is a chat without an assistant turn, which has no answer to learn from; it starts {start}"
        raise DataError(f"{problem}: remove it, or give its text as 'text'")
    if template_in_code(tokenizer, name):
        kind = type(tokenizer).__name__
        raise DataError(f"{name} has chats, and {kind} does not tell answers from the rest: use a jinja chat template")
    # None is as good as absent: transformers does the same, and many templates trip over it
    messages = [{key: v for key, v in turn.items() if v is not None} for turn in messages[: turns[-1] + 1]]
    with template_errors(messages, name):
        template = tokenizer.get_chat_template()
        marked = _MARKS.search(template) is not None
        written = _marked(messages, tokenizer, template) if marked else _between(messages, turns, tokenizer)
    if not written.spans:
        why = "marks none of its answers" if marked else "does not write the chat up to an answer as the whole starts"
        raise DataError(f"{where}: the chat template {why}, in the chat that starts {start}: mend the chat or template")
    return written


def _marked(messages: Chat, tokenizer: Any, template: str) -> _Written:
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (found,) = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return _Written(text, [(start, end) for start, end in found if start < end], 0)


def _between(messages: Chat, turns: list[int], tokenizer: Any) -> _Written:
    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    text = render(len(messages), False)
    spans = []
    for turn in filter(None, turns):  # transformers renders no empty chat, so nothing says where the first turn starts
        before, with_it = render(turn, True), text if turn == turns[-1] else render(turn + 1, False)
        if text.startswith(with_it) and with_it.startswith(before) and before != with_it:
            spans.append((len(before), len(with_it)))
    return _Written(text, spans, len(turns) - len(spans))
