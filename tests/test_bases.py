"""Experts that share bases: answers and gradients are those of weights written out one expert at a time."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from slow_bases import FAMILIES, GROUPS, MIXED, OWN_LOOPS, Layer, gradients, randomise, shared
from understudy.adapters import best_of_rank
from understudy.channels import channel_views, sliced
from understudy.experts import StandInExperts, install
from understudy.moe import find_moe_layers
from understudy.training.fading import set_beta

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
STATES: dict[str, dict[str, Any]] = {
    "alone": {},
    "fading": {"beta": 0.3},
    "with low-rank parts on the kept": {"kept_rank": 5},
    "with both": {"beta": 0.3, "kept_rank": 5},
}


@functools.lru_cache(40)
def layer_of(model_type: str, implementation: str | None = None) -> Layer:
    return Layer(model_type, implementation)


def check(layer: Layer, cut: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """Compare answers, and the gradients of all that is trained, of the hidden states and of the gates."""
    inputs = [hidden.clone().requires_grad_(), gates.clone().requires_grad_()]
    got, expected = cut(inputs[0], index, inputs[1]), layer.slow(cut, inputs[0], index, inputs[1])
    close(got, expected, "answer")
    trained = {name: p for name, p in cut.named_parameters() if p.requires_grad}
    leaves = [*inputs, *trained.values()]
    both = gradients(got, leaves), gradients(expected, leaves, unused=True)
    for name, mine, theirs in zip(["hidden", "gates", *trained], *both, strict=True):
        close(mine, theirs, name)
    return got.detach()


def close(got: Tensor, expected: Tensor, name: str = "", share: float = 2e-5) -> None:
    largest = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=share * largest, msg=lambda text: f"{name}: {text}")


LAYOUTS = ["olmoe", "gpt_oss", "nemotron_h", "muse_spark", "step3p7"]


@pytest.mark.parametrize(
    ("model_type", "state"),
    [(t, state) for t in FAMILIES for state in STATES if t in LAYOUTS or state in ("alone", "with both")],
)
def test_answers_and_gradients(model_type: str, state: str) -> None:
    layer = layer_of(model_type)
    cut = layer.cut(MIXED, **STATES[state])
    for count in (6, 40):  # few routes to a group take another way than many
        hidden, index, gates = layer.routes(count)
        check(layer, cut, hidden, index, gates)
    exact = layer.slow(cut.bfloat16().float(), hidden.bfloat16().float(), index, gates)
    with torch.no_grad():
        got = cut.bfloat16()(hidden.bfloat16(), index, gates.bfloat16())
    assert got.dtype == torch.bfloat16
    close(got.float(), exact.detach(), share=3e-2)


def fading(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, list[Any]]:
    """A model, and the same with bases of which nothing shows yet, and its modules of experts."""
    model = copy.deepcopy(layer_of(model_type).model).to(dtype)
    faded, layers = copy.deepcopy(model), []
    for layer in find_moe_layers(model):
        experts: Any = faded.get_submodule(layer.name)
        install(experts, GROUPS, layer.num_experts)
        experts.bases.keep_originals(model.get_submodule(layer.name))
        experts.bases.adapters.reset(torch.Generator().manual_seed(0))
        layers.append(experts)
    return model, faded, layers


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**zoo.sample_inputs(model, 4, 12), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", zoo.DISTINCT)
def test_at_first_the_model_is_the_original_bit_for_bit(model_type: str, dtype: torch.dtype) -> None:
    model, faded, layers = fading(model_type, dtype)
    assert layers[0].config._experts_implementation == "grouped_mm"
    assert torch.equal(logits(faded), logits(model))
    for experts in layers:
        experts.bases.beta = 0.5
    assert not torch.equal(logits(faded), logits(model))


@pytest.mark.parametrize(
    ("model_type", "implementation"), [*((t, None) for t in OWN_LOOPS), ("olmoe", "eager"), ("gpt_oss", "batched_mm")]
)
def test_at_first_a_model_that_runs_otherwise_is_the_original(model_type: str, implementation: str | None) -> None:
    """Up to the order of sums: a loop over experts adds them up in turn."""
    model, faded, _ = fading(model_type)
    for one in (model, faded):
        if implementation is not None:
            one.set_experts_implementation(implementation)
    close(logits(faded), logits(model), share=1e-6 if implementation is None else 5e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fading(model_type: str) -> None:
    """Between, the model is one with mixed weights; in the end the originals have no part in it."""
    model, faded, layers = fading(model_type)
    for number, experts in enumerate(layers):
        randomise(experts)
        experts.bases.beta = 0.25 + number / 8
    mixed = copy.deepcopy(model)
    for found, experts in zip(find_moe_layers(model), layers, strict=True):
        whole: Any = mixed.get_submodule(found.name)
        slow = Layer.__new__(Layer)
        slow.model_type, slow.whole = model_type, model.get_submodule(found.name)
        with torch.no_grad():
            for expert in GROUPS:
                for name, weight in slow.weights(experts, expert).items():
                    getattr(whole, name)[expert] = weight
    close(logits(faded), logits(mixed), share=1e-5)
    other = copy.deepcopy(faded)
    for module in other.modules():
        if isinstance(module, StandInExperts):
            for parameter in module.bases.originals.parameters():
                parameter.fill_(float("nan"))
    assert logits(other).isnan().any()
    for one in (faded, other):
        assert set_beta(one, 0.0)
        assert not set_beta(one, 0.0), "nothing is left to drop"
    assert not any("originals" in name for name, _ in faded.named_parameters())
    assert all(experts.bases.originals is None for experts in layers)
    assert torch.equal(logits(faded), logits(other))


@pytest.mark.parametrize("beta", [1.0, 0.75, 0.0])
def test_bases_learn_as_much_as_shows_of_them(beta: float) -> None:
    """With equal bases and originals, only the share of the gradient depends on beta."""
    layer = layer_of("gpt_oss")
    cut, found = layer.cut({0: shared(0), 1: shared(1)}), []
    hidden, index, gates = layer.routes(top_k=2)
    with torch.no_grad():
        for name, own in layer.whole.named_parameters():
            getattr(cut.bases, name).copy_(own[:2])
    for share in (0.0, beta):
        cut.bases.keep_originals(layer.whole)
        cut.bases.beta = share
        parameters = [*cut.bases.parameters(recurse=False), *cut.bases.adapters.parameters()]
        found.append(gradients(cut(hidden, index, gates), parameters))
    assert not any(p.requires_grad for p in cut.bases.originals.parameters())
    stacks = len(list(cut.bases.parameters(recurse=False)))
    assert stacks == 4
    for number, (whole, part) in enumerate(zip(*found, strict=True)):
        assert whole.any()
        close(part, whole * (1 - beta) if number < stacks else whole, str(number))
    assert beta < 1 or not any(part.any() for part in found[1][:stacks])


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_low_rank_parts_of_kept_experts_can_be_merged(model_type: str) -> None:
    layer = layer_of(model_type)
    for stand_ins in ({}, MIXED):
        cut = layer.cut(stand_ins, kept_rank=5)
        hidden, index, gates = layer.routes()
        merged = copy.deepcopy(cut)
        merged.adapters = None
        with torch.no_grad():
            without = merged(hidden, index, gates)
            for row in range(len(cut.kept)):
                cut.adapters.merge_into(merged, row, row)
            close(cut(hidden, index, gates), merged(hidden, index, gates))
            assert float((cut(hidden, index, gates) - without).abs().max()) > 0.1


CASES: dict[str, Any] = {"all": [3, 4, 5], "none": [6, 7], "one group of one": [5], "one token": [3, 7]}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_wherever_routes_lead(model_type: str, case: str, state: str) -> None:
    """Also where none leads: processes that train together wait for every gradient, be it of zeros."""
    layer = layer_of(model_type)
    cut = layer.cut(MIXED, **STATES[state]).train()
    count = 1 if case == "one token" else 24
    hidden, index, gates = layer.routes(count, top_k=2, open_to=CASES[case])
    got = check(layer, cut, hidden, index, gates)
    with torch.no_grad():
        assert torch.equal(cut.eval()(hidden, index, gates), got)
    with torch.inference_mode():
        assert torch.equal(cut(hidden, index, gates), got)
    check(layer, cut, hidden, index, gates)  # nothing was kept from inference that training cannot use
    for name, parameter in cut.named_parameters():
        if parameter.requires_grad and case == "none" and "bases" in name:
            (gradient,) = gradients(cut(hidden, index, gates), [parameter])
            assert not gradient.any(), name


@pytest.mark.parametrize("state", STATES)
def test_no_tokens(state: str) -> None:
    layer = layer_of("olmoe")
    cut = layer.cut(GROUPS, **STATES[state])
    hidden, index, gates = (part[:0] for part in layer.routes())
    assert cut(hidden, index, gates).shape == hidden.shape


@pytest.mark.parametrize("rank", [1, 8, 13, 48])
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_ranks(model_type: str, rank: int) -> None:
    layer = layer_of(model_type)
    cut = layer.cut({0: shared(0, rank), 5: shared(0, rank), 3: shared(3, rank)}, beta=0.6, kept_rank=rank)
    check(layer, cut, *layer.routes())


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h"])
def test_awkward_widths(model_type: str) -> None:
    layer = Layer(model_type)
    layer.whole = sliced(layer.whole, range(8), torch.arange(21).expand(8, 21))
    for state in STATES.values():
        check(layer, layer.cut(MIXED, **state), *layer.routes())


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_without_bases(model_type: str) -> None:
    layer = layer_of(model_type)
    cut = layer.cut({0: shared(None), 3: shared(None), 4: shared(None)})
    assert cut.bases.down_proj.shape[0] == 0
    assert not any(p.requires_grad for p in cut.bases.parameters(recurse=False)), "no gradient will ever come"
    check(layer, cut, *layer.routes())
    cut = layer.cut({0: shared(None), 3: shared(None)}, beta=0.4, kept_rank=2)
    check(layer, cut, *layer.routes())


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_best_of_a_rank(model_type: str, rank: int) -> None:
    """Parts are the truncated singular value decomposition of an expert, or of what a base lacks of it."""
    layer = Layer(model_type)
    cut = layer.cut(GROUPS)
    for base in (None, (cut.bases, 1)):
        parts = best_of_rank(layer.whole, 4, rank, base)
        for role, view in channel_views(layer.whole).items():
            if role in ("gate", "up", "down"):
                weight = view[4] if base is None else view[4] - channel_views(cut.bases)[role][1]
                u, s, v = torch.linalg.svd((weight.T if role == "down" else weight).double(), full_matrices=False)
                a, b = parts[role]
                expected = u[:, :rank] * s[:rank] @ v[:rank]
                assert torch.allclose((b @ a).double(), expected, atol=1e-5 * float(s[0]))
                assert torch.allclose(a.norm(dim=1).double(), s[:rank].sqrt(), rtol=1e-3, atol=1e-5)


def test_the_best_of_a_rank_of_nothing() -> None:
    layer = Layer("olmoe")
    cut = layer.cut(GROUPS)
    for a, b in best_of_rank(cut.bases, 1, 3, (cut.bases, 1)).values():
        assert a.isfinite().all()
        assert b.isfinite().all()
        assert not (b @ a).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations(implementation: str) -> None:
    for model_type in ("olmoe", "gpt_oss", "muse_spark"):
        layer = layer_of(model_type, implementation)
        hidden, index, gates = layer.routes()
        for stand_ins in (MIXED, GROUPS):
            cut = layer.cut(stand_ins)
            assert cut.config._experts_implementation == implementation
            check(layer, cut, hidden, index, gates)
        untouched = layer.cut({})
        with torch.no_grad():
            assert torch.equal(untouched(hidden, index, gates), layer.whole(hidden, index, gates))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_autocast(model_type: str, state: str) -> None:
    layer = layer_of(model_type)
    cut = layer.cut(MIXED, **STATES[state])
    for count in (24, 2):
        hidden, index, gates = layer.routes(count)
        with torch.autocast("cpu", torch.bfloat16):
            got = cut(hidden, index, gates)
        assert got.dtype == hidden.dtype
        close(got, layer.slow(cut, hidden, index, gates), share=3e-2)
        trained = [p for p in cut.parameters() if p.requires_grad]
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(got, trained))


def test_float32_parts_on_bfloat16_weights() -> None:
    """As they are trained in mixed precision."""
    layer = layer_of("olmoe")
    cut = layer.cut(MIXED, beta=0.3, kept_rank=5)
    hidden, index, gates = layer.routes()
    exact = layer.slow(cut, hidden, index, gates)
    for part in (cut, cut.bases.originals):
        part.bfloat16()
    cut.adapters.float(), cut.bases.adapters.float()
    got = cut(hidden.bfloat16(), index, gates)
    assert got.dtype == torch.bfloat16
    close(got.float(), exact, share=3e-2)
    trained = [p for p in cut.parameters() if p.requires_grad]
    assert [g.dtype for g in gradients(got, trained)] == [p.dtype for p in trained]


def test_copies_are_independent() -> None:
    layer = layer_of("muse_spark")
    cut = layer.cut(MIXED, beta=0.3, kept_rank=5)
    routes = layer.routes()
    with torch.no_grad():
        before = cut(*routes)
        copied = copy.deepcopy(cut)
        assert torch.equal(copied(*routes), before)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(cut(*routes), before)
