"""Neurons of experts: the same function whatever their order, exact slices, and bytes, in every layout there is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from understudy.channels import (
    channel_bytes,
    channel_views,
    channel_width,
    neurons,
    num_experts,
    rest,
    set_neurons,
    set_rest,
    sliced,
)
from understudy.errors import UnsupportedModelError
from understudy.layout import model_facts
from understudy.moe import find_moe_layers
from understudy.skeleton import Skeleton

TYPES = [*zoo.DISTINCT, "aria", "openai_privacy_filter", "step3p7", "inkling2_text", "beam", "jamba"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
IDS = [5, 0, 3]


def experts_of(model_type: str, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The experts of the last MoE layer."""
    model = zoo.tiny_model(model_type).to(dtype)
    experts = model.get_submodule(find_moe_layers(model)[-1].name)
    if implementation and hasattr(experts, "config"):  # else it runs a loop of its own
        model.set_experts_implementation(implementation)
    return experts


def routes(experts: Any, ids: list[int], count: int = 24, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert ids and gates."""
    generator = torch.Generator().manual_seed(0)
    down = experts.down_proj
    size = down.shape[2] if getattr(experts, "is_transposed", False) else down.shape[1]
    hidden = torch.randn(count, size, generator=generator, dtype=torch.float64).to(down.dtype)
    picks = torch.rand(count, len(ids), generator=generator).argsort(1)[:, :top_k]
    gates = torch.rand(count, top_k, generator=generator, dtype=torch.float64).to(down.dtype)
    return hidden, torch.tensor(ids)[picks], gates


def drawn(rows: int, width: int, count: int) -> Tensor:
    """`count` neurons for each row, each row another choice and order."""
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :count]


def masked(experts: Any, ids: list[int], channels: Tensor) -> Any:
    """A copy whose dropped down columns are zero, by plain indexing of the stacked weight."""
    made = copy.deepcopy(experts)
    with torch.no_grad():
        for row, kept in zip(ids, channels.tolist(), strict=True):
            gone = sorted(set(range(channel_width(experts))) - set(kept))
            if getattr(experts, "is_transposed", False):
                made.down_proj[row, gone, :] = 0
            else:
                made.down_proj[row, :, gone] = 0
    return made


def renumbered(index: Tensor) -> Tensor:
    return torch.tensor([IDS.index(i) for i in index.flatten().tolist()]).view_as(index)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("model_type", TYPES)
class TestEveryLayout:
    """The contract of an experts module whose neurons can be told apart."""

    def test_order_does_not_matter(self, model_type: str) -> None:
        whole = experts_of(model_type, "eager", torch.float64)
        width = channel_width(whole)
        made = sliced(whole, range(zoo.EXPERTS), drawn(zoo.EXPERTS, width, width))
        given = routes(whole, list(range(zoo.EXPERTS)))
        torch.testing.assert_close(made(*given), whole(*given), rtol=1e-6, atol=5e-6)  # one family sums in float32
        name = "gate_up_proj" if hasattr(whole, "gate_up_proj") else "up_proj"
        assert not torch.equal(getattr(made, name), getattr(whole, name))

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("width", [8, 7])  # grouped kernels take rows of 16 bytes only
    def test_a_subset_is_the_expert_with_the_other_columns_zeroed(
        self, model_type: str, implementation: str, width: int
    ) -> None:
        whole = experts_of(model_type, implementation, torch.float32)
        channels = drawn(len(IDS), channel_width(whole), width)
        hidden, index, gates = routes(whole, IDS)
        made = sliced(whole, IDS, channels)
        expected = masked(whole, IDS, channels)(hidden, index, gates)
        torch.testing.assert_close(made(hidden, renumbered(index), gates), expected, rtol=1e-6, atol=1e-6)
        assert (num_experts(made), channel_width(made), made.num_experts) == (3, width, 3)
        assert isinstance(made, type(whole))

    def test_the_id_past_the_last_costs_nothing(self, model_type: str) -> None:
        whole = experts_of(model_type)
        if getattr(whole.config if hasattr(whole, "config") else None, "_experts_implementation", None) != "grouped_mm":
            pytest.skip("runs a loop of its own")
        made = sliced(whole, IDS, drawn(len(IDS), channel_width(whole), 4))
        hidden, index, gates = routes(whole, IDS)
        index = renumbered(index)
        index[:, 1] = len(IDS)
        torch.testing.assert_close(made(hidden, index, gates), made(hidden, index[:, :1], gates[:, :1]))

    def test_neurons_go_round_bit_for_bit(self, model_type: str) -> None:
        whole = experts_of(model_type, dtype=torch.bfloat16)
        other = copy.deepcopy(whole)
        for weight in other.parameters(recurse=False):
            weight.zero_()
        for row in range(zoo.EXPERTS):
            assert neurons(whole, row).shape[0] == channel_width(whole)
            set_neurons(other, row, neurons(whole, row))
            set_rest(other, row, rest(whole, row))
        for (name, weight), again in zip(whole.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(weight, again), name

    def test_a_neuron_is_what_slicing_keeps(self, model_type: str) -> None:
        whole = experts_of(model_type)
        channels = drawn(len(IDS), channel_width(whole), 5)
        made = sliced(whole, IDS, channels)
        for row, expert in enumerate(IDS):
            assert torch.equal(neurons(made, row), neurons(whole, expert)[channels[row]])
            assert torch.equal(rest(made, row), rest(whole, expert))

    def test_meta_gives_the_same_shapes(self, model_type: str) -> None:
        whole = experts_of(model_type)
        channels = drawn(len(IDS), channel_width(whole), 5)
        real = sliced(whole, IDS, channels)
        meta = sliced(copy.deepcopy(whole).to("meta"), IDS, channels)
        assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
        assert all(p.is_meta for p in meta.parameters())

    def test_the_original_is_left_as_it_is(self, model_type: str) -> None:
        whole = experts_of(model_type)
        before = {name: value.clone() for name, value in whole.state_dict().items()}
        sizes = {name: value for name, value in vars(whole).items() if isinstance(value, int)}
        made = sliced(whole, IDS, drawn(len(IDS), channel_width(whole), 5))
        for weight in made.parameters():
            weight.zero_()
        after = whole.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert {name: value for name, value in vars(whole).items() if isinstance(value, int)} == sizes

    def test_bytes_of_an_expert_are_those_of_its_neurons_and_the_rest(self, model_type: str, tmp_path: Path) -> None:
        zoo.tiny_model(model_type).to(torch.bfloat16).save_pretrained(tmp_path)
        skeleton = Skeleton(tmp_path)
        for layer in model_facts(skeleton, "tiny").layers.values():
            experts = skeleton.model.get_submodule(layer.name)
            assert layer.width == channel_width(experts)
            assert layer.expert_bytes == layer.width * layer.channel_bytes + 2 * rest(experts, 0).numel()


@pytest.mark.parametrize("model_type", ["gpt_oss", "olmoe", "muse_spark"])
def test_a_slice_learns_and_is_saved_once(model_type: str) -> None:
    whole = experts_of(model_type, dtype=torch.float32)
    made = sliced(whole, IDS, drawn(len(IDS), channel_width(whole), 5))
    assert set(made.state_dict()) == {n for n, p in whole.named_parameters(recurse=False)}
    hidden, index, gates = routes(whole, IDS)
    with torch.enable_grad():
        made(hidden, renumbered(index), gates).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())
    assert all(weight.grad is None for weight in whole.parameters(recurse=False))


def test_bytes_follow_the_element_size_of_each_parameter() -> None:
    experts = experts_of("gpt_oss")
    sizes = {"gate_up_proj": 2, "down_proj": 2, "gate_up_proj_bias": 4}
    assert channel_bytes(experts, sizes) == 2 * 3 * zoo.HIDDEN + 4 * 2
    assert list(channel_views(experts)) == ["gate", "up", "down", "gate_bias", "up_bias"]


class Plain(nn.Module):
    """Experts without transformers' decorator and its flags."""

    def __init__(self, **weights: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in weights.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Swapped(Plain):
    """Up before gate, interleaved."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gate_up[..., ::2] * torch.relu(gate_up[..., 1::2])


class Mixing(Plain):
    """Neurons that are no neurons."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate * up.sum(-1, keepdim=True)


def test_projections_apart() -> None:
    experts = Plain(gate_proj=(4, 6, 8), up_proj=(4, 6, 8), down_proj=(4, 8, 6))
    assert channel_width(experts) == 6
    expected = torch.cat((experts.gate_proj[2], experts.up_proj[2], experts.down_proj[2].T), 1)
    assert torch.equal(neurons(experts, 2), expected)
    assert rest(experts, 2).shape == (0,)


def test_gate_is_told_from_up_by_what_it_does() -> None:
    experts = Swapped(gate_up_proj=(4, 12, 8), down_proj=(4, 8, 6))
    views = channel_views(experts)
    assert torch.equal(views["gate"], experts.gate_up_proj[:, 1::2])
    assert torch.equal(views["up"], experts.gate_up_proj[:, ::2])


def test_shapes_tell_a_transposed_stack() -> None:
    experts = Swapped(gate_up_proj=(4, 8, 12), down_proj=(4, 6, 8))
    assert torch.equal(channel_views(experts)["up"], experts.gate_up_proj[:, :, ::2].transpose(1, 2))
    assert torch.equal(channel_views(experts)["down"], experts.down_proj)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (Plain(gate_up_proj=(4, 12, 8), down_proj=(4, 8, 6)), "Plain cannot be told apart: it has no _apply_gate"),
        (Mixing(gate_up_proj=(4, 12, 8), down_proj=(4, 8, 6)), "does not take two inputs for each neuron"),
        (Swapped(gate_up_proj=(4, 10, 8), down_proj=(4, 8, 6)), "disagree about the number of neurons .gate_up_proj"),
    ],
)
def test_what_cannot_be_told_is_refused(experts: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        channel_width(experts)
