"""Comparisons on the trained demo model: equal bytes, the figures of apply and eval, resuming, ties, bad input."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from small import model_folder, text_file
from understudy import speed
from understudy.cli import app
from understudy.comparison import (
    ALL,
    Original,
    Record,
    ResultSet,
    load_records,
    load_results,
    record_name,
)
from understudy.contest import budget, command_line, groups_of, read_entrants
from understudy.errors import OutputError, PlanError, StatsError, UnderstudyError
from understudy.facts import LayerFacts, ModelFacts
from understudy.plans import load_plan
from understudy.recipe import Comparison
from understudy.skeleton import Skeleton
from understudy.speed import measure_speed
from understudy.stages.apply import apply
from understudy.stages.compare import compare
from understudy.stages.evaluate import evaluate
from understudy.summary import differs, summarise
from understudy.trial import Trial

DEMO = Path(__file__).parents[1] / "examples" / "demo"
MODEL = DEMO / "model"
TEST = (str(DEMO / "test" / "math.jsonl.xz"), str(DEMO / "test" / "code.jsonl.xz"))
TEXT: dict[str, Any] = {
    "data": str(DEMO / "train" / "math.jsonl.xz"),
    "samples": 4,
    "seq_len": 64,
    "test": TEST,
    "test_samples": 6,
    "test_seq_len": 64,
}
QUICK = TEXT | {"no_speed": True, "examples": 0}
SMALL = QUICK | {"methods": "random,reap:constant", "ratios": ".25,.5", "seeds": "0,1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a comparison; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("compare") / "results"
    compare(MODEL, folder, **SMALL)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def figures(results: ResultSet) -> dict[str, dict[str, Any]]:
    """Records by name, without how long they took."""
    return {record.name: record.model_dump(exclude={"seconds"}) for record in results.results}


# ---- what is found --------------------------------------------------------------------------------------------------


def test_every_method_meets_the_same_budget(finished: Path) -> None:
    results = load_results(finished)
    assert [(r.label, r.ratio, r.seed) for r in results.results] == [
        (label, ratio, seed) for label in ("random", "reap:constant") for ratio in (0.25, 0.5) for seed in (0, 1)
    ]
    facts = results.model
    for record in results.results:
        assert record.skipped is None and record.bytes is not None
        assert record.budget_bytes == budget(facts, record.ratio)
        assert 0 <= record.budget_bytes - record.bytes < 4 * 16 * 2 * 128 * 2  # less than rows and constants
        replaced = {len(next(iter(kinds.values()))) for kinds in load_plan(finished / record.plan).layers.values()}
        assert replaced == {round(16 * record.ratio)}, "the room for constants spares no one an expert more"
        assert record.kind == ("constant" if record.label == "reap:constant" else "drop")


def test_figures_are_those_of_apply_and_eval(finished: Path, tmp_path: Path) -> None:
    results = load_results(finished)
    for record in results.results:
        if record.seed or record.ratio == 0.25:
            continue
        folder = tmp_path / record.name
        apply(MODEL, finished / record.plan, folder, stats=finished / record.stats)
        found = evaluate(folder, against=MODEL, data=TEST, samples=6, seq_len=64, examples=0)
        assert record.bytes == found.bytes
        assert record.params == found.params
        assert {name: x.perplexity for name, x in record.sources.items()} == pytest.approx(found.perplexity, rel=1e-9)
        assert {name: x.kl for name, x in record.sources.items()} == pytest.approx(found.kl_by_source, rel=1e-9)
        assert {n: x.top1_agreement for n, x in record.sources.items()} == pytest.approx(found.top1_by_source)
        assert found.against is not None
        assert results.original.perplexity == pytest.approx(found.against["perplexity"], rel=1e-9)
        assert (results.original.bytes, results.original.params) == (found.against["bytes"], found.against["params"])


def test_sums_and_means_of_a_record_agree(finished: Path) -> None:
    for record in load_results(finished).results:
        total, parts = record.sources[ALL], [x for name, x in record.sources.items() if name != ALL]
        assert set(record.sources) == {"math", "code", ALL}
        assert total.tokens == sum(x.tokens for x in parts) == 6 * 63
        assert total.kl_sum == pytest.approx(sum(x.kl_sum for x in parts))
        assert record.kl == total.kl == total.kl_sum / total.tokens > 0.01
        assert record.perplexity == total.perplexity == pytest.approx(math.exp(total.nll_sum / total.tokens))
        assert record.top1_agreement == total.agree / total.tokens < 1
        assert [x.kl for x in record.worst] == sorted((x.kl for x in record.worst), reverse=True)
        assert np.mean([x.kl for x in record.worst]) == pytest.approx(record.kl)  # all 6 blocks are named


def test_seeds_draw_other_text_and_other_random_experts(finished: Path) -> None:
    records = {record.name: record for record in load_results(finished).results}
    for label in ("random", "reap-constant"):
        assert records[f"{label}-0.5-seed0"].kl != records[f"{label}-0.5-seed1"].kl
    assert {r.stats for r in records.values()} == {"stats-seed0.safetensors", "stats-seed1.safetensors"}


def test_the_table_has_a_row_a_record(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "results.csv").open()))
    table = (finished / "results.md").read_text().splitlines()
    assert {line.split("`")[1] for line in table if line.startswith("| `")} == {row["label"] for row in rows}
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
    records = load_results(finished).results
    assert [row["label"] for row in rows] == [record.label for record in records]
    for row, record in zip(rows, records, strict=True):
        assert float(row["kl"]) == record.kl
        assert float(row["perplexity:code"]) == record.sources["code"].perplexity
        assert int(row["bytes"]) == record.bytes
        assert int(row["params_active"]) == (record.params or {})["active"]
        assert row["prefill"] == row["skipped"] == ""


def test_tasks_are_answered_by_a_model_that_is_gone_afterwards(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    asked = {"tasks": "demo_math_arith", "include_path": str(DEMO / "tasks"), "limit": 2}
    one = QUICK | asked | {"methods": "random", "ratios": ".5", "seeds": "0"}
    results = compare(MODEL, tmp_path / "out", **one)
    assert results.original.tasks.keys() == results.results[0].tasks.keys() == {"demo_math_arith"}
    assert 0 <= (results.results[0].tasks["demo_math_arith"]["acc"] or 0) <= 1
    assert not list((tmp_path / "out").glob(".model*"))
    assert "demo_math_arith:acc" in (tmp_path / "out" / "results.csv").read_text()
    with pytest.raises(OutputError, match="was made with --tasks left out, not demo_math_arith"):
        compare(MODEL, folder, **(SMALL | asked))


# ---- going on -------------------------------------------------------------------------------------------------------


def test_an_interrupted_comparison_goes_on(finished: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == ("compare", 1):
            raise KeyboardInterrupt

    one = SMALL | {"ratios": ".5", "seeds": "0"}
    with pytest.raises(KeyboardInterrupt):
        compare(MODEL, tmp_path / "out", **one, progress=interrupt)
    assert len(load_results(tmp_path / "out").results) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*seed0*")}
    results = compare(MODEL, tmp_path / "out", **one)
    assert figures(results) == figures(load_results(tmp_path / "out"))
    assert len(results.results) == 2 and figures(results).items() <= figures(load_results(finished)).items()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_finished_comparison_is_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "walk_original", lambda *args: pytest.fail("walked"))
    before = load_results(folder)
    assert compare(MODEL, folder, **SMALL).results == before.results
    assert len(load_results(folder).commands) == 2  # the other named another folder


def test_methods_ratios_and_seeds_can_be_added(folder: Path) -> None:
    before = figures(load_results(folder))
    results = compare(MODEL, folder, **(SMALL | {"methods": "frequency,random", "ratios": ".75", "seeds": "1"}))
    assert before.items() <= figures(results).items()
    new = [record.name for record in results.results if record.name not in before]
    assert new == ["random-0.75-seed1", "frequency-0.75-seed1"]


def test_a_method_that_needs_more_sums_gets_a_calibration_that_has_them(folder: Path) -> None:
    groups = groups_of(read_entrants(["heapr"]))
    assert groups
    plain = (folder / "stats-seed0.safetensors").read_bytes()
    one = {"methods": "heapr,random", "ratios": ".5", "seeds": "0"}
    results = compare(MODEL, folder, **(SMALL | one))
    (record,) = (r for r in results.results if r.label == "heapr")
    assert record.skipped is None
    assert record.stats == f"stats-seed0-{'-'.join(groups)}.safetensors"
    assert (folder / "stats-seed0.safetensors").read_bytes() == plain
    assert record.kl < next(r.kl for r in results.results if r.name == "random-0.5-seed0")


def test_a_sequential_method_gets_statistics_of_its_own(tmp_path: Path) -> None:
    results = compare(MODEL, tmp_path / "out", **(QUICK | {"methods": "ream", "ratios": ".5", "seeds": "3"}))
    (record,) = results.results
    assert (record.skipped, record.sequential, record.stats) == (None, True, "stats-seed3-ream-0.5.safetensors")
    assert record.bytes is not None and record.bytes <= record.budget_bytes
    assert sorted(path.name for path in (tmp_path / "out").glob("stats*")) == [record.stats]


def test_skipped_methods_say_why_and_are_tried_again(folder: Path) -> None:
    impossible = {"methods": "naee,router_norm_change", "ratios": ".5", "seeds": "0"}
    found = {record.label: record for record in compare(MODEL, folder, **(SMALL | impossible)).results}
    assert "too many" in (found["naee"].skipped or "")
    assert "calibrate with --base" in (found["router_norm_change"].skipped or "")
    assert found["naee"].kl is None and found["naee"].bytes is None
    assert found["random"].skipped is None
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [bool(row["skipped"]) for row in rows[-2:]] == [True, True]
    seen = []
    compare(MODEL, folder, **(SMALL | impossible), progress=lambda *at: seen.append(at))
    assert ("compare", 0, 2) in seen


# ---- speed ----------------------------------------------------------------------------------------------------------


def test_speed_and_examples_are_of_the_first_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "DECODED", 2)
    source = model_folder(tmp_path / "model")
    text = text_file(tmp_path / "text.txt", words=900)
    more = {"data": text, "test": text_file(tmp_path / "test.txt", seed=1), "samples": 4, "seq_len": 16}
    more |= {"methods": "random", "ratios": ".5", "test_samples": 4, "test_seq_len": 16, "examples": 1}
    results = compare(source, tmp_path / "out", **more, seeds="0,1")
    first, second = results.results
    assert first.speed is not None and second.speed is None
    assert len(first.examples) == 1 and not second.examples
    assert first.examples[0].block == first.worst[0].block
    assert first.speed.prompt_tokens == 16
    assert min(first.speed.prefill, first.speed.decode, first.speed.prefill_ratio, first.speed.decode_ratio) > 0
    skeleton = Skeleton(source)
    saved = results.original.bytes - (first.bytes or 0)
    assert first.speed.original_peak_memory_bytes - first.speed.peak_memory_bytes == pytest.approx(saved, rel=0.5)
    assert first.speed.original_peak_memory_bytes > skeleton.checkpoint.nbytes
    assert results.notes == []
    with pytest.raises(OutputError, match="holds something else than a comparison"):
        compare(source, tmp_path, **more)


def test_speed_of_a_model_against_itself(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model")
    found = measure_speed(Skeleton(source), Skeleton(source), np.arange(8, 24), decoded=3, repeats=1)
    assert found.peak_memory_bytes == found.original_peak_memory_bytes
    assert 0.1 < found.prefill_ratio < 10
    assert (found.decoded_tokens, found.repeats) == (3, 1)


def test_an_end_token_does_not_stop_the_clock(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model")
    model = Skeleton(source)
    model.model.generation_config.eos_token_id = list(range(64))  # whatever comes first would end it
    found = measure_speed(model, Skeleton(source), np.arange(8, 24), decoded=3, repeats=1)
    assert found.decoded_tokens == 3


def test_allocations_are_followed_until_they_are_let_go_of() -> None:
    known = torch.ones(100, 100)
    with speed._Allocations([known]) as seen:
        for _ in range(3):
            made = known @ known
            made = made + 1  # two at a time: the one before is let go of with its name
        view = made.view(-1)[:10]
        del made
    assert (seen.peak, seen._held) == (2 * 40_000, 40_000)
    assert view.shape == (10,)


# ---- summing up -----------------------------------------------------------------------------------------------------


def facts_of(experts: int = 10) -> ModelFacts:
    layer = LayerFacts(
        name="x", experts=experts, top_k=2, hidden=8, expert_params=24, expert_bytes=100, element_bytes=2
    )
    return ModelFacts(source="m", family="f", fingerprint="p", nbytes=5000, params=1, layers={"0": layer, "1": layer})


def made_up(kl: dict[tuple[str, float], list[float]]) -> ResultSet:
    records = [
        Record(
            name=record_name(label, ratio, seed),
            label=label,
            method=label,
            kind="drop",
            ratio=ratio,
            seed=seed,
            budget_bytes=1,
            bytes=1,
            kl=value,
            perplexity=math.exp(value),
            top1_agreement=0.5,
        )
        for (label, ratio), values in kl.items()
        for seed, value in enumerate(values)
    ]
    original = Original(bytes=1, params={}, tokens={}, perplexity={ALL: 1.0})
    return ResultSet(understudy="0", model=facts_of(), original=original, settings={}, results=records)


def test_differences_within_the_seed_spread_are_ties() -> None:
    found = summarise(
        made_up(
            {
                ("far", 0.5): [0.9, 0.91, 0.92],
                ("best", 0.5): [0.10, 0.12, 0.14],
                ("near", 0.5): [0.12, 0.14, 0.16],  # a seed spread away
                ("two", 0.5): [0.16, 0.18, 0.20],  # three seed spreads away
                ("best", 0.75): [0.5, 0.5, 0.5],
            }
        )
    )
    assert list(found.rows) == ["best", "near", "two", "far"] or found.ratios[len(found.ratios) // 2] == 0.75
    cells = {label: row[0.5] for label, row in found.rows.items()}
    assert {label: cell.tied for label, cell in cells.items()} == {
        "best": True,
        "near": True,
        "two": False,
        "far": False,
    }
    assert cells["best"].mean["kl"] == pytest.approx(0.12)
    assert cells["best"].sd["kl"] == pytest.approx(0.02)
    assert found.best == {0.5: "best", 0.75: "best"}


def test_rows_are_in_the_order_of_the_middle_ratio() -> None:
    found = summarise(made_up({("a", r): [r] for r in (0.2, 0.5, 0.8)} | {("b", r): [0.3] for r in (0.2, 0.5, 0.8)}))
    assert list(found.rows) == ["b", "a"]
    assert found.best == {0.2: "a", 0.5: "b", 0.8: "b"}
    assert found.rows["a"][0.8].tied is None, "one seed shows no spread"
    assert found.rows["a"][0.8].sd["kl"] is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1.0], [2.0], None), ([1.0, 1.0], [2.0], True), ([1.0, 3.0], [2.0, 4.0], False), ([], [1.0, 2.0], None)],
)
def test_a_difference_needs_a_spread_to_be_told(a: list[float], b: list[float], expected: bool | None) -> None:
    assert differs(a, b) is expected


def test_the_budget_has_room_for_constants() -> None:
    facts = facts_of(experts=10)
    assert budget(facts, 0.5) == 5000 - 1000 + 2 * 5 * 8 * 2
    assert budget(facts, 0.25) == 5000 - 500 + 2 * 3 * 8 * 2


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ""}, "--methods names no method; there is"),
        ({"methods": "reep"}, "no method is named 'reep' .did you mean 'reap'"),
        ({"methods": "reap,reap"}, "--methods names reap twice; leave one out"),
        ({"methods": "reap,reap:drop"}, "--methods names reap and reap:drop, which are the same"),
        ({"methods": "reap:constnt"}, "no kind is named 'constnt' .did you mean 'constant'"),
        ({"methods": "reap:merge"}, "reap cannot make merge; there is"),
        ({"methods": "reap:drop:constant"}, "names two kinds, drop and constant"),
        ({"methods": "heapr:width_class=4"}, "width_class is no setting here .did you mean 'width_classes'"),
        ({"methods": "heapr:width_classes=four"}, "width_classes: Input should be a valid integer"),
        ({"methods": "reap:ratio=.5"}, "ratio is no setting here"),
        ({"ratios": ".5,1"}, "--ratios 1 is no share"),
        ({"ratios": "half"}, "ratios.0: Input should be a valid number"),
        ({"ratios": ".5,0.5"}, "--ratios names 0.5 twice"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"seeds": "-1"}, "--seeds -1 is below 0"),
        ({"test": ()}, "--test is missing"),
        ({"limit": 3}, "--limit has no effect without --tasks"),
        ({"test_seq_len": 5000}, "--test-seq-len 5000 is more than the 512 positions"),
        ({"data": "nowhere.txt"}, "there is no such file"),
        ({"method": "reap"}, "method: Extra inputs are not permitted"),
    ],
)
def test_bad_settings_leave_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnderstudyError, match=message):
        compare(MODEL, tmp_path / "out", **(SMALL | options))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused_and_kept(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    text = text_file(tmp_path / "text.txt")
    other = model_folder(tmp_path / "model")
    with pytest.raises(OutputError, match=r"compares on .*model .*, not on .*; choose another --out"):
        compare(other, folder, **(SMALL | {"data": text, "test": text, "seq_len": 16, "test_seq_len": 16}))
    with pytest.raises(OutputError, match="was made on other test text"):
        compare(MODEL, folder, **(SMALL | {"test_samples": 5}))
    with pytest.raises(OutputError, match="was made with --samples 4, not 5; the figures could not be compared"):
        compare(MODEL, folder, **(SMALL | {"samples": 5}))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_text_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"text": "two and two are four " * 200}) + "\n")
    one = QUICK | {"data": str(train), "methods": "random", "ratios": ".5", "seeds": "0"}
    compare(MODEL, tmp_path / "out", **one)
    train.write_text(json.dumps({"text": "seven and two are nine " * 200}) + "\n")
    compare(MODEL, tmp_path / "out", **one)  # nothing is calibrated any more
    with pytest.raises(StatsError, match="was made of other text than --data is now"):
        compare(MODEL, tmp_path / "out", **(one | {"methods": "reap"}))


def test_damaged_results_are_named(folder: Path) -> None:
    (folder / "records" / "random-0.5-seed0.json").write_text("{")
    with pytest.raises(
        UnderstudyError, match=r"random-0.5-seed0.json: not results of `understudy compare`, or damaged"
    ):
        load_records(folder)
    (folder / "results.json").write_text('{"format": 2}')
    with pytest.raises(UnderstudyError, match="results of format 2, this version reads 1"):
        compare(MODEL, folder, **SMALL)
    with pytest.raises(UnderstudyError, match=r"holds no results.json; `understudy compare` writes one"):
        load_results(folder / "plans")


def test_a_model_with_stand_ins_is_refused(finished: Path, tmp_path: Path) -> None:
    plan, stats = finished / "plans" / "reap-constant-0.5-seed0.yaml", finished / "stats-seed0.safetensors"
    apply(MODEL, plan, tmp_path / "model", stats=stats)
    with pytest.raises(PlanError, match="holds stand-ins already; compare on the original model"):
        compare(tmp_path / "model", tmp_path / "out", **SMALL)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_shows_what_the_function_finds(folder: Path) -> None:
    words = ["compare", str(MODEL), "--methods", "random,reap:constant", "--ratios", ".25,.5", "--seeds", "0,1"]
    words += ["--data", TEXT["data"], "--test", TEST[0], "--test", TEST[1], "--test-samples", "6", "--samples", "4"]
    words += ["--seq-len", "64", "--test-seq-len", "64", "--no-speed", "--examples", "0", "--out", str(folder)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "KL at 0.25" in shown.output and "reap:constant" in shown.output and "±" in shown.output
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    summary = summarise(load_results(folder))
    assert data["summary"] == json.loads(summary.model_dump_json())
    assert len(data["results"]) == 8
    again = load_results(folder).commands[-1]
    assert "--methods random,reap:constant --seeds 0,1" in again.replace("--ratios 0.25,0.5 ", "")
    words[words.index("reap:constant".join(["random,", ""]))] = "random,reep"
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "did you mean 'reap'" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_the_recorded_command_repeats_the_call() -> None:
    settings = Comparison(methods="a,b:drop", ratios=".1", test=("x y.txt",), no_speed=True)
    assert command_line("m", "o", settings) == (
        "understudy compare m --methods a,b:drop --ratios 0.1 --test 'x y.txt' --no-speed --out o"
    )
