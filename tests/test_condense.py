"""Condensed layers: what a plan says of them, what they become, and who can load that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
import zoo
from contract import close, condensed, ids_of, load, tensors_of, tiny_folder, walked, without_understudy
from understudy.errors import CheckpointError, PlanError
from understudy.experts import copied
from understudy.facts import ModelFacts
from understudy.kinds import check_plan, expected_bytes
from understudy.kinds.condense import slow_answer
from understudy.layout import model_facts
from understudy.moe import find_moe_layers
from understudy.plans import Plan, PlanModel, load_plan
from understudy.rehearsal import made_up
from understudy.sizes import count_params
from understudy.skeleton import Skeleton
from understudy.stats import Stats
from understudy.unrouted import leave_few
from understudy.verify import verify_folder
from understudy.virtual import outcome, planned

FEW = {3: 0.5, 1: -0.25, "rest": 0}
NONE = {"rest": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        return tiny_folder(family, tmp_path_factory.mktemp(family), dtype)

    return make


def facts_of(folder: Path) -> ModelFacts:
    return model_facts(Skeleton(folder), folder.name)


def plan_of(facts: ModelFacts, layers: dict[str, Any], **how: Any) -> Plan:
    entries = {key: {"condense": entry} for key, entry in layers.items()}
    return Plan(method="edited", model=PlanModel.of(facts), layers=entries, how={"condense": how} if how else {})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_of(), use_cache=False).logits


def reference(folder: Path, family: str, plan: Plan, facts: ModelFacts) -> torch.Tensor:
    """The original with the experts of condensed layers run one by one on every token."""
    with condensed(load(folder, family), plan, Stats(facts, {}, {})) as model:
        return logits(model)


def stock(folder: Path, family: str) -> Any:
    """Load as those do who never heard of understudy; no key may be missing or too many."""
    with without_understudy():
        model, info = zoo.model_class(family).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def refused(folder: Path, family: str) -> None:
    with without_understudy(), pytest.raises((RuntimeError, ValueError), match=r"size|shape|mismatch"):
        zoo.model_class(family).from_pretrained(folder)


# ---- the plan ----------------------------------------------------------------------------------------------------


def test_a_person_reads_and_writes_it(folder: Any, tmp_path: Path) -> None:
    facts = facts_of(folder("olmoe"))
    plan = plan_of(facts, {"1": {3: 0.0812, 7: -1e-05, "rest": 0}, "2": NONE, "3": dict.fromkeys(range(8), 1)})
    lines = plan.text().splitlines()
    assert "  1: {condense: {3: 0.0812, 7: -1.0e-05, rest: 0}}" in lines
    assert "  2: {condense: {rest: 0}}" in lines
    assert plan.layers["1"]["condense"] == {e: {3: 0.0812, 7: -1e-05}.get(e, 0) for e in range(8)}
    assert load_plan(plan.save(tmp_path / "plan.yaml")) == plan
    assert load_plan(tmp_path / "plan.yaml").text() == plan.text()
    assert plan.kept("1", 8) == ()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"1": {"condense": {3: 1, 4: 2}}}, "layer 1: condense takes whole layers; add `rest: 0` for the experts"),
        ({"1": {"condense": {3: 0.5}}}, r"expert 3: must come with a whole number, not 0\.5"),
        ({"1": {"condense": {3: float("nan"), "rest": 0}}}, "expert 3: must come with a number, not nan"),
        ({"1": {"condense": {3: True, "rest": 0}}}, "must come with a number, not True"),
        ({"1": {"condense": {"others": 0}}}, "an expert id is a whole number, not 'others'"),
        (
            {"1": {"condense": [3, 4]}},
            "layer 1: condense takes a number for each expert, {3: 0.08, rest: 0}, not expert ids",
        ),
        ({"1": {"slim": {3: 0.5, "rest": 4}}}, r"layer 1: slim: expert 3: must come with a whole number, not 0\.5"),
        ({"1": {"condense": FEW, "constant": [4]}}, "expert 4 is named under condense and under constant"),
        ({str(i): {"condense": NONE} for i in range(4)}, "condense would take all 4 MoE layers; at least one must"),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Any, layers: dict[str, Any], message: str) -> None:
    facts = facts_of(folder("olmoe"))
    with pytest.raises(PlanError, match=message):
        check_plan(Plan(method="edited", model=PlanModel.of(facts), layers=layers), facts)


def test_settings(folder: Any) -> None:
    facts = facts_of(folder("olmoe"))
    with pytest.raises(PlanError, match="how: condense has no setting 'form'; it has native"):
        check_plan(plan_of(facts, {"1": FEW}, form="x"), facts)
    with pytest.raises(PlanError, match="how: native of condense is true or false, not 1"):
        check_plan(plan_of(facts, {"1": FEW}, native=1), facts)


def test_a_layer_whose_router_is_needed_elsewhere_is_refused(folder: Any) -> None:
    facts = facts_of(folder("zaya"))
    key = next(iter(facts.layers))
    with pytest.raises(PlanError, match="condense is not possible: its router has no matrix"):
        check_plan(plan_of(facts, {key: FEW}), facts)


# ---- ordinary checkpoints ----------------------------------------------------------------------------------------

ORDINARY = [
    ("qwen3_moe", {"1": FEW, "3": {0: 0.5, 2: 1.5, 7: 0.25, "rest": 0}}),  # any layers, of different width
    ("qwen3_moe", {"2": NONE}),  # nothing is left: a few neurons of zeros
    ("glm4_moe_lite", {"2": FEW}),
    ("glm4_moe_lite", {"1": NONE, "3": FEW}),
    ("deepseek_v3", {"1": FEW}),
    ("deepseek_v3", {"1": dict.fromkeys(range(8), 0.125), "2": NONE}),  # the dense first layer grows with them
    ("glm4_moe", {"1": FEW, "2": NONE}),
    ("lfm2_moe", {"1": FEW}),  # w1, w2, w3
]


@pytest.mark.parametrize(("family", "layers"), ORDINARY)
def test_an_ordinary_dense_layer_where_the_family_knows_them(
    family: str, layers: dict[str, Any], folder: Any, tmp_path: Path
) -> None:
    source = folder(family)
    facts = facts_of(source)
    plan = plan_of(facts, layers)
    applied = understudy.apply(source, plan, tmp_path / "out")
    expected = reference(source, family, plan, facts)
    assert close(logits(stock(tmp_path / "out", family)), expected)
    assert close(walked(planned(Skeleton(source), plan, None), ids_of()), expected)
    assert applied.nbytes == expected_bytes(plan, facts)
    assert applied.loads.startswith("stock transformers")
    assert "ordinary dense ones" in applied.notes[0]
    assert "compression_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_who_else_reads_a_list_of_layers(folder: Any, tmp_path: Path) -> None:
    """Engines take how many of the first layers are dense from such a config, at most."""
    facts = facts_of(folder("glm4_moe_lite"))
    first = understudy.apply(folder("glm4_moe_lite"), plan_of(facts, {"1": FEW}), tmp_path / "first")
    later = understudy.apply(folder("glm4_moe_lite"), plan_of(facts, {"2": FEW}), tmp_path / "later")
    assert (first.loads, later.loads) == ("stock transformers and vLLM", "stock transformers")


def test_zeros_give_all_dense_layers_one_width(folder: Any, tmp_path: Path) -> None:
    source = folder("deepseek_v3")
    facts = facts_of(source)
    plan = plan_of(facts, {"1": dict.fromkeys(range(8), 0.125), "2": NONE})
    applied = understudy.apply(source, plan, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    width = 8 * 24 + 24  # all experts and the shared one
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == width
    for name, own in (("gate_proj", 48), ("up_proj", 48)):
        dense = after[f"model.layers.0.mlp.{name}.weight"]
        assert dense.shape == (width, 32)
        assert torch.equal(dense[:own], before[f"model.layers.0.mlp.{name}.weight"])
        assert not dense[own:].any()
    down = after["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(down[:, :48], before["model.layers.0.mlp.down_proj.weight"])
    assert not down[:, 48:].any()
    zeros = sum(int((t == 0).sum()) for n, t in after.items() if ".mlp." in n and "gate_proj" in n and t.dim() == 2)
    padding = 3 * 4 * 32 * (width - 48 + width - 24)
    assert zeros * 3 * 4 == padding
    assert f"take {padding / 1000:.2f} KB" in applied.notes[0]
    lean = plan_of(facts, {"1": dict.fromkeys(range(8), 0.125), "2": NONE}, native=True)
    assert expected_bytes(plan, facts) - expected_bytes(lean, facts) == padding


def test_a_width_that_nobody_uses_may_shrink(folder: Any, tmp_path: Path) -> None:
    facts = facts_of(folder("qwen3_moe"))
    understudy.apply(folder("qwen3_moe"), plan_of(facts, {"0": {3: 1, "rest": 0}}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mlp_only_layers"], config["intermediate_size"]) == ([0], 24)


def test_nothing_has_to_be_installed(folder: Any, tmp_path: Path) -> None:
    source = folder("qwen3_moe")
    facts = facts_of(source)
    plan = plan_of(facts, {"2": FEW})
    understudy.apply(source, plan, tmp_path / "out")
    code = """if True:
        import sys, torch, transformers
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
        assert "understudy" not in sys.modules
        with torch.no_grad():
            torch.save(model(input_ids=torch.load(sys.argv[2]), use_cache=False).logits, sys.argv[3])
    """
    torch.save(ids_of(), tmp_path / "ids.pt")
    files = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=tmp_path, capture_output=True)
    assert close(torch.load(tmp_path / "logits.pt"), reference(source, "qwen3_moe", plan, facts))


def test_in_bfloat16(folder: Any, tmp_path: Path) -> None:
    source = folder("glm4_moe_lite", torch.bfloat16)
    plan = plan_of(facts_of(source), {"2": FEW})
    understudy.apply(source, plan, tmp_path / "folded")
    understudy.apply(source, plan_of(facts_of(source), {"2": FEW}, native=True), tmp_path / "native")
    assert {t.dtype for n, t in tensors_of(tmp_path / "folded").items() if "layers.2.mlp" in n} == {torch.bfloat16}
    one, other = (logits(load(tmp_path / n, "glm4_moe_lite", dtype="auto")).float() for n in ("folded", "native"))
    assert float((one - other).abs().max()) < 0.05 * float(other.abs().max())


# ---- native ones -------------------------------------------------------------------------------------------------

NATIVE = [
    ("qwen2_moe", {"1": FEW, "3": NONE}, {}, "layer 1: a gate stands before its shared expert"),
    ("olmoe", {"1": FEW, "2": NONE}, {}, "the config of olmoe cannot say that a layer is dense"),
    ("olmoe", {"2": dict.fromkeys(range(8), 0.125)}, {}, "the config of olmoe cannot say"),  # nothing goes but routing
    ("granitemoe", {"0": FEW, "1": NONE}, {}, "the config of granitemoe cannot say"),  # stacked in the checkpoint
    ("deepseek_v3", {"2": FEW}, {}, "how many of the first layers are dense, and layer 1 is not condensed"),
    ("qwen3_moe", {"2": FEW}, {"native": True}, r"the plan asks for it \(native: true\)"),
    ("minimax_m3_vl", {"1": FEW}, {}, "does what an expert does"),
]


@pytest.mark.parametrize(("family", "layers", "how", "why"), NATIVE)
def test_a_native_folder_where_it_is_not_ordinary(
    family: str, layers: dict[str, Any], how: dict[str, Any], why: str, folder: Any, tmp_path: Path
) -> None:
    source = folder(family)
    facts = facts_of(source)
    plan = plan_of(facts, layers, **how)
    applied = understudy.apply(source, plan, tmp_path / "out")
    assert applied.loads == "transformers after `import understudy`"
    assert re.search(why, applied.notes[0])
    loaded = load(tmp_path / "out", family)
    expected = reference(source, family, plan, facts)
    assert close(logits(loaded), expected)
    assert close(walked(planned(Skeleton(source), plan, None), ids_of()), expected)
    assert applied.nbytes == expected_bytes(plan, facts)
    refused(tmp_path / "out", family)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(torch.equal(t, before[n]) for n, t in after.items() if t.shape == before[n].shape)
    loaded.save_pretrained(tmp_path / "again")
    assert close(logits(load(tmp_path / "again", family)), expected)


def test_such_a_folder_cannot_be_materialised(folder: Any, tmp_path: Path) -> None:
    plan = plan_of(facts_of(folder("olmoe")), {"1": FEW})
    with pytest.raises(PlanError, match=r"cannot be written as ordinary ones: the config of olmoe .*--materialise"):
        understudy.apply(folder("olmoe"), plan, tmp_path / "out", materialise=True)


def test_beside_other_kinds(folder: Any, tmp_path: Path) -> None:
    """Condensed layers may be ordinary in a folder that is not, for what other layers hold."""
    source = folder("qwen3_moe")
    facts = facts_of(source)
    layers = {"0": {"merge": [[3, 5]]}, "2": {"condense": FEW}}
    plan = Plan(method="edited", model=PlanModel.of(facts), layers=layers)
    stats = made_up(facts, ("gate_sum", "count"))
    assert stats is not None
    applied = understudy.apply(source, plan, tmp_path / "out", stats=stats)
    assert applied.loads == "transformers after `import understudy`"
    assert "ordinary dense ones" in applied.notes[0]
    assert close(logits(load(tmp_path / "out", "qwen3_moe")), walked(planned(Skeleton(source), plan, stats), ids_of()))


def test_all_of_a_condensed_layer_is_active(folder: Any, tmp_path: Path) -> None:
    source = folder("qwen3_moe")
    facts = facts_of(source)
    for native in (True, False):
        understudy.apply(source, plan_of(facts, {"2": FEW}, native=native), tmp_path / str(native))
        small = Skeleton(tmp_path / str(native))
        assert [layer.key for layer in small.layers] == ["0", "1", "3"]
        counts, all_of = count_params(small, {}), count_params(Skeleton(source), {})
        each = facts.layers["2"].expert_params
        assert counts["routed"] == all_of["routed"] - 8 * each
        assert counts["active"] == all_of["active"] - 8 * 32  # two of two experts, and no router


def test_verification_sees_other_weights(folder: Any, tmp_path: Path) -> None:
    source = folder("olmoe")
    plan = plan_of(facts_of(source), {"1": FEW})
    understudy.apply(source, plan, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    pieces = outcome(Skeleton(source), plan, None).pieces
    verify_folder(Skeleton(source), tmp_path / "out", plan, pieces, None)
    file.write_text(file.read_text().replace('"3": 0.5', '"3": 0.25'))
    with pytest.raises(CheckpointError, match="verification failed, layer 1 differs from the plan"):
        verify_folder(Skeleton(source), tmp_path / "out", plan, pieces, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"version": 1', '"version": 2'), "in a form that is not read: version 2"),
        (('"3": 0.5', '"3": "a lot"'), "a weight of model.layers.1.mlp.experts is no number"),
        (('"3": 0.5', '"9": 0.5'), "which cannot be: expert 9 is not one of the 8"),
        (("layers.1.mlp.experts", "layers.9.mlp.experts"), "layers.9"),
    ],
)
def test_a_declaration_that_does_not_fit(change: tuple[str, str], message: str, folder: Any, tmp_path: Path) -> None:
    understudy.apply(folder("olmoe"), plan_of(facts_of(folder("olmoe")), {"1": FEW}), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(CheckpointError, match=message):
        Skeleton(tmp_path / "out")


# ---- what runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "muse_spark", "minimax_m3_vl"])
@pytest.mark.parametrize("ids", [(5,), (6, 0, 3)])
def test_one_dense_product_is_the_sum_of_experts(family: str, ids: tuple[int, ...]) -> None:
    """Also its gradients, for stacked weights of every form: transposed, biased, ungated, normed."""
    model = zoo.tiny_model(family)
    layer = find_moe_layers(model)[0]
    experts = model.get_submodule(layer.name)
    few = copied(experts)
    weights = {e: 0.5 - 0.3 * n for n, e in enumerate(ids)}
    leave_few(few, weights)
    hidden = torch.randn(7, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    one, other = few(hidden), slow_answer(experts, hidden, weights)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(few(hidden), other, rtol=1e-5, atol=1e-6)
    one.square().sum().backward()
    other.square().sum().backward()
    for name, weight in few._parameters.items():
        if weight is not None and weight.shape[0] == len(ids):
            torch.testing.assert_close(weight.grad, experts.get_parameter(name).grad[sorted(ids)], rtol=1e-4, atol=1e-5)
