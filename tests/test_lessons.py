"""Text to lessons: labels token by token against a slow reference, the split, and every way to get it wrong."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import ByT5Tokenizer, OlmoeForCausalLM

from test_data import BOS, EOS, SEP, make_tokenizer, reference, story, write, write_rows
from tiny import make_model
from understudy import data
from understudy.data import token_blocks
from understudy.errors import DataError, DependencyError
from understudy.training import lessons as module
from understudy.training.answers import answered
from understudy.training.lessons import Lessons, lessons

# For each template: the template, what stands before an answer, and what after it that is still the answer's.
HEADERS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
CHATML = (
    f"{{% for m in messages %}}{BOS}{{{{ m.role }}}}\n{{{{ m.content }}}}{SEP}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{BOS}assistant\n{{% endif %}}"
)
SPACED = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '\n<' ~ m.role ~ '>' }}{% if m.role == 'assistant' %}"
    f"{{% generation %}}{{{{ m.content }}}}{SEP}\n{{% endgeneration %}}"
    "{% else %}{{ m.content ~ '\n' }}{% endif %}{% endfor %}"
)
TRIMMED = MARKED.replace("{% generation %}", "{%- generation -%}").replace("{% endgeneration", "{%- endgeneration")
# as Qwen3 does: the last answer has its thinking, those before it lose it
THINKING = (
    f"{{% for m in messages %}}{BOS}{{{{ m.role }}}}\n"
    "{% if m.role == 'assistant' and loop.last %}(thinks)\n{% endif %}"
    f"{{{{ m.content }}}}{SEP}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{BOS}assistant\n{{% endif %}}"
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(*contents: str) -> list[dict[str, str]]:
    return [turn(role, content) for role, content in zip(itertools.cycle(("user", "assistant")), contents)]


CHATS = [
    chat("alpha?", "gamma!"),
    chat("alpha?", "\n\n gamma\n", "béta", " 東京5  "),
    [turn("user", "a"), turn("assistant", "b"), turn("assistant", "\nc"), turn("user", "left out")],
    [turn("user", story(1, 9)), turn("assistant", story(2, 9)), turn("user", "x"), turn("assistant", story(3, 5))],
]


def pieces(template: str, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """Write a chat out by hand: stretches of text, and whether the assistant has to write them."""
    found: list[tuple[str, bool]] = []
    for m in messages:
        role, text, answer = m["role"], m["content"], m["role"] == "assistant"
        if template == HEADERS:
            found.append((f"[{role}] {text}\n", answer))
        if template == CHATML:
            found += [(f"{BOS}{role}\n", False), (f"{text}{SEP}\n", answer)]
        if template == SPACED:
            found += [("Q: " if role == "user" else "A: ", False), (f"{text}\n", answer)]
        if template == MARKED:
            found += [(f"\n<{role}>", False), (f"{text}{SEP}\n" if answer else f"{text}\n", answer)]
        if template == TRIMMED:
            found += [(f"\n<{role}>", False), (f"{text}{SEP}" if answer else f"{text}\n", answer)]
    return found


def expected(template: str, messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The specification, one token at a time: learnt is what ends inside an answer."""
    last = max(number for number, m in enumerate(messages) if m["role"] == "assistant")
    parts = pieces(template, messages[: last + 1])
    learnt = [answer for text, answer in parts for _ in text]
    encoded = tokenizer("".join(text for text, _ in parts), add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if learnt[end - 1] else -100
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def chats_of(*templates: str) -> Any:
    return make_tokenizer(eos_token=EOS, chat_template=templates[0] if templates else CHATML)


def both(parts: tuple[Lessons, Lessons]) -> list[tuple[list[int], list[int], list[bool]]]:
    """Return every sequence of both parts, sorted."""
    return sorted(
        (ids.tolist(), labels.tolist(), mask.tolist())
        for part in parts
        for ids, labels, mask in zip(part.ids, part.labels, part.mask, strict=True)
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(eos_token=EOS)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- chats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("template", [HEADERS, CHATML, SPACED, MARKED, TRIMMED], ids=range(5))
def test_answers_token_by_token(template: str, trim: bool) -> None:
    tokenizer = chats_of(template)
    want = [expected(template, messages, tokenizer) for messages in CHATS]
    # many real tokenizers trim offsets, which loses the white space at the borders of answers
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    seq_len = 96
    assert max(len(ids) for ids, _ in want) <= seq_len
    write_rows("chats.jsonl", [{"messages": messages} for messages in CHATS])
    parts = lessons("chats.jsonl", tokenizer, seq_len=seq_len, seed=0, held_out=0.3)
    eos = tokenizer.eos_token_id
    assert both(parts) == sorted(
        (
            ids + [eos] * (seq_len - len(ids)),
            labels + [-100] * (seq_len - len(ids)),
            [True] * len(ids) + [False] * (seq_len - len(ids)),
        )
        for ids, labels in want
    )
    assert [len(part) for part in parts] == [3, 1]
    assert parts[0].notes == ()


def test_a_border_inside_a_token_is_in_the_test(tokenizer: Any) -> None:
    one = chats_of(SPACED)
    ids, labels = expected(SPACED, chat("a", "gamma"), one)
    first = next(number for number, label in enumerate(labels) if label != -100)
    assert one.decode(ids[first]) == " gamma"  # while the prompt ends with the space


def test_small_calls_of_the_tokenizer_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("chats.jsonl", [{"messages": messages} for messages in CHATS * 3] + [{"text": story(5, 90)}])
    whole = lessons("chats.jsonl", chats_of(), seq_len=32, seed=1, held_out=0.2)
    for name, value in (("_BATCH_DOCUMENTS", 2), ("_BATCH_CHARACTERS", 10)):
        monkeypatch.setattr(data, name, value)
        again = lessons("chats.jsonl", chats_of(), seq_len=32, seed=1, held_out=0.2)
        assert [part.digest for part in again] == [part.digest for part in whole]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_tokenizer_in_python(template: str) -> None:
    tokenizer = ByT5Tokenizer(chat_template=template)
    assert not tokenizer.is_fast
    [found] = answered([("here", CHATS[1])], tokenizer, "chats")
    want = [answer for text, answer in pieces(template, CHATS[1]) for _ in tokenizer.tokenize(text)]
    assert found.learnt.tolist() == want
    assert any(want)


def test_answers_that_the_template_rewrites() -> None:
    write_rows("chats.jsonl", [{"messages": chat("alpha", f"béta{i}", "gamma", f"alpha{i}")} for i in range(3)])
    tokenizer = chats_of(THINKING)
    train, held = lessons("chats.jsonl", tokenizer, seq_len=64, seed=0, held_out=0.1)
    answers = {
        tokenizer.decode(part.labels[row][part.labels[row] != -100]) for part in (train, held) for row in range(1)
    }
    assert answers < {f"(thinks)\nalpha{i}{SEP}\n" for i in range(3)}
    assert train.notes[0].startswith("3 answers in the chats of chats are not learnt: the chat template writes them")


def test_an_answer_that_opens_the_chat() -> None:
    opened = [turn("assistant", "gamma"), *chat("alpha", "béta")]
    tokenizer = chats_of(CHATML)
    [found] = answered([("here", opened)], tokenizer, "chats")
    assert tokenizer.decode(found.ids[found.learnt]) == f"béta{SEP}\n"
    assert found.unlearnt == 1
    tokenizer = chats_of(MARKED)
    [found] = answered([("here", opened)], tokenizer, "chats")
    assert tokenizer.decode(found.ids[found.learnt]) == f"gamma{SEP}\nbéta{SEP}\n"
    assert found.unlearnt == 0


def test_keys_without_a_value_do_not_reach_the_template() -> None:
    template = "{% for m in messages %}{{ m.role }}{{ m.tool_calls is defined }}{{ m.content }}{% endfor %}"
    for one in (template, template.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")):
        tokenizer = chats_of(one)
        messages: Any = [turn("user", "a"), {**turn("assistant", "b"), "tool_calls": None}]
        [found] = answered([("here", messages)], tokenizer, "chats")
        assert tokenizer.decode(found.ids) == "userFalseaassistantFalseb"


def test_long_chats_are_cut_or_left_out() -> None:
    tokenizer = chats_of()
    rows = [chat("a", story(seed, 40)) for seed in (1, 2)] + [chat(story(3, 40), "late"), chat("b", "short")]
    write_rows("chats.jsonl", [{"messages": messages} for messages in rows])
    parts = lessons("chats.jsonl", tokenizer, seq_len=32, seed=0, held_out=0.1)
    want = [expected(CHATML, messages, tokenizer) for messages in rows]
    assert [len(ids) > 32 for ids, _ in want] == [True, True, True, False]
    assert sorted(ids for ids, _, _ in both(parts)) == sorted(
        (ids + [tokenizer.eos_token_id] * 32)[:32] for ids, _ in (want[0], want[1], want[3])
    )
    assert sorted(labels for _, labels, _ in both(parts)) == sorted(
        (labels + [-100] * 32)[:32] for _, labels in (want[0], want[1], want[3])
    )
    assert parts[0].notes == (
        "1 of the 4 chats of chats have no answer within 32 tokens and are left out",
        "2 of the 4 chats of chats are longer than 32 tokens and cut",
    )


@pytest.mark.parametrize(("special", "pad"), [({"pad_token": BOS, "eos_token": EOS}, BOS), ({"eos_token": SEP}, SEP)])
def test_padding(special: dict[str, str], pad: str) -> None:
    write_rows("chats.jsonl", [{"messages": messages} for messages in CHATS])
    tokenizer = make_tokenizer(chat_template=HEADERS, **special)
    for part in lessons("chats.jsonl", tokenizer, seq_len=100, seed=0, held_out=0.5):
        assert not part.mask[:, -1].any()
        assert (part.ids[~part.mask] == tokenizer.convert_tokens_to_ids(pad)).all()
        assert (part.labels[~part.mask] == -100).all()
        assert (np.diff(part.mask.astype(int)) <= 0).all()  # on the right only


def test_padding_without_a_token_for_it() -> None:
    write_rows("chats.jsonl", [{"messages": messages} for messages in CHATS])
    train, _ = lessons("chats.jsonl", make_tokenizer(chat_template=HEADERS), seq_len=100, seed=0, held_out=0.5)
    assert (train.ids[~train.mask] == 0).all()


# ---- plain text -----------------------------------------------------------------------------------------------------


def test_plain_text_is_learnt_whole(tokenizer: Any) -> None:
    web = [story(seed, 30 + seed) for seed in range(1, 9)]
    specs = [write_rows("web.jsonl.xz", [{"text": text} for text in web]), write("book.txt", story(20, 200))]
    train, held = lessons(specs, tokenizer, seq_len=16, seed=4, held_out=0.25)
    blocks = token_blocks(specs, tokenizer, seq_len=16, samples=None)
    assert sorted(ids for ids, _, _ in both((train, held))) == sorted(blocks.ids.tolist())
    assert len(held) == round(0.25 * len(blocks.ids))
    for part in (train, held):
        assert part.ids.dtype == part.labels.dtype == np.int32
        assert part.mask.dtype == np.bool_
        assert part.mask.all()
        assert (part.labels == part.ids).all()
    rows = blocks.ids.tolist()
    places = [rows.index(ids) for ids in train.ids.tolist()]
    assert places == sorted(places)
    assert train.notes == ()


def test_text_and_chats_in_one_file_and_in_several() -> None:
    tokenizer = chats_of()
    texts = [story(seed, 30) for seed in range(4)]
    rows = [{"text": text} for text in texts] + [{"messages": messages} for messages in CHATS]
    rows = [rows[number] for number in (0, 4, 1, 5, 6, 2, 7, 3)]
    parts = lessons(write_rows("mixed.jsonl", rows), tokenizer, seq_len=64, seed=0, held_out=0.2)
    chats, blocks = (
        lessons(
            write_rows(f"{key}.jsonl", [row for row in rows if key in row]), tokenizer, seq_len=64, seed=0, held_out=0.2
        )
        for key in ("messages", "text")
    )
    assert both(parts) == sorted(both(chats) + both(blocks))
    several = lessons(["text.jsonl", "messages.jsonl"], tokenizer, seq_len=64, seed=0, held_out=0.2)
    assert both(several) == both(parts)
    flat = reference([texts], tokenizer, 64, [None], 0, tokenizer.eos_token_id)[0]
    assert sorted(ids for ids, _, _ in both(blocks)) == sorted(flat)


def test_text_too_short_beside_chats() -> None:
    rows = [{"messages": messages} for messages in CHATS] + [{"text": "alpha"}]
    train, _ = lessons(write_rows("mixed.jsonl", rows), chats_of(), seq_len=96, seed=0, held_out=0.2)
    assert train.notes == ("the 2 tokens of plain text in mixed do not fill one sequence and are left out",)


def test_a_tokenizer_without_end_of_text_is_noted() -> None:
    write_rows("web.jsonl", [{"text": story(seed, 20)} for seed in range(4)])
    train, _ = lessons("web.jsonl", make_tokenizer(), seq_len=8, seed=0, held_out=0.1)
    assert "no end-of-text token" in train.notes[0]


# ---- the split, weights and limits ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_split(tokenizer: Any) -> None:
    spec = write("book.txt", story(1, 900))
    one, same, other = (lessons(spec, tokenizer, seq_len=8, seed=seed, held_out=0.1) for seed in (1, 1, 2))
    assert [part.digest for part in one] == [part.digest for part in same]
    assert (one[0].ids == same[0].ids).all() and (one[1].ids == same[1].ids).all()
    assert not {part.digest for part in one} & {part.digest for part in other}
    assert both(one) == both(other)


def test_digest_is_over_all_three() -> None:
    train, _ = lessons(
        write_rows("chats.jsonl", [{"messages": messages} for messages in CHATS]),
        chats_of(),
        seq_len=90,
        seed=0,
        held_out=0.2,
    )
    raw = train.ids.astype("<i4").tobytes() + train.labels.astype("<i4").tobytes() + train.mask.tobytes()
    assert train.digest == hashlib.sha256(b"90:" + raw).hexdigest()


@pytest.mark.parametrize(("share", "want"), [(0, 1), (1e-9, 1), (0.1, 30), (0.5, 150), (0.9, 256), (0.999, 256)])
def test_how_much_is_held_out(tokenizer: Any, share: float, want: int) -> None:
    spec = write("book.txt", " ".join(f"alpha{number}" for number in range(900)))
    ids = token_blocks(spec, tokenizer, seq_len=8, samples=None).ids
    write_rows("rows.jsonl", [{"text": tokenizer.decode(block)} for block in ids[:300]])
    count = len(token_blocks("rows.jsonl", tokenizer, seq_len=9, samples=None).ids)
    train, held = lessons("rows.jsonl", tokenizer, seq_len=9, seed=0, held_out=share)
    assert count == 300 - 1 or count == 300
    assert len(held) == (want if want in (1, 256) else round(share * count))
    assert len(train) + len(held) == count
    assert not {tuple(row) for row in train.ids} & {tuple(row) for row in held.ids}


def test_repeated_text_is_not_learnt_where_it_is_held_out() -> None:
    tokenizer = chats_of()
    rows = [{"messages": chat("a", f"b{number % 10}")} for number in range(40)]
    train, held = lessons(write_rows("chats.jsonl", rows), tokenizer, seq_len=32, seed=0, held_out=0.05)
    assert len(held) == 2
    distinct = {tuple(row) for row in held.ids}
    assert not {tuple(row) for row in train.ids} & distinct
    assert len(train) == 40 - 4 * len(distinct)
    assert train.notes == (f"{40 - 2 - len(train)} sequences equal held-out ones and are not trained on",)


def test_weights(tokenizer: Any) -> None:
    specs = [write(f"{name}.txt", story(seed, 400)) for seed, name in enumerate("abc")]
    plain, held = lessons(specs, tokenizer, seq_len=8, seed=0, held_out=0.1)
    heavy, same = lessons(["a.txt=2", "b.txt=0.5", "c.txt=1.5"], tokenizer, seq_len=8, seed=0, held_out=0.1)
    assert same.digest == held.digest
    origin = {
        tuple(row): name
        for name in "abc"
        for row in token_blocks(f"{name}.txt", tokenizer, seq_len=8, samples=None).ids
    }
    for name, weight in zip("abc", (2, 0.5, 1.5)):
        mine = [tuple(row) for row in plain.ids if origin[tuple(row)] == name]
        times = [sum(tuple(row) == one for row in heavy.ids) for one in mine]
        assert sum(times) == round(weight * len(mine))
        assert set(times) <= {int(weight), int(weight + 0.5)}


def test_limit_draws_among_what_is_there(tokenizer: Any) -> None:
    spec = write("book.txt", story(1, 900))
    train, held = lessons(spec, tokenizer, seq_len=8, seed=0, held_out=0.1)
    few, same = lessons(spec, tokenizer, seq_len=8, seed=0, held_out=0.1, limit=20)
    assert len(few) == 20
    assert {tuple(row) for row in few.ids} < {tuple(row) for row in train.ids}
    assert same.digest == held.digest
    assert few.ids.tolist() != train.ids[:20].tolist()
    more, _ = lessons(spec, tokenizer, seq_len=8, seed=0, held_out=0.1, limit=10**6)
    assert more.digest == train.digest


def endless(read: dict[str, int]) -> Any:
    def rows(source: Any) -> Any:
        for number in itertools.count(1):
            read[source.path] = number
            if source.path == "chats":
                yield {"messages": chat(f"alpha{number}", f"gamma{number}")}
            else:
                yield {"text": story(number, 10)}

    return rows


def test_hub_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}
    monkeypatch.setattr("understudy.sources._hub_rows", endless(read))
    monkeypatch.setattr(data, "_BATCH_DOCUMENTS", 4)
    train, held = lessons("hf:chats", chats_of(), seq_len=32, seed=0, held_out=0.2, limit=100)
    assert [len(train), len(held)] == [100, round(0.2 * read["chats"])]
    assert 126 <= read["chats"] < 140
    train, _ = lessons("hf:text", chats_of(), seq_len=16, seed=0, held_out=0.2, limit=100)
    assert len(train) == 100
    assert read["text"] < 140
    lessons("hf:chats", chats_of(), seq_len=32, seed=0, held_out=0.9, limit=100)
    assert read["chats"] == 356  # no more than 256 are held out, whatever the share
    train, held = lessons(["hf:chats=3", "hf:text"], chats_of(), seq_len=32, seed=0, held_out=0.2, limit=400)
    assert 376 <= read["chats"] < 390
    assert len(train) == 400
    assert (~train.mask).any(axis=1).mean() == pytest.approx(0.75, abs=0.05)  # the weights are how far they are read
    with pytest.raises(DataError, match="none of the 128 chats of chats has an answer within 4 tokens"):
        lessons("hf:chats", chats_of(), seq_len=4, seed=0, held_out=0.2, limit=100)


def test_hub_without_a_limit_is_read_to_its_end(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("datasets")
    write_rows("corpus/train.jsonl", [{"text": story(seed, 10)} for seed in range(50)])
    local = lessons("corpus/train.jsonl", tokenizer, seq_len=8, seed=0, held_out=0.1)
    assert "read to its end" not in caplog.text
    hub = lessons(f"hf:{Path.cwd()}/corpus", tokenizer, seq_len=8, seed=0, held_out=0.1)
    assert both(hub) == both(local)
    assert "read to its end" in caplog.text


# ---- as a dataset ---------------------------------------------------------------------------------------------------


def test_items(tokenizer: Any) -> None:
    train, _ = lessons(write("book.txt", story(1, 300)), tokenizer, seq_len=8, seed=0, held_out=0.1)
    assert isinstance(train, torch.utils.data.Dataset)
    item = train[3]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "input_ids": (torch.int64, (8,)),
        "attention_mask": (torch.int64, (8,)),
        "labels": (torch.int64, (8,)),
        "index": (torch.int64, ()),
    }
    assert item["input_ids"].tolist() == train.ids[3].tolist()
    assert item["index"].item() == 3
    assert train[-1]["index"].item() == len(train) - 1
    with pytest.raises(IndexError):
        train[len(train)]


def test_the_loss_of_a_model_looks_at_answers_only(tmp_path: Path) -> None:
    tokenizer = chats_of(CHATML)
    write_rows("chats.jsonl", [{"messages": messages} for messages in CHATS[:2]] + [{"text": story(1, 70)}])
    train, _ = lessons("chats.jsonl", tokenizer, seq_len=48, seed=0, held_out=0.1)
    assert not train.mask.all() and train.mask[:, -1].any()  # chats and text
    model = OlmoeForCausalLM.from_pretrained(make_model(tmp_path / "model")).eval()
    model.resize_token_embeddings(len(tokenizer))
    [batch] = torch.utils.data.DataLoader(train, batch_size=len(train))
    assert batch["index"].tolist() == list(range(len(train)))
    with torch.no_grad():
        loss = model(**{name: value for name, value in batch.items() if name != "index"}).loss
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    picked = [
        -logits[row, place - 1, train.ids[row, place]].item()
        for row, place in zip(*np.nonzero(train.labels != -100))
        if place > 0
    ]
    assert loss.item() == pytest.approx(np.mean(picked), rel=1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        ([turn("user", "hi")], CHATML, r"chats.jsonl, document 2 is a chat without an assistant turn.*'content': 'hi'"),
        ([turn("user", "hi")], MARKED, "chats.jsonl, document 2 is a chat without an assistant turn"),
        ([turn("assistant", "hi")], CHATML, "chats.jsonl, document 2: the chat template does not write the chat"),
        (chat("a", "b"), "{{ messages | length }}", "does not write the chat up to an answer as the whole starts"),
        (chat("a", "b"), "{% generation %}{% endgeneration %}x", "marks none of its answers, .*'content': 'a'"),
        (
            chat("a", "b"),
            "{{ raise_exception('no') }}",
            r"chats: the chat template refuses the chat that starts.*\(no\)",
        ),
        (chat("a", "b"), None, "chats has chats, and the tokenizer has no chat template"),
    ],
)
def test_chats_without_answers(messages: Any, template: str | None, reason: str) -> None:
    tokenizer = make_tokenizer(eos_token=EOS, chat_template=template)
    write_rows("chats.jsonl", [{"text": "one"}, {"messages": messages}])
    with pytest.raises(DataError, match=reason) as caught:
        lessons("chats.jsonl", tokenizer, seq_len=32, seed=0, held_out=0.1)
    assert "\n" not in str(caught.value)


def test_chats_need_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("chats.jsonl", [{"messages": chat("a", "b")}])

    def no_jinja(*_: Any, **__: Any) -> None:
        raise ImportError("apply_chat_template requires jinja2")

    tokenizer = chats_of()
    monkeypatch.setattr(tokenizer, "apply_chat_template", no_jinja)
    with pytest.raises(DependencyError, match=r"pip install understudy\[data\]"):
        lessons("chats.jsonl", tokenizer, seq_len=32, seed=0, held_out=0.1)


def test_a_template_in_code_cannot_tell_answers(tokenizer: Any) -> None:
    class Mistral:  # the template in code, no attribute for it
        eos_token_id = 0

    write_rows("chats.jsonl", [{"messages": chat("a", "b")}])
    with pytest.raises(DataError, match=r"chats has chats, and Mistral does not tell answers.*jinja"):
        lessons("chats.jsonl", Mistral(), seq_len=32, seed=0, held_out=0.1)


def test_no_answer_is_left() -> None:
    write_rows("chats.jsonl", [{"messages": chat(story(seed, 40), "b")} for seed in range(3)])
    with pytest.raises(DataError, match=r"none of the 3 chats of chats.jsonl has an answer within 16 tokens: raise"):
        lessons("chats.jsonl", chats_of(), seq_len=16, seed=0, held_out=0.1)


@pytest.mark.parametrize(
    ("count", "reason"),
    [(5, "a has 5 tokens, and one sequence needs 8"), (12, "gives 1 sequence, and two are needed"), (16, None)],
)
def test_too_little_text(tokenizer: Any, count: int, reason: str | None) -> None:
    ids = tokenizer(story(1, 90))["input_ids"][:count]
    write("a.txt", tokenizer.decode(ids))
    if reason is None:
        assert [len(part) for part in lessons("a.txt", tokenizer, seq_len=8, seed=0, held_out=0.9)] == [1, 1]
        return
    with pytest.raises(DataError, match=reason):
        lessons("a.txt", tokenizer, seq_len=8, seed=0, held_out=0.1)


def test_text_that_only_repeats_itself() -> None:
    write_rows("chats.jsonl", [{"messages": chat("a", "b")}] * 5)
    with pytest.raises(DataError, match="each of the 5 sequences equals a held-out one"):
        lessons("chats.jsonl", chats_of(), seq_len=32, seed=0, held_out=0.1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seq_len": 1}, "seq_len 1"),
        ({"seed": -1}, "seed -1"),
        ({"held_out": 1.0}, "held_out 1.0"),
        ({"held_out": -0.1}, "held_out -0.1"),
        ({"held_out": float("nan")}, "held_out nan"),
        ({"limit": 0}, "limit 0"),
        ({"specs": ()}, "no text to train on"),
        ({"specs": "none.txt"}, "no such file"),
        ({"specs": "a.txt=0.001"}, "the weights leave no sequence"),
    ],
)
def test_bad_settings(tokenizer: Any, settings: dict[str, Any], reason: str) -> None:
    write("a.txt", story(1, 90))
    given = {"specs": "a.txt", "seq_len": 8, "seed": 0, "held_out": 0.1} | settings
    with pytest.raises(DataError, match=reason):
        lessons(given.pop("specs"), tokenizer, **given)


def test_most_held_out_is_what_the_docstring_says() -> None:
    assert str(module.MOST_HELD_OUT) in (lessons.__doc__ or "")
