"""Text to token blocks: every way in, the cut and the draw against a slow reference, and every way to get it wrong."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.resources
import json
import logging
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from understudy import data, sources
from understudy.data import documents, parse_specs, token_blocks
from understudy.errors import DataError, DependencyError

EOS, BOS, SEP = "<|end|>", "<|start|>", "<|sep|>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def story(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    stems = rng.choice(["alpha", "béta", "gamma", "naïve", "東京"], size=words)
    return " ".join(f"{stem}{rng.integers(40)}" for stem in stems)


def make_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOS, BOS, SEP], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([story(0, 300)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token=EOS, model_max_length=16)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes) -> str:
    """Write a file, compressed as its suffix says."""
    raw = content.encode() if isinstance(content, str) else content
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(COMPRESS[Path(path).suffix if Path(path).suffix in COMPRESS else ""](raw))
    return path


def write_rows(path: str, rows: list[Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def reference(
    sources: list[list[str]], tokenizer: Any, seq_len: int, shares: list[int | None], seed: int, sep: int | None
) -> tuple[list[list[int]], list[int]]:
    """The specification, one token at a time."""
    ids, origin = [], []
    for index, texts in enumerate(sources):
        stream: list[int] = []
        for number, text in enumerate(texts):
            if number and sep is not None:
                stream.append(sep)
            stream += tokenizer(text)["input_ids"]
        blocks = []
        while len(stream) >= seq_len:
            blocks.append(stream[:seq_len])
            stream = stream[seq_len:]
        share = len(blocks) if shares[index] is None else min(shares[index], len(blocks))
        for pick in sorted(np.random.default_rng([seed, index]).choice(len(blocks), size=share, replace=False)):
            ids.append(blocks[pick])
            origin.append(index)
    return ids, origin


# ---- cutting and drawing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 7, 10])
@pytest.mark.parametrize("seq_len", [1, 5, 32])
def test_against_the_reference(tokenizer: Any, samples: int | None, seq_len: int) -> None:
    web = [story(seed, 30 + seed) for seed in range(1, 9)]
    book = story(20, 200)
    specs = [write_rows("web.jsonl.xz", [{"text": text} for text in web]), write("book.txt", book)]
    blocks = token_blocks(specs, tokenizer, seq_len=seq_len, samples=samples, seed=3)
    shares = [None, None] if samples is None else [samples - samples // 2, samples // 2]
    ids, origin = reference([web, [book]], tokenizer, seq_len, shares, 3, tokenizer.eos_token_id)
    assert blocks.ids.dtype == np.int32
    assert blocks.source.dtype == np.int16
    assert blocks.ids.tolist() == ids
    assert blocks.source.tolist() == origin
    assert blocks.names == ("web", "book")
    assert blocks.notes == ()
    assert blocks.of("book").tolist() == [row for row, index in zip(ids, origin, strict=True) if index == 1]
    with pytest.raises(DataError, match=r"no source 'wob'.*web, book"):
        blocks.of("wob")


def test_small_batches_change_nothing(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("web.jsonl", [{"text": story(seed, 20)} for seed in range(9)])
    whole = token_blocks("web.jsonl", tokenizer, seq_len=8, samples=6)
    for name, value in (("_BATCH_DOCUMENTS", 2), ("_BATCH_CHARACTERS", 10)):
        monkeypatch.setattr(data, name, value)
        assert token_blocks("web.jsonl", tokenizer, seq_len=8, samples=6).digest == whole.digest


def test_seed_and_digest(tokenizer: Any) -> None:
    spec = write("book.txt", story(1, 400))
    one, same, other = (token_blocks(spec, tokenizer, seq_len=8, samples=9, seed=seed) for seed in (1, 1, 2))
    assert one.digest == same.digest != other.digest
    assert one.digest == hashlib.sha256(b"8:" + one.ids.astype("<i4").tobytes()).hexdigest()
    wide = token_blocks(spec, tokenizer, seq_len=16, samples=None)
    narrow = token_blocks(spec, tokenizer, seq_len=8, samples=None)
    assert wide.digest != narrow.digest


def test_special_tokens_are_the_tokenizers_own() -> None:
    tokenizer = make_tokenizer(eos_token=EOS, bos_token=BOS)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    write_rows("web.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    [[*ids]] = token_blocks("web.jsonl", tokenizer, seq_len=5, samples=None).ids.tolist()
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert ids == [bos, a, eos, bos, b]  # the empty document leaves no trace, and nothing follows the last


@pytest.mark.parametrize("sep", [None, SEP])
def test_tokenizer_without_end_of_text(sep: str | None, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(sep_token=sep) if sep else make_tokenizer()
    write_rows("web.jsonl", [{"text": "alpha"}, {"text": "gamma"}])
    ids, _ = reference([["alpha", "gamma"]], tokenizer, 1, [None], 0, tokenizer.sep_token_id)
    blocks = token_blocks("web.jsonl", tokenizer, seq_len=1, samples=None)
    assert blocks.ids.tolist() == ids
    assert "no end-of-text token" in blocks.notes[0]
    assert blocks.notes[0] in caplog.text
    write("one.txt", "alpha")
    assert token_blocks("one.txt", tokenizer, seq_len=1, samples=None).notes == ()  # nothing was joined


@pytest.mark.parametrize(
    ("weights", "samples", "shares"),
    [
        (["", "", ""], 8, [3, 3, 2]),
        (["=2", "=1", "=1"], 8, [4, 2, 2]),
        (["=0.5", "", "=2.5"], 8, [1, 2, 5]),
        (["=0.1", "=0.2", "=0.1"], 10, [3, 5, 2]),  # 2.5, 5, 2.5: a tie, which floats would miss
    ],
)
def test_shares(tokenizer: Any, weights: list[str], samples: int, shares: list[int]) -> None:
    texts = [story(seed, 200) for seed in range(3)]
    specs = [write(f"{index}.txt", text) + weights[index] for index, text in enumerate(texts)]
    blocks = token_blocks(specs, tokenizer, seq_len=8, samples=samples)
    assert np.bincount(blocks.source).tolist() == shares
    assert blocks.ids.tolist() == reference([[text] for text in texts], tokenizer, 8, list(shares), 0, None)[0]


def test_shortfall_is_noted_and_not_made_up(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    specs = [write("small.txt", story(1, 12)), write("large.txt", story(2, 400))]
    have = len(tokenizer(story(1, 12))["input_ids"]) // 8
    blocks = token_blocks(specs, tokenizer, seq_len=8, samples=40)
    assert [len(blocks.of("small")), len(blocks.of("large"))] == [have, 20]
    assert blocks.notes == (f"small has only {have} of the 20 blocks that are its share; all are used",)
    assert blocks.notes[0] in caplog.text


def test_long_documents_do_not_warn(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer.deprecation_warnings.clear()
    chatty = make_tokenizer(eos_token=EOS, model_max_length=16, chat_template=TEMPLATE)
    logger = logging.getLogger("transformers.tokenization_utils_base")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        token_blocks(write("long.txt", story(1, 300)), tokenizer, seq_len=8, samples=2)
        chat = [{"role": "user", "content": story(2, 300)}]
        token_blocks(write_rows("chat.jsonl", [{"messages": chat}]), chatty, seq_len=8, samples=2)
        assert records == []
        tokenizer(story(1, 300))
        assert len(records) == 1  # the user's own calls still warn
    finally:
        logger.removeHandler(handler)
    assert "longer than" not in capfd.readouterr().out


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
def test_formats(suffix: str) -> None:
    texts = [story(seed, 15) for seed in range(4)]
    text_file = write(f"a.txt{suffix}", "\ufeffline one\r\nzwei €\n")
    rows = write(f"b.jsonl{suffix}", "\n".join(json.dumps({"text": t, "body": t[::-1]}) for t in texts) + "\n\n")
    assert list(documents(parse_specs(text_file)[0])) == ["line one\nzwei €\n"]
    assert list(documents(parse_specs(rows)[0])) == texts
    assert list(documents(parse_specs(f"{rows}:body")[0])) == [text[::-1] for text in texts]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_many_streams_in_one_file(suffix: str) -> None:
    compress = COMPRESS[suffix]
    padding = bytes.fromhex("502a4d1802000000") + b"xx" if suffix == ".zst" else b""  # a skippable frame, as pzstd has
    Path(f"a.txt{suffix}").write_bytes(padding + compress(b"one ") + padding + compress(b"") + compress(b"two"))
    assert list(documents(parse_specs(f"a.txt{suffix}")[0])) == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_large_compressed_file(suffix: str) -> None:
    rows = [{"text": f"{number} " * 50} for number in range(20_000)]
    write_rows(f"a.jsonl{suffix}", rows)
    assert [{"text": text} for text in documents(parse_specs(f"a.jsonl{suffix}")[0])] == rows


def test_folder_is_one_source_in_sorted_order() -> None:
    write("corpus/b/two.md", "two")
    write_rows("corpus/c.jsonl.gz", [{"text": "three"}, {"text": "four"}])
    write("corpus/a.txt", "one")
    write("corpus/.hidden", "no")
    write("corpus/.git/config", "no")
    [source] = parse_specs("corpus/=3")
    assert (source.kind, source.name, source.weight) == ("folder", "corpus", 3)
    assert list(documents(source)) == ["one", "two", "three", "four"]


def test_glob_gives_a_source_for_each_match() -> None:
    for name in ("b", "a", "deep/c"):
        write_rows(f"set/{name}.jsonl", [{"body": name}])
    sources = parse_specs("set/*.jsonl:body=2")
    assert [(s.name, s.field, s.weight) for s in sources] == [("a", "body", 2), ("b", "body", 2)]
    assert [list(documents(source)) for source in sources] == [["a"], ["b"]]
    assert [source.name for source in parse_specs("set/**/*.jsonl")] == ["a", "b", "c"]
    assert [(source.name, source.kind) for source in parse_specs("s?t/[bd]*")] == [("b", "file"), ("deep", "folder")]


def test_names_that_collide() -> None:
    specs = [write("x/wiki.txt", "1"), write("y/wiki.txt.xz", "2"), write_rows("y/wiki.jsonl", [{"text": "3"}])]
    specs += [write("book.txt", "4"), "y/wiki.jsonl:title"]
    names = [source.name for source in parse_specs(specs)]
    assert names == ["wiki.txt", "wiki.txt.xz", "wiki.jsonl", "book", "wiki.jsonl:title"]
    names = [source.name for source in parse_specs([specs[0], write("y/wiki.txt", "5"), write("z/x/wiki.txt", "6")])]
    assert [name.split("/")[-3:][-2:] for name in names] == [["x", "wiki.txt"], ["y", "wiki.txt"], ["x", "wiki.txt"]]
    assert len(set(names)) == 3
    assert names[1] == "y/wiki.txt"
    assert names[2] == "z/x/wiki.txt"


def test_names_and_weights_of_odd_paths() -> None:
    odd = {"a=2": "a=2", "a=b.txt": "a=b", "x.jsonl:y": "x.jsonl:y", "v1.5.md.gz": "v1.5", "[z].py": "[z].py"}
    for path, name in odd.items():
        [source] = parse_specs(write(path, "text"))
        assert (source.name, source.weight, source.path, source.field) == (name, 1, path, None)
    [source] = parse_specs("a=2=2")
    assert (source.path, source.weight) == ("a=2", 2)


def test_home_folder(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(in_folder))
    write("a.txt", "text")
    assert list(documents(parse_specs("~/a.txt=2")[0])) == ["text"]


def test_default_is_the_bundled_text(tokenizer: Any) -> None:
    asset = importlib.resources.files("understudy") / "assets/calibration.txt.xz"
    if not asset.is_file():
        with pytest.raises(DataError, match="bundled"):
            parse_specs(None)
        pytest.skip("the bundled text is not there")
    for specs in (None, [], "bundled"):
        [source] = parse_specs(specs)
        assert (source.name, source.kind, source.weight) == ("bundled", "file", 1)
    blocks = token_blocks(None, tokenizer, seq_len=64, samples=3)
    assert blocks.ids.shape == (3, 64)
    assert blocks.names == ("bundled",)


# ---- chats ----------------------------------------------------------------------------------------------------------


def test_chats_go_through_the_template_in_order() -> None:
    tokenizer = make_tokenizer(eos_token=EOS, chat_template=TEMPLATE)
    chat = [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "gamma!"}]
    both = {"text": "two", "messages": chat}
    write_rows("mixed.jsonl", [{"text": "one"}, {"messages": chat}, {"messages": []}, both])
    blocks = token_blocks("mixed.jsonl", tokenizer, seq_len=1, samples=None)
    want = f"one{EOS}[user] alpha?\n[assistant] gamma!\n{EOS}two"
    assert tokenizer.decode(blocks.ids[:, 0]) == want
    write_rows("talk.jsonl", [{"talk": chat}])
    assert list(documents(parse_specs("talk.jsonl:talk")[0])) == [chat]


@pytest.mark.parametrize("wrap", [list, lambda ids: {"input_ids": ids}])
def test_templates_that_give_ids_or_a_dict(tokenizer: Any, wrap: Callable[[list[int]], Any]) -> None:
    class Mistral:  # the template in code, no attribute for it, and no further arguments
        eos_token_id = 0

        def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> Any:
            assert tokenize
            return wrap(tokenizer(messages[0]["content"])["input_ids"])

    write_rows("chat.jsonl", [{"messages": [{"role": "user", "content": "alpha"}]}])
    blocks = token_blocks("chat.jsonl", Mistral(), seq_len=1, samples=None)  # type: ignore[arg-type]
    assert blocks.ids[:, 0].tolist() == tokenizer("alpha")["input_ids"]


def test_chats_without_or_against_the_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("chat.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
    with pytest.raises(DataError, match="chat has chats, and the tokenizer has no chat template"):
        token_blocks("chat.jsonl", tokenizer, seq_len=1, samples=1)
    strict = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"refuses the chat.*'role': 'tool'.*roles must alternate"):
        token_blocks("chat.jsonl", strict, seq_len=1, samples=1)

    def no_jinja(*_: Any, **__: Any) -> None:
        raise ImportError("apply_chat_template requires jinja2")

    monkeypatch.setattr(strict, "apply_chat_template", no_jinja)
    with pytest.raises(DependencyError, match=r"pip install understudy\[data\]"):
        token_blocks("chat.jsonl", strict, seq_len=1, samples=1)


# ---- hub datasets ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """A dataset folder of its own, read by the real `datasets` library."""
    pytest.importorskip("datasets")
    rows = [{"text": story(seed, 10), "body": story(seed + 1000, 10)} for seed in range(300)]
    write_rows("corpus/train.jsonl", rows)
    write_rows("corpus/test.jsonl", rows[:20])
    return rows


def test_hub_spec() -> None:
    [source] = parse_specs("hf:org/set[en]:validation:body=2")
    want = ("hub", "org/set", "en", "validation", "body", 2, "org/set[en]")
    assert (source.kind, source.path, source.config, source.split, source.field, source.weight, source.name) == want
    [source] = parse_specs("hf:org/set")
    assert (source.config, source.split, source.field, source.name) == (None, "train", None, "org/set")
    assert parse_specs("hf:org/set::body")[0].split == "train"
    assert [source.name for source in parse_specs(["hf:a[x]", "hf:a[y]"])] == ["a[x]", "a[y]"]
    assert [source.name for source in parse_specs(["hf:a", "hf:a:test"])] == ["a:train:text", "a:test:text"]


def test_hub_documents_in_order(hub: list[dict[str, str]], in_folder: Path) -> None:
    assert list(documents(parse_specs(f"hf:{in_folder}/corpus:train:body")[0])) == [row["body"] for row in hub]
    assert list(documents(parse_specs(f"hf:{in_folder}/corpus[default]:test")[0])) == [row["text"] for row in hub[:20]]


def test_hub_draws_from_the_start(tokenizer: Any, hub: list[dict[str, str]], in_folder: Path) -> None:
    blocks = token_blocks([f"hf:{in_folder}/corpus"], tokenizer, seq_len=8, samples=30)
    stream = reference([[row["text"] for row in hub]], tokenizer, 8, [None], 0, tokenizer.eos_token_id)[0]
    assert len(stream) > 300  # the draw is among fewer than there are
    picks = np.sort(np.random.default_rng([0, 0]).choice(4 * 30, size=30, replace=False))
    assert blocks.ids.tolist() == [stream[pick] for pick in picks]
    few = token_blocks([f"hf:{in_folder}/corpus"], tokenizer, seq_len=8, samples=2)
    assert few.ids.tolist() == [
        stream[pick] for pick in np.sort(np.random.default_rng([0, 0]).choice(2 + 64, size=2, replace=False))
    ]


def test_hub_is_read_no_further_than_needed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def endless(source: Any) -> Any:
        nonlocal read
        while True:
            read += 1
            yield {"text": story(read, 10)}

    monkeypatch.setattr("understudy.sources._hub_rows", endless)
    monkeypatch.setattr(data, "_BATCH_DOCUMENTS", 4)
    assert token_blocks("hf:endless", tokenizer, seq_len=8, samples=5).ids.shape == (5, 8)
    assert read < 60


def test_hub_read_to_its_end_or_short(
    tokenizer: Any, hub: list[dict[str, str]], in_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = f"hf:{in_folder}/corpus:test"
    stream = reference([[row["text"] for row in hub[:20]]], tokenizer, 8, [None], 0, tokenizer.eos_token_id)[0]
    assert token_blocks(spec, tokenizer, seq_len=8, samples=None).ids.tolist() == stream
    assert "read to its end" in caplog.text
    short = token_blocks(spec, tokenizer, seq_len=8, samples=1000)
    assert short.ids.tolist() == stream
    assert f"only {len(stream)} of the 1000" in short.notes[0]


@pytest.mark.parametrize(
    ("tail", "reason"),
    [(":nosplit", "nosplit"), ("[noconfig]", "noconfig"), ("/none", "none"), ("::title", "row 1 has no field 'title'")],
)
def test_hub_errors(hub: list[dict[str, str]], in_folder: Path, tail: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        list(documents(parse_specs(f"hf:{in_folder}/corpus{tail}")[0]))


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"needs datasets: pip install understudy\[data\]"):
        list(documents(parse_specs("hf:org/set")[0]))
    write("a.txt.zst", "text")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DependencyError, match=r"needs zstandard: pip install understudy\[data\]"):
        list(documents(parse_specs("a.txt.zst")[0]))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("none.txt", "'none.txt': there is no such file"),
        ("none/*.txt", "no such file, folder or match"),
        ("none.jsonl:text", "no such file"),
        ("a.txt:body", ":body names a JSON key, which only .jsonl files have"),
        ("a.txt=0", "weight '0' is not a positive number"),
        ("a.txt=-1", "weight"),
        ("a.txt=inf", "weight"),
        ("a.txt=nan", "weight"),
        ("a.txt=two", "weight 'two'"),
        ("hf:set=two", "weight 'two'"),
        ("hf:", "not of the form"),
        ("hf:set[en", "not of the form"),
        ("hf:set:train[:10]", "not of the form"),
        (" ", "empty"),
        ("hollow", "folder hollow holds no files"),
        ("x" * 5000, "no such file"),
    ],
)
def test_bad_specs_fail_at_once(spec: str, reason: str) -> None:
    write("a.txt", "text")
    write("hollow/.hidden", "text")
    with pytest.raises(DataError, match=reason) as caught:
        parse_specs(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "specs",
    [
        ["d/a.txt", "d/a.txt=2"],
        ["d/a.txt", "./d/../d/a.txt"],
        ["d/a.txt", "d/*.txt"],
        ["d/a.txt", "d"],
        ["d", "d/e"],
        ["d/e/b.jsonl", "d/e/b.jsonl:text"],
        ["link.txt", "d/a.txt"],
        ["hf:a", "hf:a:train:text"],
    ],
)
def test_the_same_text_twice(specs: list[str]) -> None:
    write("d/a.txt", "text")
    write_rows("d/e/b.jsonl", [{"text": "a", "title": "b"}])
    Path("link.txt").symlink_to("d/a.txt")
    with pytest.raises(DataError, match="given twice"):
        parse_specs(specs)
    with pytest.raises(DataError, match="given twice"):
        parse_specs(specs[::-1])
    assert len(parse_specs(["d", "d/e/b.jsonl:title", "hf:d", "hf:d:test", "hf:d[x]", "hf:d::title"])) == 6


@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.txt", b"one\ntw\xffo", "a.txt, line 2 is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.txt.gz", b"", "a.txt.gz is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\n', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2 is not UTF-8"),
        ("a.jsonl", b'["a"]\n', "line 1 is a JSON list"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', "no field 'text' or 'messages'; it has 'body', 'id'"),
        ("a.jsonl", b"{}\n", "none at all"),
        ("a.jsonl:title", b'{"text": "a"}\n', "no field 'title'; it has 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "field 'text' is int"),
        ("a.jsonl", b'{"text": null, "messages": []}\n', "field 'text' is NoneType"),
        ("a.jsonl", b'{"messages": ["hi"]}\n', "field 'messages' is list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "field 'messages' is list"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    ],
)
def test_bad_content(path: str, content: bytes, reason: str) -> None:
    write(path.removesuffix(":title"), content)
    with pytest.raises(DataError, match=reason) as caught:
        list(documents(parse_specs(path)[0]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stem", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "cut by one", "garbage", "tail"])
def test_damaged_compression(stem: str, suffix: str, damage: str) -> None:
    rows = "".join(json.dumps({"text": story(seed, 50)}) + "\n" for seed in range(200))
    whole = COMPRESS[suffix](rows.encode())
    broken = {"cut": whole[: len(whole) // 2], "cut by one": whole[:-1], "garbage": b"plain text"}
    Path(stem + suffix).write_bytes(broken.get(damage, whole + b"rubbish here"))
    if (suffix, damage) == (".xz", "tail"):  # the lzma module leaves what follows the stream alone
        return
    with pytest.raises(DataError, match=r"cannot be decompressed .*cut short or damaged"):
        list(documents(parse_specs(stem + suffix)[0]))


def test_file_that_goes_away() -> None:
    [source] = parse_specs(write("a.txt", "text"))
    Path("a.txt").unlink()
    with pytest.raises(DataError, match=r"a.txt cannot be read \(No such file"):
        list(documents(source))


def test_impossible_draws(tokenizer: Any) -> None:
    specs = [write("a.txt", story(1, 50)), write("b.txt", story(2, 50))]
    for sizes in ({"seq_len": 0, "samples": 1}, {"seq_len": 8, "samples": 0}, {"seq_len": 8, "samples": 1, "seed": -1}):
        with pytest.raises(DataError, match="at least"):
            token_blocks(specs, tokenizer, **sizes)
    with pytest.raises(DataError, match="b gets none of the 1 samples"):
        token_blocks(specs, tokenizer, seq_len=8, samples=1)
    with pytest.raises(DataError, match="weights have no effect"):
        token_blocks(["a.txt=2", "b.txt"], tokenizer, seq_len=8, samples=None)
    have = len(tokenizer(story(1, 50))["input_ids"])
    with pytest.raises(DataError, match=f"a has {have} tokens, and one block needs 5000"):
        token_blocks(specs, tokenizer, seq_len=5000, samples=2)
    write_rows("blank.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="blank has 0 tokens"):
        token_blocks("blank.jsonl", tokenizer, seq_len=8, samples=2)


@pytest.mark.parametrize("module", [data, sources])
def test_import_is_light(module: Any) -> None:
    imports = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.Import)]
    froms = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.ImportFrom)]
    roots = {name.name.split(".")[0] for node in imports for name in node.names}
    roots |= {(node.module or "").split(".")[0] for node in froms}
    assert roots - sys.stdlib_module_names <= {"numpy", "understudy"}
