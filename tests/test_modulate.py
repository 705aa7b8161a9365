"""Fewer experts for a token, vectors for the others: answers, gradients, folders, plans and training."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, PhimoeConfig

import understudy
import zoo
from contract import calibrated, close, ids_of, load, tensors_of, walked, without_understudy
from slow_bases import FAMILIES, MIXED, Layer, gradients, shared
from small import save_tokenizer, text_file
from understudy.adapters import Adapters
from understudy.errors import CheckpointError, PlanError, UnderstudyError
from understudy.experts import modulate
from understudy.kinds import check_plan, expected_bytes
from understudy.layout import model_facts
from understudy.moe import find_moe_layers
from understudy.plans import Plan, PlanModel, load_plan
from understudy.sizes import RouteCounter, count_params
from understudy.skeleton import Skeleton
from understudy.standins import StandIn
from understudy.stats import Stats
from understudy.virtual import planned

MERGES = {1: StandIn("merged-v1", into=6), 6: StandIn("merged-v1", into=6), 2: StandIn("merged-v1", into=6)}
ABSENT = {4: StandIn("absent-v1"), 0: StandIn("constant-v1")}
ALONE: dict[str, dict[int, StandIn]] = {"nothing": {}, "merged": MERGES, "free": ABSENT, "both": MERGES | ABSENT}
MAPS = {e: StandIn("affine-v1", rank=rank) for e, rank in {0: 3, 3: 2, 5: 3}.items()}
BESIDE = ALONE | {"every form": MIXED, "maps": MAPS | MERGES, "bases": {3: shared(3), 5: shared(3), 7: shared(7)}}


@functools.lru_cache(40)
def layer_of(model_type: str, implementation: str | None = None) -> Layer:
    return Layer(model_type, implementation)


def modulated(layer: Layer, stand_ins: dict[int, StandIn], main_k: int, vectors: int = 1, **how: Any) -> Any:
    """Experts with stand-ins and vectors of random numbers."""
    made = layer.cut(stand_ins)
    modulate(made, layer.num_experts, main_k, vectors, how.get("renormalise", False))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.modulation.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made


def slow(layer: Layer, cut: Any, hidden: Tensor, index: Tensor, gates: Tensor, main_k: int, scale: bool) -> Tensor:
    """Token by token: which routes are main, the mean of the others' vectors, and one expert after the other."""
    outs = []
    for x, ids, alphas in zip(hidden, index.tolist(), gates, strict=True):
        forms = {e: cut.stand_ins[e].format if e in cut.stand_ins else "" for e in ids}
        free = [forms[e] in ("constant-v1", "absent-v1") for e in ids]
        of = [cut.stand_ins[e].into if forms[e] == "merged-v1" else e for e in ids]  # whose weights
        sums: dict[int, float] = {}
        for s, owner in enumerate(of):
            if not free[s]:
                sums[owner] = sums.get(owner, 0.0) + float(alphas[s].detach())
        main = sorted(sums, key=lambda owner: -sums[owner])[:main_k]  # of equals the earlier
        aux = [s for s in range(len(ids)) if not free[s] and of[s] not in main]
        runs = [s for s in range(len(ids)) if not free[s] and of[s] in main]
        total, factor = sum((alphas[s] for s in aux), torch.zeros(())), torch.ones(())
        if scale and runs:
            kept = sum(alphas[s] for s in runs)
            factor = (kept + total) / kept
        theta = {role: torch.ones(p.shape[1]) for role, p in cut.modulation.named_parameters()}
        for role, p in cut.modulation.named_parameters():
            if aux:
                theta[role] = sum(alphas[s] / total * (1 + p[ids[s]]) for s in aux)
        out = torch.zeros_like(x)
        for s, e in enumerate(ids):
            if free[s]:
                if forms[e] == "constant-v1":
                    out = out + alphas[s] * cut.constants[cut.constant_row(e)]
            elif s in runs:  # with the constant of one that kept some neurons
                out = out + alphas[s] * factor * _answer(layer, cut, x, e, theta)
        outs.append(out)
    return torch.stack(outs)


def _answer(layer: Layer, cut: Any, x: Tensor, expert: int, theta: dict[str, Tensor]) -> Tensor:
    if "hidden" in theta:
        return layer.answer(cut, (x * theta["hidden"])[None], expert)[0]
    from understudy.channels import projections

    weights = layer.weights(cut, expert)
    first = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
    turned = layer.model_type in ("gpt_oss", "openai_privacy_filter")
    pick = {}
    for role in [role for role in theta if role != "down"]:
        given = x * theta[role]
        out = given @ weights[first] if turned else weights[first] @ given
        out = out + weights.get(f"{first}_bias", 0.0)
        pick[role] = projections(cut, out[None])[role]
    if "gate" in pick:
        inner = torch.zeros(1, 2 * pick["up"].shape[1])
        for role, part in pick.items():
            projections(cut, inner)[role].copy_(part)
        h = cut._apply_gate(inner)[0]
    else:
        h = cut.act_fn(pick["up"])[0]
    h = h * theta["down"]
    out = h @ weights["down_proj"] if turned else weights["down_proj"] @ h
    out = out + weights.get("down_proj_bias", 0.0)
    return cut.post_expert_norm(out) if getattr(cut, "has_post_expert_norm", False) else out


def near(got: Tensor, expected: Tensor, name: str, share: float = 2e-5) -> None:
    largest = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=share * largest, msg=lambda text: f"{name}: {text}")


def check(layer: Layer, cut: Any, main_k: int, scale: bool = False, count: int = 12) -> None:
    """Compare answers and all gradients with the slow way."""
    hidden, index, gates = layer.routes(count)
    inputs = [hidden.requires_grad_(), gates.requires_grad_()]
    got = cut(hidden, index, gates)
    expected = slow(layer, cut, hidden, index, gates, main_k, scale)
    near(got, expected, "answer")
    trained = {name: p for name, p in cut.named_parameters() if p.requires_grad}
    leaves = [*inputs, *trained.values()]
    both = gradients(got, leaves), gradients(expected, leaves, unused=True)
    for name, mine, theirs in zip(["hidden", "gates", *trained], *both, strict=True):
        near(mine, theirs, name)
    vectors = [name for name in trained if name.startswith("modulation.")]
    assert vectors
    assert all(float(g.abs().max()) > 0 for n, g in zip(["", "", *trained], both[0], strict=True) if n in vectors)


# ---- the forward -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_vector(model_type: str) -> None:
    layer = layer_of(model_type)
    check(layer, modulated(layer, {}, 2), 2)


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_beside_stand_ins(model_type: str, beside: str) -> None:
    layer = layer_of(model_type)
    for main_k, scale in ((1, False), (2, True)):
        check(layer, modulated(layer, BESIDE[beside], main_k, renormalise=scale), main_k, scale)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h", "muse_spark", "minimax_m3_vl", "step3p7"])
@pytest.mark.parametrize("beside", ALONE)
def test_three_vectors(model_type: str, beside: str) -> None:
    layer = layer_of(model_type)
    check(layer, modulated(layer, ALONE[beside], 2, 3), 2)


@pytest.mark.parametrize("vectors", [1, 3])
def test_with_low_rank_parts(vectors: int) -> None:
    """What is trained on top of the experts is given what they are given."""
    layer = layer_of("olmoe")
    cut = modulated(layer, {}, 2, vectors)
    cut.adapters = Adapters(cut, layer.num_experts, 3)
    for parameter in cut.adapters.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(7), std=0.3)
    check(layer, cut, 2)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_vectors_of_ones_are_the_strongest_experts_alone(model_type: str, implementation: str) -> None:
    """Bit for bit what the family's own module answers to these routes; and nothing else of the others counts."""
    layer = layer_of(model_type, implementation)
    hidden, index, gates = layer.routes(20)
    gates, order = gates.sort(1, descending=True)
    index = index.gather(1, order)
    for dtype in (torch.float32, torch.bfloat16):
        whole, h, g = layer.whole.to(dtype), hidden.to(dtype), gates.to(dtype)
        for main_k in (1, 2, 3):
            cut = modulated(layer, {}, main_k)
            for parameter in cut.modulation.parameters():
                parameter.data.zero_()
            with torch.no_grad():
                got = cut.to(dtype)(h, index, g)
                assert torch.equal(got, whole(h, index[:, :main_k], g[:, :main_k]))
                mixed = torch.randperm(4, generator=torch.Generator().manual_seed(main_k))
                near(cut(h, index[:, mixed], g[:, mixed]), got, "another order", 2e-2 if dtype.itemsize == 2 else 2e-5)
    layer.whole.to(torch.float32)


def test_of_equal_gates_the_earlier_route_is_main() -> None:
    layer = layer_of("olmoe")
    cut = modulated(layer, {}, 2)
    index, gates = torch.tensor([[5, 1, 7, 2]]), torch.tensor([[0.25, 0.5, 0.25, 0.25]])
    ids, main, share = cut.modulation.split(index, gates, torch.arange(9))
    assert ids.tolist() == [[5, 1]]  # in the router's order
    assert main.tolist() == [[0.25, 0.5]]
    assert share[0].nonzero()[:, 0].tolist() == [2, 7]
    assert share[0, [2, 7]].tolist() == [0.5, 0.5]


def test_a_route_to_a_constant_is_neither_main_nor_auxiliary() -> None:
    """Even where it is the strongest, as many others run, and it keeps its own gate."""
    layer = layer_of("olmoe")
    cut = modulated(layer, {0: StandIn("constant-v1"), 1: StandIn("constant-v1")}, 1)
    index, gates = torch.tensor([[0, 5, 6, 1]]), torch.tensor([[0.6, 0.1, 0.2, 0.1]])
    hidden = torch.randn(1, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    vector = cut.modulation.hidden[5]
    expected = 0.2 * layer.answer(cut, hidden * (1 + vector), 6) + 0.6 * cut.constants[0] + 0.1 * cut.constants[1]
    near(cut(hidden, index, gates), expected, "answer")
    chosen = cut.chosen(index, gates)
    assert chosen.tolist() == [1, 1, 0, 0, 0, 0, 1, 0]
    only = torch.tensor([[0, 1]])
    near(cut(hidden, only, gates[:, :2]), 0.6 * cut.constants[:1] + 0.1 * cut.constants[1:], "constants alone")


# ---- folders -----------------------------------------------------------------------------------------------------


class Source:
    """A tiny folder with its statistics."""

    def __init__(self, root: Path, model_type: str, **changes: Any) -> None:
        self.root, self.model_type = root, model_type
        self.folder = root / "model"
        zoo.tiny_model(model_type, **changes).save_pretrained(self.folder, max_shard_size="100KB")
        save_tokenizer(self.folder)
        self.stats: Stats = calibrated(self.folder, root / "work", ids_of(), extra=["channels", "dense"])

    def plan(self, layers: dict[str, dict[str, Any]], **how: dict[str, Any]) -> Plan:
        return Plan(method="edited", model=PlanModel.of(self.stats.model), how=how, layers=layers)

    def everywhere(self, more: dict[str, Any] | None = None, how: dict[str, Any] | None = None, **own: Any) -> Plan:
        layers = {key: {"modulate": "all", **(more or {})} for key in self.stats.model.layers}
        return self.plan(layers, modulate={"main_k": 2} | own, **(how or {}))

    def logits(self, folder: Path) -> Tensor:
        with torch.no_grad():
            return load(folder, self.model_type)(input_ids=ids_of(), use_cache=False).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    @functools.cache
    def made(model_type: str = "olmoe") -> Source:
        changes = {} if model_type in ("gemma4", "qwen3_vl_moe") else {"num_experts_per_tok": 4}
        return Source(tmp_path_factory.mktemp(model_type), model_type, **changes)

    return made


SEVERAL = {"constant": [5], "slim": {6: 8}, "merge": [[0, 1]], "shared_base": [[2, 3]]}
COMBINED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "alone": ({}, {}, 1),
    "three vectors": ({}, {}, 3),
    "constant": ({"constant": [1, 4, 7]}, {}, 1),
    "merge": ({"merge": [[0, 1], [4, 2, 6]]}, {}, 3),
    "shared_base": ({"shared_base": [[2, 3], [0, 6]]}, {"shared_base": {"rank": 3}}, 1),
    "slim": ({"slim": {1: 8, 3: 8, 6: 0}}, {"slim": {"constant": True}}, 1),
    "several": (SEVERAL, {"shared_base": {"rank": 2}}, 1),
}


@pytest.mark.parametrize("name", COMBINED)
def test_written_read_and_written_again(name: str, source: Callable[..., Source], tmp_path: Path) -> None:
    """Applied (which verifies each layer), read in two ways, moved, saved again; refused by those who do not know."""
    made, (more, how, vectors) = source(), COMBINED[name]
    plan = made.everywhere(more, how, vectors=vectors)
    applied = understudy.apply(made.folder, plan, tmp_path / "out", stats=made.stats)
    assert applied.loads == "transformers after `import understudy`"
    assert applied.nbytes == expected_bytes(plan, made.stats.model)
    got = made.logits(tmp_path / "out")
    assert close(walked(planned(Skeleton(made.folder), plan, made.stats), ids_of()), got)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["UnderstudyOlmoeForCausalLM"]
    declared = config["compression_config"]["transform_config"]["expert_modulation"]
    assert (declared["main_k"], declared["vectors"], declared["renormalise"]) == (2, vectors, False)
    with without_understudy(), pytest.raises((RuntimeError, ValueError), match=r"size|shape|mismatch"):
        zoo.model_class("olmoe").from_pretrained(tmp_path / "out")
    model = load(tmp_path / "out", "olmoe")
    names = [n for n, _ in model.named_parameters() if ".modulation." in n]
    assert len(names) == (1 if vectors == 1 else 3) * len(made.stats.model.layers)
    generator = torch.Generator().manual_seed(2)
    for n in names:
        model.get_parameter(n).data.normal_(generator=generator)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if ".modulation." in n}
    moved = made.logits(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(moved, model.eval()(input_ids=ids_of(), use_cache=False).logits)
    assert not close(moved, got)
    new = model.generate(ids_of()[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape == (1, ids_of().shape[1] + 3)


def test_renormalised(source: Callable[..., Source], tmp_path: Path) -> None:
    made = source()
    plain = understudy.apply(made.folder, made.everywhere(), tmp_path / "a")
    scaled = understudy.apply(made.folder, made.everywhere(renormalise=True), tmp_path / "b")
    assert not close(made.logits(plain.folder), made.logits(scaled.folder))


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_vl_moe", "gemma4"])
def test_a_plain_checkpoint_that_asks_for_fewer(model_type: str, source: Callable[..., Source], tmp_path: Path) -> None:
    made = source(model_type)
    main_k = made.stats.model.layers["1"].top_k // 2
    applied = understudy.apply(made.folder, made.everywhere(plain=True, main_k=main_k), tmp_path / "out")
    assert applied.loads == "stock transformers and vLLM"
    assert f"an ordinary checkpoint whose config asks for {main_k} experts instead of {2 * main_k}" in applied.notes
    before, after = tensors_of(made.folder), tensors_of(applied.folder)
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert before.keys() == after.keys()
    assert {layer.top_k for layer in Skeleton(applied.folder).layers} == {main_k}
    with without_understudy():
        got = made.logits(applied.folder)
    assert not close(made.logits(made.folder), got)
    if model_type == "olmoe":  # which does not normalise: what vectors start from, bit for bit
        understudy.apply(made.folder, made.everywhere(), tmp_path / "vectors")
        assert torch.equal(made.logits(tmp_path / "vectors"), got)


def test_verification_sees_another_number(source: Callable[..., Source], tmp_path: Path) -> None:
    from understudy.verify import verify_folder
    from understudy.virtual import outcome

    made = source()
    plan = made.everywhere({"constant": [2]})
    understudy.apply(made.folder, plan, tmp_path / "out", stats=made.stats)
    whole = Skeleton(made.folder)
    pieces = outcome(whole, plan, made.stats).pieces
    verify_folder(whole, tmp_path / "out", plan, pieces, made.stats)
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace('"main_k": 2', '"main_k": 3'))
    with pytest.raises(CheckpointError, match="verification failed, layer 0 differs from the plan"):
        verify_folder(whole, tmp_path / "out", plan, pieces, made.stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('"version": 1,\n        "main_k"', '"version": 2,\n        "main_k"'),
            "in a form that is not read: version 2",
        ),
        (('"main_k": 2', '"main_k": 0'), "in a form that is not read: main_k 0"),
        (("layers.1.mlp.experts", "layers.9.mlp.experts"), "vectors in model.layers.9.mlp.experts, which this model"),
    ],
)
def test_a_declaration_that_does_not_fit(
    change: tuple[str, str], message: str, source: Callable[..., Source], tmp_path: Path
) -> None:
    made = source()
    understudy.apply(made.folder, made.everywhere(), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    text = json.dumps(json.loads(file.read_text()), indent=2)
    modulation = json.loads(text)["compression_config"]["transform_config"]["expert_modulation"]
    changed = json.loads(json.dumps(modulation, indent=2).replace(change[0].replace("        ", "  "), change[1]))
    config = json.loads(text)
    config["compression_config"]["transform_config"]["expert_modulation"] = changed
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Skeleton(tmp_path / "out")


# ---- plans -------------------------------------------------------------------------------------------------------


def test_a_plan_reads_as_it_is_written(source: Callable[..., Source], tmp_path: Path) -> None:
    made = source()
    plan = made.plan({"1": {"modulate": "all", "constant": [3, 5]}}, modulate={"main_k": 1})
    check_plan(plan, made.stats.model)
    assert "  1: {constant: [3, 5], modulate: all}" in plan.text().splitlines()
    assert load_plan(plan.save(tmp_path / "plan.yaml")) == plan
    assert plan.replaced("1") == {3: "constant", 5: "constant"}
    assert plan.kept("1", 8) == (0, 1, 2, 4, 6, 7)


REFUSED = [
    ({"modulate": "all"}, {}, r"how: modulate needs main_k, .* add \{main_k: N\}"),
    ({"modulate": "all"}, {"main_k": 4}, "layer 1: main_k 4 is not fewer than the 4 experts .* give 1 to 3"),
    ({"modulate": "all"}, {"main_k": 0}, "main_k of modulate is a whole number of at least 1, not 0"),
    ({"modulate": "all"}, {"main_k": 1, "vectors": 2}, "vectors of modulate is 1 or 3, not 2"),
    ({"modulate": "all"}, {"main_k": 1, "plain": 1}, "plain of modulate is true or false, not 1"),
    ({"modulate": "all"}, {"k": 1}, "modulate has no setting 'k'; it has main_k"),
    ({"modulate": [0, 1]}, {"main_k": 1}, "layer 1: modulate takes whole layers; write `modulate: all`"),
    ({"modulate": "all"}, {"main_k": 1, "plain": True}, "layer 0: modulate with plain: true takes all MoE layers"),
    ({"modulate": [3, 3]}, {"main_k": 1}, "layer 1: expert 3 is named twice under modulate"),
    ({"modulate": "all", "layer_drop": "all"}, {"main_k": 1}, "modulate cannot share a layer with layer_drop"),
    ({"modulate": "all", "drop": [1]}, {"main_k": 1}, "drop cannot share a layer with modulate"),
    (
        {"modulate": "all", "slim": {1: 8}},
        {"main_k": 1, "vectors": 3},
        "modulate cannot share a layer with slim: .* use vectors: 1",
    ),
]


@pytest.mark.parametrize(("kinds", "how", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(
    kinds: dict[str, Any], how: dict[str, Any], message: str, source: Callable[..., Source]
) -> None:
    made = source()
    with pytest.raises(PlanError, match=message):
        check_plan(made.plan({"1": kinds}, modulate=how), made.stats.model)


def test_vectors_are_not_materialised(source: Callable[..., Source], tmp_path: Path) -> None:
    made = source()
    with pytest.raises(PlanError, match="cannot be written as an ordinary checkpoint; leave out --materialise"):
        understudy.apply(made.folder, made.everywhere(), tmp_path / "out", materialise=True)


def test_the_method_takes_half(source: Callable[..., Source]) -> None:
    found = understudy.plan(source().stats, method="compressed_experts")
    assert found.plan == source().everywhere(vectors=1, renormalise=False).model_copy(
        update={"method": "compressed_experts", "recipe": found.plan.recipe}
    )
    assert "2 experts of each layer, 50.0% of the parameters" in found.notes[0]
    assert understudy.plan(source().stats, method="compressed_experts", main_k=3).plan.how["modulate"]["main_k"] == 3
    plain = understudy.plan(source().stats, method="compressed_experts", plain=True).plan
    assert plain.how == {"modulate": {"main_k": 2, "plain": True}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, "--ratio has no effect on method compressed_experts, which removes nothing; leave it out"),
        ({"size": "1GB"}, "--size has no effect on method compressed_experts"),
        ({"main_k": 4}, "--main-k 4 is not fewer than the 4 experts that a token chooses; give 1 to 3"),
        ({"main_k": 0}, "main_k"),
        ({"vectors": 2}, "vectors of modulate is 1 or 3, not 2"),
        ({"kind": "constant"}, "compressed_experts cannot make constant; use --kind modulate"),
        ({"method": "mone", "ratio": 0.5, "vectors": 3}, "--vectors has no effect on method mone; leave it out"),
        ({"method": "mone", "ratio": 0.5, "main_k": 4}, "--main-k 4 is not fewer than the 4 experts"),
        ({"method": "mone", "ratio": 0.5, "main_k": 2, "fit": True}, "--fit has no effect on method mone"),
        ({"method": "reap", "ratio": 0.5, "main_k": 2}, "--main-k with method reap, whose experts become drop"),
        ({"method": "heapr", "ratio": 0.5, "main_k": 2, "vectors": 3}, "whose experts become slim: .* use vectors: 1"),
    ],
)
def test_settings_of_the_method(options: dict[str, Any], message: str, source: Callable[..., Source]) -> None:
    with pytest.raises(UnderstudyError, match=message):
        understudy.plan(source().stats, **{"method": "compressed_experts", **options})


@pytest.mark.parametrize("method", ["mone", "camera", "replace_shared"])
def test_lies_over_what_another_method_makes(method: str, source: Callable[..., Source], tmp_path: Path) -> None:
    """`--main-k` beside a method's own settings adds vectors to its plan, and budgets count them."""
    made, given = source(), {"method": method} | ({"rank": 1} if method == "replace_shared" else {})
    alone = understudy.plan(made.stats, **given, ratio=0.3)
    over = understudy.plan(made.stats, **given, ratio=0.3, main_k=1, renormalise=True)
    assert over.plan.how == {**alone.plan.how, "modulate": {"main_k": 1, "vectors": 1, "renormalise": True}}
    for key, layer in made.stats.model.layers.items():
        assert over.plan.layers[key] == {**alone.plan.layers.get(key, {}), "modulate": tuple(range(layer.experts))}
    vectors = sum(x.experts * x.hidden * x.element_bytes for x in made.stats.model.layers.values())
    assert over.expected_bytes == alone.expected_bytes + vectors
    assert over.plan.recipe["main_k"] == 1
    budget = alone.expected_bytes + vectors // 2
    fitting = understudy.plan(made.stats, **given, size=f"{budget}B", main_k=1)
    assert fitting.expected_bytes <= budget
    kept = understudy.plan(made.stats, **given, ratio=0.3, main_k=1, keep_layers="0").plan
    assert "0" not in kept.layers
    understudy.apply(made.folder, fitting.plan, tmp_path / "out", stats=made.stats)  # verifies what it wrote


def test_a_layer_whose_tokens_choose_one_expert_is_refused(tmp_path: Path) -> None:
    zoo.tiny_model("olmoe", num_experts_per_tok=1).save_pretrained(tmp_path / "one")
    facts = model_facts(Skeleton(tmp_path / "one"), "one")
    plan = Plan(
        method="edited", model=PlanModel.of(facts), how={"modulate": {"main_k": 1}}, layers={"0": {"modulate": "all"}}
    )
    with pytest.raises(PlanError, match="modulate is not possible: a token chooses a single expert there"):
        check_plan(plan, facts)


# ---- sizes and training ------------------------------------------------------------------------------------------


def test_active_parameters(source: Callable[..., Source], tmp_path: Path) -> None:
    """What runs, and one vector for each route that does not; measured where constants take some routes."""
    made = source()
    layer = made.stats.model.layers["0"]
    whole = count_params(Skeleton(made.folder), {})
    understudy.apply(made.folder, made.everywhere(), tmp_path / "out")
    small, layers = Skeleton(tmp_path / "out"), len(made.stats.model.layers)
    counts = count_params(small, {})
    assert counts["active"] == whole["active"] - layers * (2 * layer.expert_params - 2 * layer.hidden)
    assert counts["total"] == whole["total"] + layers * 8 * layer.hidden
    assert counts["total"] - counts["routed"] == whole["total"] - whole["routed"]
    understudy.apply(made.folder, made.everywhere({"constant": list(range(1, 8))}), tmp_path / "few", stats=made.stats)
    few, counter = Skeleton(tmp_path / "few"), None
    counter = RouteCounter(few)
    from understudy.activations import ActivationStore
    from understudy.walk import Walk

    walk = Walk(few, ids_of().numpy(), batch_size=2, store=ActivationStore(1 << 30))
    with walk.ready():
        walk.through_layers(observe=counter.observe)
    for mean in counter.means().values():
        assert 0 < mean[0] <= 1  # at most one expert is there to run
        assert 3 <= mean[1:].sum() <= 4
        assert mean.sum() == pytest.approx(4)


def test_active_parameters_of_the_paper() -> None:
    """0.878B of OLMoE-1B-7B and 4.93B of Phi-3.5-MoE, counted as the paper does.

    It leaves the routers out, and counts keys and values of Phi as if every head had its own.
    """
    olmoe = OlmoeConfig(vocab_size=50304, intermediate_size=1024, num_experts=64, num_experts_per_tok=8)
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 6400, "num_local_experts": 16}
    biased = {"attention_bias": True, "lm_head_bias": True, "num_key_value_heads": 32}
    phi = PhimoeConfig(vocab_size=32064, num_hidden_layers=32, num_attention_heads=32, **sizes, **biased)
    for config, main_k, before, after, tolerance in ((olmoe, 4, 1.28, 0.878, 0.0005), (phi, 1, 7.45, 4.93, 0.005)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        layers = find_moe_layers(model)
        routers = sum(model.get_parameter(name).numel() for layer in layers for name in layer.router)
        assert _active(model, layers) / 1e9 == pytest.approx(before, abs=0.006)
        for layer in layers:
            modulate(model.get_submodule(layer.name), layer.num_experts, main_k, 3, False)
        assert (_active(model, layers) - routers) / 1e9 == pytest.approx(after, abs=tolerance)


def _active(model: Any, layers: Any) -> int:
    entries = {name: SimpleNamespace(numel=tensor.numel()) for name, tensor in model.state_dict().items()}
    skeleton: Any = SimpleNamespace(model=model, layers=layers, checkpoint=SimpleNamespace(entries=entries))
    return count_params(skeleton, {})["active"]


RECOVERED = [
    ("alone", "vectors"),
    ("alone", None),
    ("three vectors", "vectors+lora"),
    ("several", "vectors"),
    ("several", "stand-ins"),
]


@pytest.mark.parametrize(("name", "what"), RECOVERED)
def test_recovered(name: str, what: str | None, source: Callable[..., Source], tmp_path: Path) -> None:
    made, (more, how, vectors) = source(), COMBINED[name]
    understudy.apply(made.folder, made.everywhere(more, how, vectors=vectors), tmp_path / "cut", stats=made.stats)
    text = text_file(tmp_path / "train.txt", 800)
    settings: dict[str, Any] = {"steps": 4, "batch": 2, "seq_len": 16, "lr": 1e-2, "held_out": 0.1, "device": "cpu"}
    fading = {"end_ratio": (0.0,)} if "shared_base" in more else {}
    out = tmp_path / "out"
    understudy.recover(tmp_path / "cut", out, train=text, train_what=what, **settings, **fading)
    before, after = tensors_of(tmp_path / "cut"), tensors_of(out)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    vectors_in = {n for n in before if ".modulation." in n}
    assert vectors_in <= changed
    if what == "vectors":
        assert changed == vectors_in
    assert any("norm" in n for n in changed) == (what is None and name != "several")
    assert not close(made.logits(tmp_path / "cut"), made.logits(out))
