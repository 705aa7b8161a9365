"""The plan as a file: what it looks like, every way to write it wrong, and what is told of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from understudy.errors import OutputError, PlanError
from understudy.facts import layer_order
from understudy.plans import Plan, PlanModel, check_model, load_plan
from understudy.stages.review import diff, show

TEXT = """\
# Understudy plan. Each layer names the original ids of experts under what they become; the others are kept as they are.
# Edit by hand: add, move or delete ids; a layer without an entry is untouched. Then: understudy check THIS_FILE
format: 1
method: mone
model:
  source: toy
  family: toy_moe
  fingerprint: 65514d0e
  experts: {0-3: 8, 5: 8, 5.vision: 4}
  top_k: {0-3: 2, 5: 2, 5.vision: 1}
stats: 0f0f
recipe: {ratio: 0.5, scope: layer, kind: constant, seed: 0}
layers:
  0: {constant: [3, 5, 7]}
  3: {constant: [1, 2], low_rank: [0]}
  "5.vision": {constant: [3]}
"""
EXPERTS = {"0": 8, "1": 8, "2": 8, "3": 8, "5": 8, "5.vision": 4}
TOP_K = {"0": 2, "1": 2, "2": 2, "3": 2, "5": 2, "5.vision": 1}
MODEL = PlanModel(source="toy", family="toy_moe", fingerprint="65514d0e", experts=EXPERTS, top_k=TOP_K)


def a_plan(layers: dict[Any, Any], **more: Any) -> Plan:
    return Plan(**({"method": "mone", "model": MODEL, "layers": layers} | more))


# --- the file ---


def test_a_plan_reads_as_it_was_written_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    plan = load_plan(tmp_path / "a.yaml")
    assert plan.model == MODEL
    assert plan.stats == "0f0f"
    assert plan.recipe == {"ratio": 0.5, "scope": "layer", "kind": "constant", "seed": 0}
    assert plan.layers == {
        "0": {"constant": (3, 5, 7)},
        "3": {"constant": (1, 2), "low_rank": (0,)},
        "5.vision": {"constant": (3,)},
    }
    assert plan.save(tmp_path / "deep" / "b.yaml").read_bytes() == TEXT.encode()
    assert os.listdir(tmp_path / "deep") == ["b.yaml"]


def test_a_plan_is_plain_yaml(tmp_path: Path) -> None:
    assert yaml.safe_load(TEXT)["layers"] == {
        0: {"constant": [3, 5, 7]},
        3: {"constant": [1, 2], "low_rank": [0]},
        "5.vision": {"constant": [3]},
    }


def test_order_and_empty_entries_make_no_difference() -> None:
    plan = a_plan({5: {"constant": [7, 1]}, "0": {"low_rank": [3], "constant": [5]}, 1: {"constant": []}, 2: None})
    assert plan.text() == a_plan({0: {"constant": [5], "low_rank": [3]}, 5: {"constant": [1, 7]}}).text()
    assert list(plan.layers) == ["0", "5"]
    assert a_plan({}).text() == a_plan({3: {}}).text()
    assert a_plan({}).text().endswith("layers: {}\n")


def test_a_plan_that_replaces_nothing_survives_the_file(tmp_path: Path) -> None:
    assert load_plan(a_plan({}).save(tmp_path / "p")) == a_plan({})
    (tmp_path / "p").write_text(TEXT.split("layers:")[0] + "layers:\n  # 3: {constant: [1]}\n")
    assert load_plan(tmp_path / "p").layers == {}


@pytest.mark.parametrize("text", ["a: b", "12", "0012", "null", "# x", "ünïcode", "a\nb", "{", "1e5", "'", "-", " "])
def test_any_text_survives_the_file(tmp_path: Path, text: str) -> None:
    model = MODEL.model_copy(update={"source": text, "fingerprint": text})
    plan = a_plan({0: {"constant": [1]}}, method=text, model=model, stats=text, recipe={"size": text, "note": None})
    assert load_plan(plan.save(tmp_path / "p")) == plan


@pytest.mark.parametrize("keys", [["0", "1", "2"], ["1", "3", "5"], ["0.vision", "0", "10", "9", "8"], ["7"], []])
def test_layers_of_the_model_survive_the_file(tmp_path: Path, keys: list[str]) -> None:
    for values in ([8] * len(keys), range(8, 8 + len(keys))):
        sizes = dict(zip(keys, values, strict=True))
        model = MODEL.model_copy(update={"experts": sizes, "top_k": sizes})
        loaded = load_plan(a_plan({}, model=model).save(tmp_path / "p"))
        assert loaded.model.experts == loaded.model.top_k == sizes
        assert list(loaded.model.experts) == layer_order(keys)


def test_layers_come_in_the_order_of_the_model() -> None:
    assert layer_order(["10", "2", "3.vision", "3", "1"]) == ["1", "2", "3", "3.vision", "10"]


def test_replaced_and_kept() -> None:
    plan = a_plan({3: {"constant": [6, 1], "low_rank": [0]}})
    assert plan.replaced("3") == {0: "low_rank", 1: "constant", 6: "constant"}
    assert list(plan.replaced("3")) == [0, 1, 6]
    assert plan.kept("3", 8) == (2, 3, 4, 5, 7)
    assert plan.replaced("0") == {}
    assert plan.kept("0", 3) == (0, 1, 2)


def test_saving_replaces_the_old_file_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_plan({}).save(tmp_path / "plan.yaml")
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=r"plan\.yaml: cannot be written \(No space left on device\)"):
        a_plan({0: {"constant": [1]}}).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["plan.yaml"]


BAD_FILES = {
    "layers:\n  0: {constant: [1, 2}\n": r"p\.yaml, line 14: not valid YAML",
    "layers:\n\t0: {}\n": r"line 14: not valid YAML",
    "layers:\n  0: {constant: [1]}\n  0: {constant: [2]}\n": r"line 15: not valid YAML \('0' comes twice\)",
    'layers:\n  0: {constant: [1]}\n  "0": {constant: [2]}\n': r"line 15: not valid YAML \('0' comes twice\)",
    "layers:\n  0: {constant: [1], constant: [2]}\n": r"line 14: not valid YAML \('constant' comes twice\)",
    "layers:\n  0: {constant: [010]}\n": r"line 14: not valid YAML \(write 010 as a plain decimal number\)",
    "layers:\n  0: {constant: [1_0]}\n": r"write 1_0 as a plain decimal number",
    "layers:\n  [1, 2]: {constant: [1]}\n": r"line 14: not valid YAML",
    "layers:\n  0: {constant: [2001-99-99]}\n": r"not valid YAML",
    "layers:\n  0: {constant: [1.5]}\n": r"p\.yaml: layer 0: constant: an expert id is a whole number, not 1\.5",
    "layers:\n  0: {constant: [1.0]}\n": r"an expert id is a whole number, not 1\.0",
    "layers:\n  0: {constant: [true]}\n": r"an expert id is a whole number, not True",
    "layers:\n  0: {constant: ['1']}\n": r"an expert id is a whole number, not '1'",
    "layers:\n  0: {merge: [[1, 2], 3]}\n": r"merge: a group of experts is a list of ids, not 3",
    "layers:\n  0: {merge: [[1, 2], [3, 2]]}\n": r"layer 0: expert 2 is named twice under merge",
    "layers:\n  0: {merge: [[1, [2]]]}\n": r"an expert id is a whole number, not \[2\]",
    "layers:\n  0: {slim: {3: -1}}\n": r"slim: expert 3: must come with a whole number, not -1",
    "layers:\n  0: {slim: {3: 1.5}}\n": r"slim: expert 3: must come with a whole number, not 1\.5",
    "layers:\n  0: {slim: {9: 1}}\n": r"layer 0: expert 9 is out of range",
    "layers:\n  0: {constant: [8]}\n": r"layer 0: expert 8 is out of range, its ids are 0 to 7",
    "layers:\n  5.vision: {constant: [4]}\n": r"layer 5\.vision: expert 4 is out of range, its ids are 0 to 3",
    "layers:\n  0: {constant: [-1]}\n": r"layer 0: expert -1 is out of range",
    "layers:\n  0: {constant: [1, 2, 1]}\n": r"layer 0: expert 1 is named twice under constant",
    "layers:\n  0: {constant: [1], drop: [1]}\n": r"layer 0: expert 1 is named under constant and under drop",
    "layers:\n  4: {constant: [1]}\n": r"layer 4: the model has no such MoE layer; it has 0-3, 5, 5\.vision",
    "layers:\n  0.0: {constant: [1]}\n": r"layers: 0\.0 is not a layer",
    "layers:\n  true: {constant: [1]}\n": r"layers: True is not a layer",
    "layers: [1, 2]\n": r"layers: must hold an entry for each layer",
    "layers: 0\n": r"layers: must hold an entry for each layer",
    "layers:\n  0: [1, 2]\n": r"layer 0: must name ids by kind, like \{constant: \[3, 17\]\}, not \[1, 2\]",
    "layers:\n  0: 0\n": r"layer 0: must name ids by kind",
    "layers:\n  0: {constant: 3}\n": r"layer 0: constant must be a list of expert ids, like \[3, 17\], .* not 3",
    "layers:\n  0: {constant: 0}\n": r"constant must be a list of expert ids",
    "layers:\n  0: {3: constant}\n": r"layer 0: 3 cannot be the name of a kind",
    "layer: {}\n": r"p\.yaml: layer is not a key of a plan \(did you mean 'layers'\?\)",
    "comment: hello\n": r"comment is not a key of a plan$",
    "recipe: {a: [1]}\n": r"recipe\.a.*: ",
}


@pytest.mark.parametrize("tail", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_plan_gets_one_clear_line(tmp_path: Path, tail: str) -> None:
    head = TEXT.split("layers:")[0]
    if tail.startswith("recipe"):
        head = head.split("recipe:")[0]
    path = tmp_path / "p.yaml"
    path.write_text(head + tail)
    with pytest.raises(PlanError, match=BAD_FILES[tail]) as caught:
        load_plan(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: 1\n", "format: 2\n", "a plan of format 2, this version reads 1"),
        ("format: 1\n", "", "a plan of format None, this version reads 1"),
        ("method: mone\n", "", "method is missing"),
        ("method: mone\n", "method: 7\n", "method: input should be a valid string, not 7"),
        ("  fingerprint: 65514d0e\n", "", r"model\.fingerprint is missing"),
        ("  family: toy_moe\n", "  familie: toy_moe\n", r"model\.famil(y is missing|ie is not a key)"),
        ("  source: toy\n", "  source: toy\n  origin: x\n", r"model\.origin is not a key of a plan"),
        ("  source: toy\n", "  source: toy\n  topk: {}\n", r"did you mean 'top_k'\?"),
        ("0-3: 8, 5: 8", "0-3: 8.5, 5: 8", r"model\.experts\.0: input should be a valid integer, not 8\.5"),
        ("experts: {0-3: 8", "experts: {0-2: 8", "model: experts and top_k must name the same layers"),
        (TEXT, "", "not a plan; it has no format, method, model and layers"),
        (TEXT, "- 1\n- 2\n", "not a plan"),
        (TEXT, "3: x\n", "not a plan"),
        (TEXT, "hello", "not a plan"),
    ],
)
def test_a_bad_head_gets_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TEXT.count(old) == 1
    (tmp_path / "p.yaml").write_text(TEXT.replace(old, new))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such plan; `understudy plan` writes one"):
        load_plan(tmp_path / "nowhere.yaml")
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path)
    for raw in (b"\xff\xfe\xfa\x00", b"a: \x00", b"a: \x80"):
        (tmp_path / "p").write_bytes(raw)
        with pytest.raises(PlanError, match="not valid YAML"):
            load_plan(tmp_path / "p")


def test_plans_made_in_python_are_checked_alike() -> None:
    with pytest.raises(PlanError, match=r"^layer 0: expert 1 is named under constant and under drop$"):
        a_plan({0: {"constant": [1], "drop": [1]}})
    with pytest.raises(PlanError, match=r"^metod is not a key of a plan"):
        a_plan({}, metod="x")
    with pytest.raises(PlanError, match="named twice, as a number and as text"):
        a_plan({0: {"constant": [1]}, "0": {"constant": [2]}})


def test_a_plan_of_another_model_is_refused_and_both_are_named() -> None:
    check_model(a_plan({}), "65514d0e")
    with pytest.raises(PlanError, match=r"made for toy \(65514d0e\), not for other \(ffff\)"):
        check_model(a_plan({}), "ffff", "other")


# --- show and diff ---


def test_show_tells_all_of_a_plan(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(TEXT)
    told = show(tmp_path / "p.yaml")
    assert told["method"] == "mone"
    assert told["model"] == {"source": "toy", "family": "toy_moe", "fingerprint": "65514d0e"}
    assert told["experts"] == 44
    assert told["replaced"] == {"constant": 6, "low_rank": 1}
    assert told["ratio"] == 7 / 44
    assert list(told["layers"]) == list(EXPERTS)
    assert told["layers"]["1"] == {"experts": 8, "kept": 8, "replaced": {}}
    assert told["layers"]["3"] == {
        "experts": 8,
        "kept": 5,
        "replaced": {"constant": {"count": 2, "ids": [1, 2]}, "low_rank": {"count": 1, "ids": [0]}},
    }


def test_diff_compares_expert_by_expert(tmp_path: Path) -> None:
    a = a_plan({0: {"constant": [1, 2]}, 3: {"constant": [4]}})
    b = a_plan({0: {"constant": [2, 3]}, 3: {"drop": [4]}}).save(tmp_path / "b.yaml")
    told = diff(a, b)
    assert told["same_model"] is True
    assert told["changed"] == 3
    assert told["agreement"] == 1 - 3 / 44
    assert told["overlap"] == 2 / 4
    assert told["layers"] == {
        "0": [{"expert": 1, "from": "constant", "to": "kept"}, {"expert": 3, "from": "kept", "to": "constant"}],
        "3": [{"expert": 4, "from": "constant", "to": "drop"}],
    }
    same = diff(a, a)
    assert (same["agreement"], same["overlap"], same["changed"], same["layers"]) == (1.0, 1.0, 0, {})
    assert diff(a_plan({}), a_plan({}))["overlap"] == 1.0
    sibling = a_plan({}, model=MODEL.model_copy(update={"fingerprint": "ffff"}))
    assert diff(a, sibling)["same_model"] is False
    wider = MODEL.model_copy(update={"experts": EXPERTS | {"0": 9}})
    with pytest.raises(PlanError, match="plans for toy and toy cannot be compared: their MoE layers or experts differ"):
        diff(a, a_plan({}, model=wider))
