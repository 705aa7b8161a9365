"""Reports of real small runs: what they say, that no text becomes markup, and that a page needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tiny
import understudy
from understudy import examples, reports
from understudy.cli import app
from understudy.comparison import Record, ResultSet, load_results, save_results
from understudy.data import token_blocks
from understudy.errors import UnderstudyError
from understudy.metrics import Metrics
from understudy.plans import Plan, PlanModel, load_plan
from understudy.reports import charts, maps, words
from understudy.reports.markup import Html, join, printable, tag
from understudy.skeleton import Skeleton
from understudy.stages.compare import compare
from understudy.stats import load_stats

VOID = {"br", "col", "meta"}
EVIL = '</title></pre><script>alert("1")</script> & <img src=x onerror=alert(2)> $\\frac{1}{2}$ \x00\x1b'
SEEN = '</title></pre><script>alert("1")</script> & <img src=x onerror=alert(2)> $\\frac{1}{2}$'
TEXT = {"samples": 6, "seq_len": 16, "batch_size": 2}


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, their text, and whether they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] in (["script"], ["style"]) else self.text).append(data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == name]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, two texts, and `small`: half of its experts constants, evaluated."""
    folder = tmp_path_factory.mktemp("report")
    tiny.make_model(folder / "model")
    tiny.make_text(folder, "notes", 1)
    tiny.make_text(folder, "letters", 2)
    data = (str(folder / "notes.jsonl"), str(folder / "letters.jsonl"))
    understudy.compress(folder / "model", folder / "small", ratio=0.5, data=data, **TEXT)
    understudy.eval(folder / "small", against=folder / "model", data=data, **TEXT)
    return folder


@pytest.fixture
def small(place: Path, tmp_path: Path) -> Path:
    """A copy of the compressed model, to change."""
    return Path(shutil.copytree(place / "small", tmp_path / "small", ignore=shutil.ignore_patterns("report.html")))


@pytest.fixture(scope="module")
def compared(place: Path) -> ResultSet:
    """A real comparison of two methods in `place/compared`."""
    data = (str(place / "notes.jsonl"),)
    both = (*data, str(place / "letters.jsonl"))
    settings: dict[str, Any] = {"ratios": (0.5,), "seeds": (0, 1), "samples": 6, "seq_len": 16}
    settings |= {"test_samples": 4, "test_seq_len": 16, "batch_size": 2, "examples": 1}
    methods = ("random", "mone")
    return compare(place / "model", place / "compared", methods=methods, data=data, test=both, **settings)


def flat(text: str) -> str:
    """Text as `Page.words` has it."""
    return " ".join(printable(text).split())


def page_of(folder: Path) -> tuple[reports.Report, Page]:
    written = understudy.report(folder)
    return written, Page(written.path.read_text(encoding="utf-8"))


def check_page(page: Page) -> None:
    """What holds of every page: complete in itself, readable without seeing it, ids named once."""
    for name, attributes in page.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value.startswith("#"), f"{name} loads {value}"
            assert not key.startswith("on"), f"{name} has {key}"
            assert "javascript:" not in value
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.startswith("#"), f"{name} loads {target}"
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {name for name, _ in page.elements}
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not re.search(r"https?:|@import|url\(|fetch\(|import\(", "".join(page.scripts))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if (target := attributes.get("href", "")).startswith("#"):
            assert target[1:] in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    assert page.all("html")[0]["lang"] == "en"
    assert any("width=device-width" in a.get("content", "") for a in page.all("meta"))
    assert all(a.get("aria-label") and a.get("role") == "img" for a in page.all("svg"))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert len(page.all("h1")) == 1
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert all(b <= a + 1 for a, b in pairwise(levels)), "a level of headings is left out"


# ---- one model --------------------------------------------------------------------------------------------------


def test_report_of_a_model_says_what_was_measured(place: Path) -> None:
    written, page = page_of(place / "small")
    check_page(page)
    assert written.path == place / "small" / "report.html" and written.about == "model" and written.notes == ()
    assert written.nbytes == written.path.stat().st_size < 3_000_000
    metrics = json.loads((place / "small" / "understudy" / "metrics.json").read_text())
    before, after = metrics["against"], metrics["perplexity"]["all"]
    for said in (
        f"strays {words.number(metrics['kl'])} nats a token",
        f"perplexity is {words.number(after)} instead of {words.number(before['perplexity']['all'])}",
        f"{metrics['top1_agreement']:.1%} of the positions",
        f"{words.size(metrics['bytes'])} instead of {words.size(before['bytes'])}",
        "12 of 24 routed experts (50.0%), in 3 layers of 3, were replaced: 12 by “constant”",
        "90 predicted tokens",  # six blocks of 16 tokens, the first of which is not predicted
        metrics["provenance"]["against"]["fingerprint"],
        metrics["provenance"]["data"]["digest"],
    ):
        assert said in page.words, said
    by_source = {n: kl for n, kl in metrics["kl_by_source"].items() if n != "all"}
    assert f"Least damaged is {min(by_source, key=by_source.get)}" in page.words
    assert f"understudy eval {place / 'small'} --against {place / 'model'}" in page.words


def test_report_shows_continuations_and_hashes(small: Path) -> None:
    shown = json.loads((small / "understudy" / "examples.json").read_text())["examples"]
    _, page = page_of(small)
    assert len(shown) == 3
    for example in shown:
        assert flat(example["original"]) in page.words
        assert f"{example['source']}, block {example['block']}: KL {words.number(example['kl'])}" in page.words
    assert "CHANGED" not in page.words
    plan = small / "understudy" / "plan.yaml"
    plan.write_text(plan.read_text() + "# edited\n")
    assert page_of(small)[1].words.count("CHANGED since the model was written") == 1


def test_report_is_the_same_for_the_same_folder(small: Path) -> None:
    first = understudy.report(small).path.read_bytes()
    assert understudy.report(small).path.read_bytes() == first


def test_a_report_is_no_part_of_the_model(small: Path) -> None:
    checkpoint = Skeleton(small, device="cpu").checkpoint
    before = checkpoint.other_files
    assert understudy.report(small).path.exists() and before
    assert Skeleton(small, device="cpu").checkpoint.other_files == before


def test_report_without_metrics_says_which_command_adds_them(small: Path) -> None:
    (small / "understudy" / "metrics.json").unlink()
    (small / "understudy" / "examples.json").unlink()
    written, page = page_of(small)
    check_page(page)
    command = f"understudy eval {small} --against"
    assert len(written.notes) == 1 and command in written.notes[0]
    assert command in page.words and "not measured" in page.words
    assert "Worst examples" not in page.words
    assert words.size(sum(e.nbytes for e in Skeleton(small, device="cpu").checkpoint.entries.values())) in page.words


def test_report_of_a_model_that_was_only_applied(place: Path, tmp_path: Path) -> None:
    plan = place / "small" / "understudy" / "plan.yaml"
    stats = place / "small" / "understudy" / "stats.safetensors"
    understudy.apply(place / "model", plan, tmp_path / "out", stats=stats)
    _, page = page_of(tmp_path / "out")
    check_page(page)
    assert "holds no statistics" in page.words and "What the plan did" in page.words


def test_report_of_figures_alone_and_without_an_original(place: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    metrics = understudy.eval(model, data=str(place / "notes.jsonl"), **TEXT)
    written, page = page_of(model)
    check_page(page)
    assert f"Its perplexity is {words.number(metrics.perplexity['all'])}" in page.words
    assert "--against" in written.notes[0]


def test_report_of_a_model_that_was_trained_twice(place: Path, small: Path, tmp_path: Path) -> None:
    """Each training is told, with the commands from the original on; so does the card, which keeps what it said."""
    first, second = tmp_path / "first", tmp_path / "second"
    how: dict[str, Any] = {"train": str(place / "notes.jsonl"), "steps": 3, "batch": 2, "seq_len": 16}
    understudy.recover(small, first, teacher=place / "model", loss="lm+kd", **how)
    understudy.recover(first, second, **how | {"steps": 2})
    _, page = page_of(second)
    check_page(page)
    assert "Training 1 of 2" in page.words and "Training 2 of 2" in page.words
    record = json.loads((second / "understudy" / "recovery.json").read_text())
    for facts in (*record["earlier"], record):
        assert f"{words.parameters(facts['trained'])} parameters (stand-ins) were trained for" in page.words
        assert all(words.number(value) in page.words for value in facts["runs"][0]["held_out"].values())
    recipe, one, two = (page.words.index(f"understudy {x}") for x in ("compress", "recover small", "recover first"))
    assert recipe < one < two
    assert "--out small " in page.words[recipe:one] and f"--teacher {place / 'model'}" in page.words[one:two]
    card = (second / "README.md").read_text()
    assert card.count("## Recovery") == 2 and "Nothing was trained" not in card and "replaced by Understudy" in card
    assert "# second\n" in card and 'from_pretrained("second")' in card
    for text in ("{", "[]", json.dumps(record | {"chosen": 1}), json.dumps(record | {"runs": [{}]})):
        (second / "understudy" / "recovery.json").write_text(text)
        with pytest.raises(UnderstudyError, match=r"recovery.json: "):
            understudy.report(second)


def test_report_of_fewer_experts_for_a_token(place: Path, tmp_path: Path) -> None:
    """Nothing is called replaced where every expert stays."""
    data = str(place / "notes.jsonl")
    understudy.compress(place / "model", tmp_path / "out", method="compressed_experts", main_k=1, data=data, **TEXT)
    _, page = page_of(tmp_path / "out")
    check_page(page)
    experts = sum(layer.num_experts for layer in Skeleton(place / "model").layers)
    assert f"All {experts} routed experts were kept." in page.words
    assert f"nothing; {experts} kept" in page.words
    assert "1 of the 2 experts that a token chooses run, and vectors of the others" in page.words


def test_hostile_text_stays_text(small: Path) -> None:
    folder = small / "understudy"
    metrics = json.loads((folder / "metrics.json").read_text())
    renamed = {"notes": EVIL}
    for figures in (metrics["perplexity"], metrics["against"]["perplexity"], metrics["kl_by_source"]):
        figures |= {renamed.get(name, name): figures.pop(name) for name in list(figures)}
    metrics["top1_by_source"] |= {EVIL: 0.5}
    metrics["notes"] = [EVIL]
    metrics["tasks"] = {EVIL: {"acc": 0.5, "acc_stderr": 0.1}}
    metrics["against"]["tasks"] = {EVIL: {"acc": 0.9, "acc_stderr": 0.1}}
    metrics["provenance"]["against"]["source"] = EVIL
    metrics["provenance"]["data"]["specs"] = [EVIL]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    data = json.loads((folder / "examples.json").read_text())
    data["examples"][0] |= {
        "source": EVIL,
        "prompt": EVIL * 9,
        "original": EVIL,
        "model": f"x{EVIL}\ud800",
        "actual": EVIL,
    }
    (folder / "examples.json").write_text(json.dumps(data))
    plan = load_plan(folder / "plan.yaml")
    evil_model = plan.model.model_copy(update={"source": SEEN, "family": SEEN})
    plan.model_copy(update={"model": evil_model, "method": SEEN}).save(folder / "plan.yaml")
    _, page = page_of(small)
    check_page(page)
    assert page.words.count(" ".join(SEEN.split())) > 12
    assert "\x1b" not in "".join(page.text) and "�" in "".join(page.text)


@pytest.mark.parametrize("name", ["plan.yaml", "metrics.json", "examples.json", "recipe.json", "stats.safetensors"])
def test_damaged_files_of_a_model_are_one_line(small: Path, name: str) -> None:
    (small / "understudy" / name).write_text("{broken")
    result = CliRunner().invoke(app, ["report", str(small)])
    assert result.exit_code == 2
    assert name in result.stderr and result.stderr.count("\n") == 1
    assert not (small / "report.html").exists()


@pytest.mark.parametrize("metrics", ['{"format": 9}', "[]", '{"format": 1, "kl": "x"}'])
def test_figures_of_another_form_are_refused(small: Path, metrics: str) -> None:
    (small / "understudy" / "metrics.json").write_text(metrics)
    with pytest.raises(UnderstudyError, match=r"metrics\.json"):
        understudy.report(small)


def test_files_of_two_models_are_refused(small: Path) -> None:
    plan = load_plan(small / "understudy" / "plan.yaml")
    other = plan.model.model_copy(update={"fingerprint": "0" * 32})
    plan.model_copy(update={"model": other}).save(small / "understudy" / "plan.yaml")
    with pytest.raises(UnderstudyError, match="of two models"):
        understudy.report(small)


def test_folders_without_results_are_one_line(place: Path, tmp_path: Path) -> None:
    for folder, said in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "nothing to report on"),
        (place / "model", "nothing to report on"),
    ):
        result = CliRunner().invoke(app, ["report", str(folder)])
        assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_command_line_names_the_page(small: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(small), "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and data["out"] == str(small / "report.html") and data["about"] == "model"
    assert data["bytes"] == (small / "report.html").stat().st_size and data["notes"] == []
    assert str(small / "report.html") in "".join(CliRunner().invoke(app, ["report", str(small)]).stdout.split())


# ---- a comparison -----------------------------------------------------------------------------------------------


def test_report_of_a_comparison(place: Path, compared: ResultSet) -> None:
    written, page = page_of(place / "compared")
    check_page(page)
    assert written.about == "comparison" and written.nbytes < 3_000_000
    for label in ("random", "mone"):
        kl = [r.kl for r in compared.results if r.label == label and r.kl is not None]
        assert words.spread(float(np.mean(kl)), float(np.std(kl, ddof=1))) in page.words, label
    assert "2 methods at 1 size, with 2 calibration seeds each" in page.words
    assert compared.model.fingerprint in page.words and compared.commands[0] in page.words
    for name in ("KL by source", "Perplexity by source", "Top-1 agreement by source", "Memory and speed"):
        assert any(name.split(" by")[0] in a.get("aria-label", "") for a in page.all("div")), name
    example = next(r for r in compared.results if r.examples).examples[0]
    assert flat(example.original) in page.words


def results_of(compared: ResultSet, kl: dict[str, list[float]], ratios: tuple[float, ...] = (0.5,)) -> ResultSet:
    """The same comparison with other figures: methods by name, KL of each seed."""
    first = compared.results[0]
    about: dict[str, Any] = {"speed": None, "examples": []}  # for one seed only
    made = [
        first.model_copy(update={"label": label, "seed": seed, "kl": value, "ratio": ratio} | (about if seed else {}))
        for label, values in kl.items()
        for ratio in ratios
        for seed, value in enumerate(values)
    ]
    return compared.model_copy(update={"results": made})


def told(compared: ResultSet, kl: dict[str, list[float]], folder: Path) -> Page:
    save_results(results_of(compared, kl), folder)
    page = page_of(folder)[1]
    check_page(page)
    return page


def test_small_differences_are_not_called_differences(compared: ResultSet, tmp_path: Path) -> None:
    kl = {"near": [0.11, 0.10, 0.12], "best": [0.10, 0.11, 0.09], "far": [0.51, 0.50, 0.52]}
    said = told(compared, kl, tmp_path).words
    assert "best leads with KL 0.100 ± 0.010" in said
    assert "Not told apart from it: near." in said
    assert "Of those clearly behind, far is best (KL 0.510 ± 0.010)" in said


def test_one_seed_tells_no_difference(compared: ResultSet, tmp_path: Path) -> None:
    said = told(compared, {"a": [0.1], "b": [9.0]}, tmp_path).words
    assert "no difference between methods is called one" in said
    assert "a has the lowest KL 0.100" in said and "no error bars" in said and "one seed: open" in said
    assert "behind" not in said and "leads" not in said.split("Worst examples")[0]


def test_many_methods_get_six_colours_and_one_table_row_each(compared: ResultSet, tmp_path: Path) -> None:
    kl = {f"method{i:02}": [0.1 + i / 10, 0.11 + i / 10] for i in range(23)}
    save_results(results_of(compared, kl, (0.25, 0.5, 0.75)), tmp_path)
    parsed = page_of(tmp_path)[1]
    check_page(parsed)
    text = parsed.words
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in kl:  # figures, three sources tables and speed, at each of three sizes
        assert page.count(f'<th scope="row">{name}</th>') == 3 * 5
    named = re.findall(r"<title>(method\d\d)</title>", page)
    assert sorted(set(named)) == sorted(kl) and len(named) == 4 * len(kl)  # two figures, wide and narrow
    for i in range(6):
        assert f"var(--c{i})" in page
    assert "the other 17 are grey" in text
    svgs = re.findall(r'<svg class="(?:wide|narrow)".*?</svg>', page, re.DOTALL)
    assert len(svgs) == 4
    for svg in svgs:  # a colour of its own would be invisible in one of the two schemes
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg) and "<style" not in svg


def test_hostile_labels_sources_and_notes_stay_text(compared: ResultSet, tmp_path: Path) -> None:
    results = results_of(compared, {EVIL: [0.1, 0.2], "plain": [0.3, 0.4]})

    def evil(record: Record) -> Record:
        sources = {EVIL if name == "notes" else name: figures for name, figures in record.sources.items()}
        made = [e.model_copy(update={"source": EVIL, "model": EVIL}) for e in compared.results[0].examples]
        return record.model_copy(update={"sources": sources, "notes": [EVIL], "examples": made})

    original = results.original
    names = {EVIL if name == "notes" else name: n for name, n in original.tokens.items()}
    perplexity = {EVIL if name == "notes" else name: x for name, x in original.perplexity.items()}
    changed = {
        "results": [evil(r) for r in results.results],
        "original": original.model_copy(update={"tokens": names, "perplexity": perplexity}),
        "model": results.model.model_copy(update={"source": EVIL}),
        "commands": [EVIL],
        "settings": {EVIL: EVIL},
    }
    save_results(results.model_copy(update=changed), tmp_path)
    page = page_of(tmp_path)[1]
    check_page(page)
    assert page.words.count(" ".join(SEEN.split())) > 12


def test_skipped_methods_come_with_their_reason(compared: ResultSet, tmp_path: Path) -> None:
    results = results_of(compared, {"a": [0.1, 0.2]})
    bare = {"label": "b", "skipped": "b cannot do this", "kl": None, "bytes": None, "sources": {}, "perplexity": None}
    skipped = results.results[0].model_copy(update=bare | {"speed": None, "examples": []})
    save_results(results.model_copy(update={"results": [*results.results, skipped]}), tmp_path)
    said = page_of(tmp_path)[1].words
    assert "Skipped at some size: b;" in said and "skipped, b cannot do this" in said
    save_results(results.model_copy(update={"results": [skipped]}), tmp_path)
    with pytest.raises(UnderstudyError, match="no finished record yet: b was skipped, b cannot do this"):
        understudy.report(tmp_path)


@pytest.mark.parametrize("text", ["{broken", "[]", '{"format": 7}', '{"format": 1, "results": 3}'])
def test_damaged_results_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "results.json" in result.stderr and result.stderr.count("\n") == 1


def test_a_large_comparison_stays_below_three_megabytes(
    compared: ResultSet, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "compared", tmp_path / "large")
    whole = understudy.report(tmp_path / "large").nbytes
    monkeypatch.setattr(reports, "LARGEST", whole - 1)
    less = understudy.report(tmp_path / "large")
    assert less.nbytes < whole
    check_page(Page(less.path.read_text(encoding="utf-8")))


# ---- maps and figures -------------------------------------------------------------------------------------------


def plan_of(layers: dict[str, Any], experts: int = 6) -> Plan:
    counts = dict.fromkeys(["0", "1", "2"], experts)
    model = PlanModel(source="m", family="f", fingerprint="0" * 32, experts=counts, top_k=dict.fromkeys(counts, 2))
    return Plan(method="edited", model=model, layers=layers)


def cells(markup: str) -> dict[tuple[int, int], tuple[str, str]]:
    """Every cell of a map (layer, expert) with its style and what it is said to be."""
    found: dict[tuple[int, int], tuple[str, str]] = {}
    for label, style, path in re.findall(r'<path class="([^"]*)" d="([^"]*)"><title>([^<]*)', markup):
        label, style, path = path, label, style
        for x, y, width in re.findall(r"M([0-9.]+) ([0-9.]+)h([0-9.]+)", path):
            if style == "dot":
                continue
            for i in range(int(width)):
                assert (int(y), int(x) + i) not in found, "a cell is drawn twice"
                found[int(y), int(x) + i] = (style, label)
    return found


def test_plan_map_shows_every_expert_once() -> None:
    plan = plan_of({"0": {"constant": [0, 3]}, "1": {"merge": [[4, 1], [2, 3, 5]]}, "2": {"slim": {1: 16, 4: 2, 5: 0}}})
    drawn = str(maps.plan_map(plan, {"0": 16, "1": 16, "2": 16}))
    found = cells(drawn)
    assert len(found) == 18
    for row, key in enumerate(("0", "1", "2")):
        for expert in range(6):
            kind = plan.replaced(key).get(expert, "kept")
            assert found[row, expert][1].startswith(kind), (row, expert)
    assert found[1, 4] == found[1, 1] and "experts 1, 4 share one, under 4" in found[1, 4][1]
    assert found[1, 2] == found[1, 3] == found[1, 5] != found[1, 4]
    assert drawn.count("M4.32 1.32") == 1  # the dot on expert 4, which its group goes by
    widest, narrow, none = (found[2, i][1] for i in (1, 4, 5))
    assert widest == "slim: 80–100% of its neurons kept" and narrow == none == "slim: 0–20% of its neurons kept"
    assert "(2 constant, 5 merge, 3 slim; 8 kept)" in drawn


def test_plan_map_tells_ranks_from_neurons() -> None:
    drawn = maps.plan_map(plan_of({"0": {"low_rank": {1: 2, 4: 32}}}), {"0": 16})
    shown = cells(str(drawn))
    assert shown[0, 1][1] == "low_rank: rank 2" and shown[0, 4][1] == "low_rank: rank 32"
    assert "the stronger, the lower the rank" in drawn
    assert "2 (of rank 17.0 on average)" in maps.layer_table(plan_of({"0": {"low_rank": {1: 2, 4: 32}}}), None)


def test_use_and_scores_have_the_right_shades(place: Path) -> None:
    stats = load_stats(place / "small" / "understudy" / "stats.safetensors")
    counts = {key: layer.count for key, layer in stats.layers.items()}
    found = cells(str(maps.frequency(counts)))
    for row, (key, count) in enumerate(counts.items()):
        for expert in range(tiny.EXPERTS):
            share = count[expert] * tiny.EXPERTS / count.sum()
            bounds = [0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3]
            assert found[row, expert][0] == f"q{sum(share >= bound for bound in bounds)}", (key, expert)
    scored = cells(str(maps.scores("s", "a paper", {"0": np.array([0.0, 0.5, 0.89, 1.0])}, "")))
    assert [scored[0, i][0] for i in range(4)] == ["q0", "q4", "q8", "q8"]


def test_maps_of_a_very_large_model_stay_small() -> None:
    rng = np.random.default_rng(0)
    layers, experts = [str(i) for i in range(61)], 384
    counts = {key: rng.poisson(5, experts).astype(float) for key in layers}
    model = PlanModel(
        source="m", family="f", fingerprint="0", experts=dict.fromkeys(layers, experts), top_k=dict.fromkeys(layers, 8)
    )
    chosen = {key: {"constant": sorted(rng.choice(experts, 192, replace=False).tolist())} for key in layers}
    plan = Plan(method="mone", model=model, layers=chosen)
    drawn = join(maps.plan_map(plan, {}), maps.frequency(counts), maps.scores("s", "p", counts, ""))
    assert len(cells(str(maps.plan_map(plan, {})))) == 61 * 384
    assert len(drawn) + len(maps.layer_table(plan, counts)) < 1_500_000


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.54736, "0.547"),
        (56.524, "56.5"),
        (1039.4, "1,039"),
        (0, "0"),
        (9.999, "10.00"),
        (1e-6, "1.00e-06"),
        (None, "–"),
        (float("nan"), "not finite"),
    ],
)
def test_numbers_have_few_digits(value: float | None, said: str) -> None:
    assert words.number(value) == said


def test_spreads_share_the_place_of_their_mean() -> None:
    assert words.spread(0.2474, 0.0131) == "0.247 ± 0.013"
    assert words.spread(32.84, None) == "32.8"
    assert (
        words.change(32.9, 56.5) == "+71.7%" and words.change(8.93, 5.8) == "−35.1%" and words.change(2, 50) == "×25.0"
    )


def test_names_in_charts_are_moved_apart() -> None:
    spots = charts._spread([0.5, 0.5, 0.51, 0.99, 0.99], 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(spots)) and spots[-1] <= 1


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "<b>", Html("<i></i>"), ["&", None], title='"') == '<p title="&quot;">&lt;b&gt;<i></i>&amp;</p>'


# ---- examples ---------------------------------------------------------------------------------------------------


def test_continuations_are_what_the_whole_model_finds_most_likely(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "small").eval()
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 200, (3, 7))
    end = 0
    expected = []
    for prompt in prompts.tolist():
        ids = list(prompt)
        while len(ids) < 7 + 12 and (len(ids) == 7 or ids[-1] != end):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[7:])
    assert examples.continuations(Skeleton(place / "small", device="cpu"), prompts, 12, end) == expected
    stop = expected[0][3]  # a token that the model does write ends the text where it says so
    cut = examples.continuations(Skeleton(place / "small", device="cpu"), prompts[:1], 12, stop)
    assert cut == [expected[0][: expected[0].index(stop) + 1]]


def test_examples_are_the_blocks_of_the_largest_divergence(place: Path) -> None:
    data = [str(place / "notes.jsonl"), str(place / "letters.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    blocks = token_blocks(data, tokenizer, samples=6, seq_len=16)
    models = [AutoModelForCausalLM.from_pretrained(place / name).eval() for name in ("model", "small")]
    with torch.no_grad():
        p, q = (m(torch.from_numpy(blocks.ids).long()).logits[:, :-1].double().log_softmax(-1) for m in models)
    kl = (p.exp() * (p - q)).sum(-1).mean(-1).numpy()
    shown = json.loads((place / "small" / "understudy" / "examples.json").read_text())["examples"]
    assert [e["block"] for e in shown] == np.argsort(-kl)[:3].tolist()
    np.testing.assert_allclose([e["kl"] for e in shown], np.sort(kl)[::-1][:3], rtol=1e-4)
    for e in shown:
        ids = blocks.ids[e["block"]]
        assert e["prompt"] == tokenizer.decode(ids[:8]) and e["actual"] == tokenizer.decode(ids[8:])
        assert e["source"] == blocks.names[blocks.source[e["block"]]]


def test_examples_that_do_not_fit_are_a_note_and_stale_ones_go(
    small: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = small / "understudy" / "examples.json"
    asked: dict[str, Any] = {"against": place / "model", "data": str(place / "notes.jsonl"), **TEXT}
    assert shown.exists()
    monkeypatch.setattr(examples, "free_memory", lambda device: 1000)
    found: Metrics = understudy.eval(small, **asked)
    assert not shown.exists() and found.kl is not None
    assert any("no examples were generated" in note and "1.00 KB that are free" in note for note in found.notes)
    monkeypatch.undo()
    understudy.eval(small, **asked, examples=1)
    assert len(json.loads(shown.read_text())["examples"]) == 1
    understudy.eval(small, **asked, examples=0)
    assert not shown.exists()


def test_examples_need_an_original(small: Path, place: Path) -> None:
    with pytest.raises(UnderstudyError, match="--examples has no effect without --against"):
        understudy.eval(small, data=str(place / "notes.jsonl"), examples=5, **TEXT)


def test_saved_results_come_back(place: Path, compared: ResultSet) -> None:
    assert load_results(place / "compared").results == compared.results
