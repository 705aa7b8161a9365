"""Experts with stand-ins as modules: right answers and gradients whatever the routes, and trained like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import small
import zoo
from contract import calibrated, one_expert, plan_of, tensors_of
from understudy.channels import sliced
from understudy.experts import StandInExperts, copied, install
from understudy.stages.apply import apply
from understudy.standins import StandIn, impossible

REPLACED = (0, 3, 4)
KEPT = tuple(e for e in range(zoo.EXPERTS) if e not in REPLACED)
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
ROUTES = {
    "mixed": list(range(zoo.EXPERTS)),
    "all to constants": list(REPLACED),
    "none to a constant": list(KEPT),
    "one to each": [KEPT[0], REPLACED[0]],
}


def experts_of(model_type: str, implementation: str = "grouped_mm") -> tuple[Any, Any]:
    """The experts of a layer, whole and with stand-ins for some."""
    model = zoo.tiny_model(model_type)
    model.set_experts_implementation(implementation)
    whole = next(m for m in model.modules() if getattr(m, "num_experts", 0) == zoo.EXPERTS and hasattr(m, "down_proj"))
    cut = copy.deepcopy(whole)
    install(cut, {e: StandIn("constant-v1") for e in REPLACED}, zoo.EXPERTS)
    with torch.no_grad():
        cut.constants.normal_(generator=torch.Generator().manual_seed(3))
    return whole, cut


def routes(open_to: list[int], top_k: int = 2, count: int = 40, dtype: torch.dtype = torch.float32) -> Any:
    """Hidden states, ids and gates."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, zoo.HIDDEN, generator=generator).to(dtype)
    picks = torch.rand(count, len(open_to), generator=generator).argsort(1)[:, :top_k]
    gates = torch.rand(count, top_k, generator=generator).to(dtype)
    return hidden, torch.tensor(open_to)[picks], gates


def reference(whole: Any, constants: Tensor, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """One route after the other, differentiable."""
    rows = []
    for x, chosen, weights in zip(hidden, index.tolist(), gates, strict=True):
        answers = [
            constants[REPLACED.index(e)]
            if e in REPLACED
            else whole(x[None], torch.tensor([[e]]), torch.ones(1, 1, dtype=x.dtype))[0]
            for e in chosen
        ]
        rows.append(sum(w * y for w, y in zip(weights, answers, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_answers_and_gradients(model_type: str, implementation: str, case: str) -> None:
    whole, cut = experts_of(model_type, implementation)
    assert isinstance(cut, StandInExperts)
    assert isinstance(cut, type(whole))
    constants = cut.constants.detach().clone().requires_grad_()
    hidden, index, gates = routes(ROUTES[case])
    inputs = [[t.clone().requires_grad_() for t in (hidden, gates)] for _ in range(2)]
    before = index.clone()
    got = cut(inputs[0][0], index, inputs[0][1])
    expected = reference(whole, constants, inputs[1][0], index, inputs[1][1])
    assert torch.equal(index, before), "the routes belong to the caller"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for output in (got, expected):
        (output * direction).sum().backward()
    torch.testing.assert_close(cut.constants.grad, grad(constants), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(*inputs, strict=True):
        torch.testing.assert_close(grad(mine), grad(theirs), rtol=1e-4, atol=1e-5)
    for name, parameter in whole.named_parameters(recurse=False):
        own = cut.get_parameter(name)
        assert own.shape[0] == len(KEPT)
        torch.testing.assert_close(grad(own), grad(parameter)[list(KEPT)], rtol=1e-4, atol=1e-5)


def grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes(implementation: str, dtype: torch.dtype) -> None:
    whole, cut = experts_of("olmoe", implementation)
    whole, cut = whole.to(dtype), cut.to(dtype)
    hidden, index, gates = routes(ROUTES["mixed"], dtype=dtype)
    with torch.no_grad():
        got = cut(hidden, index, gates)
        expected = reference(whole, cut.constants, hidden, index, gates)
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_kept_experts_answer_bit_for_bit() -> None:
    whole, cut = experts_of("olmoe")
    hidden, index, gates = routes(ROUTES["none to a constant"])
    with torch.no_grad():
        assert torch.equal(cut(hidden, index, gates), whole(hidden, index, gates))
        assert torch.equal(one_expert(cut, hidden[0], KEPT[2]), one_expert(whole, hidden[0], KEPT[2]))
        assert torch.equal(one_expert(cut, hidden[0], REPLACED[1]), cut.constants[1])


def test_one_expert_may_be_all_that_is_left() -> None:
    model = zoo.tiny_model("olmoe")
    cut = model.model.layers[1].mlp.experts
    install(cut, {e: StandIn("constant-v1") for e in range(1, zoo.EXPERTS)}, zoo.EXPERTS)
    out = model(input_ids=torch.arange(5, 15)[None], labels=torch.arange(5, 15)[None])
    out.loss.backward()
    assert cut.constants.shape == (zoo.EXPERTS - 1, zoo.HIDDEN)
    assert cut.constants.grad.abs().sum() > 0


MIXED = {
    0: StandIn("constant-v1"),
    1: StandIn("merged-v1", into=6),
    2: StandIn("slim-v1", width=10, constant=True),
    3: StandIn("slim-v1", width=5),
    4: StandIn("absent-v1"),
    6: StandIn("merged-v1", into=6),
}
NARROW = {e: StandIn("slim-v1", width=9 if e % 2 else 4, constant=e == 5) for e in range(zoo.EXPERTS)}


@pytest.mark.parametrize("stand_ins", [MIXED, NARROW], ids=["mixed", "no full expert"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h", "muse_spark", "qwen3_vl_moe"])
def test_every_form_of_stand_in(model_type: str, implementation: str, stand_ins: dict[int, StandIn]) -> None:
    whole, _ = experts_of(model_type, implementation)
    cut = copied(whole)
    install(cut, stand_ins, zoo.EXPERTS)
    assert whole.down_proj.shape[0] == zoo.EXPERTS
    for name, parameter in whole.named_parameters(recurse=False):
        assert cut.get_parameter(name).shape != parameter.shape, "stock loaders must find another shape"
    size = whole.down_proj.shape[2 if getattr(whole, "is_transposed", False) else 1]
    hidden, index, gates = routes(list(range(zoo.EXPERTS)), top_k=4)
    hidden = torch.randn(len(hidden), size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        if cut.constants is not None:
            cut.constants.normal_(generator=torch.Generator().manual_seed(3))
        got = cut(hidden, index, gates)
        expected = torch.zeros_like(got)
        for token, (x, chosen) in enumerate(zip(hidden, index.tolist(), strict=True)):
            for expert, gate in zip(chosen, gates[token], strict=True):
                expected[token] += gate * alone(whole, cut, x, expert, stand_ins.get(expert))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    pairs = {tuple(sorted(chosen)) for chosen in index.tolist()}
    assert any({1, 6} <= set(chosen) for chosen in pairs), "two of a merged group, chosen by one token"
    seen = torch.bincount(index.reshape(-1), minlength=zoo.EXPERTS)
    both = sum({1, 6} <= set(chosen) for chosen in index.tolist()) if stand_ins is MIXED else 0
    assert int(seen.sum() - cut.chosen(index, gates).sum()) == both


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_every_stand_in_learns(implementation: str) -> None:
    """Also experts of fewer neurons that no token of the batch chose: processes that train together wait for theirs."""
    model = zoo.tiny_model("olmoe").train()
    model.set_experts_implementation(implementation)
    for layer in model.model.layers:
        install(layer.mlp.experts, MIXED, zoo.EXPERTS)
    ids = torch.arange(5, 8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    slim = {name: p.grad for name, p in model.named_parameters() if ".slim." in name}
    assert len(slim) == zoo.LAYERS * 2 * 2
    assert all(grad is not None and grad.isfinite().all() for grad in slim.values())
    assert any(grad.any() for grad in slim.values())
    assert any(not grad.any() for grad in slim.values()), "too many tokens to say anything about experts not chosen"


def alone(whole: Any, cut: Any, x: Tensor, expert: int, stand_in: StandIn | None) -> Tensor:
    """What one expert answers one token, by what it has become."""
    if stand_in is None:
        return one_expert(whole, x, expert)
    answer = torch.zeros_like(x)
    if stand_in.into is not None:
        answer = one_expert(whole, x, stand_in.into)
    if stand_in.width is not None:
        narrow = sliced(whole, [expert], torch.arange(stand_in.width)[None])
        answer = one_expert(narrow, x, 0)
    if stand_in.constant:
        answer = answer + cut.constants[cut.constant_row(expert)]
    return answer


def test_forms_that_do_not_fit() -> None:
    merged, constant = StandIn("merged-v1", into=1), StandIn("constant-v1")
    assert impossible({0: merged, 1: merged}, 8) is None
    assert "expert 9 is not one of the 8" in str(impossible({9: constant}, 8))
    assert "expert 0 is merged into 1, which is no" in str(impossible({0: merged}, 8))
    assert "expert 0 is merged into 1, which is no" in str(impossible({0: merged, 1: constant}, 8))
    assert "no expert keeps any weights" in str(impossible(dict.fromkeys(range(8), constant), 8))
    assert "stands for itself alone" in str(impossible({1: merged}, 8))
    assert "no stand-in is named" in str(impossible({}, 8))
    for wrong in ({"into": 1}, {"width": 3}):
        with pytest.raises(ValueError, match="not a form of stand-in"):
            StandIn("constant-v1", **wrong)
    with pytest.raises(ValueError, match="not a form of stand-in"):
        StandIn("slim-v1", width=0)
    with pytest.raises(ValueError, match="not a form of stand-in"):
        StandIn("low-rank-v1")


def test_copies_are_independent() -> None:
    _, cut = experts_of("olmoe")
    hidden, index, gates = routes(ROUTES["mixed"])
    with torch.no_grad():
        before = cut(hidden, index, gates)
        copied = copy.deepcopy(cut)
        assert type(copied) is type(cut)
        assert (copied.kept, copied.replaced) == (cut.kept, cut.replaced)
        assert torch.equal(copied(hidden, index, gates), before)
        copied.constants.zero_()
        copied.down_proj.zero_()
        assert torch.equal(cut(hidden, index, gates), before)
        assert not copied(hidden, index, gates).any()
    state = {name: torch.zeros_like(value) for name, value in cut.state_dict().items()}
    assert set(state) == {"gate_up_proj", "down_proj", "constants"}
    cut.load_state_dict(state)
    assert not cut.constants.any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    source = small.model_folder(root / "source")
    stats = calibrated(source, root / "work", torch.randint(4, zoo.VOCAB, (4, 12)))
    layers = {"0": {"constant": [0, 3, 4]}, "2": {"constant": [1]}, "3": {"constant": [0, 1, 2, 5, 6, 7]}}
    return apply(source, plan_of(stats, layers), root / "out", stats=stats).folder


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_parameter_of_a_loaded_folder_learns(implementation: str, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation).train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(4, zoo.VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


class Rows(torch.utils.data.Dataset):
    """The same few tokens again and again."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(4, zoo.VOCAB, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_the_trainer_of_transformers(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path / "runs",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(folder).keys()


def test_the_class_stays_that_of_the_family(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    experts = model.model.layers[0].mlp.experts
    assert type(experts).__mro__[2].__name__ == "OlmoeExperts"
    assert isinstance(model, nn.Module)
    assert not isinstance(model.model.layers[1].mlp.experts, StandInExperts)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model.config, "quantization_config", None)
