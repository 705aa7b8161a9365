"""The zoo holds every MoE type of the installed transformers; `find_moe_layers` finds in each what is really there."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import zoo
from contract import with_experts
from understudy.errors import UnsupportedModelError
from understudy.moe import MoELayer, expert_count_keys, expert_dim, find_moe_layers, is_experts, text_config

# Families whose experts cannot be reached, and the words that say why.


def families(names: list[str]) -> list[Any]:
    """Mark the types outside DISTINCT for the long run."""
    return [name if name in zoo.DISTINCT else pytest.param(name, marks=pytest.mark.families) for name in names]


every_seam = pytest.mark.parametrize("model_type", families(zoo.SEAM))


@functools.cache
def tiny_model(model_type: str) -> Any:
    """Return a model that is only looked at, shared by the tests."""
    return zoo.tiny_model(model_type)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**zoo.sample_inputs(model)).logits


def seam_calls(model: nn.Module, layers: list[MoELayer]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Run text through a model and return what each seam was called with."""
    calls = {}

    def keep(key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            assert key not in calls, "called twice"
            calls[key] = (*args, *kwargs.values())

        return hook

    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(keep(layer.key), with_kwargs=True) for layer in layers
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return calls


def test_scan_is_complete() -> None:
    types = zoo.model_types()
    assert len(zoo.SEAM) >= 58
    assert set(zoo.DISTINCT) <= set(zoo.SEAM)
    assert set(zoo.REFUSED) | set(zoo.UNBUILDABLE) <= set(types)


@pytest.mark.families
@pytest.mark.parametrize("model_type", sorted(zoo.UNBUILDABLE))
def test_unbuildable(model_type: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever it is, it must be what the table says)
        zoo.tiny_model(model_type)
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(zoo.UNBUILDABLE[model_type])


@pytest.mark.parametrize("model_type", families([*zoo.SEAM, *zoo.REFUSED]))
def test_zoo_round_trip(model_type: str, tmp_path: Any) -> None:
    model = tiny_model(model_type)
    before = logits(model)
    assert before.isfinite().all()
    assert before.std() > 0.01
    model.save_pretrained(tmp_path)
    assert torch.equal(before, logits(type(model).from_pretrained(tmp_path).eval()))
    if model.can_generate():
        inputs = zoo.sample_inputs(model)
        ids = model.generate(inputs["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert getattr(ids, "sequences", ids).shape[1] >= 4


@every_seam
def test_seam_is_called_as_described(model_type: str) -> None:
    model = tiny_model(model_type)
    layers = find_moe_layers(model)
    calls = seam_calls(model, layers)
    assert list(calls) == [layer.key for layer in layers]
    for layer in layers:
        hidden, ids, gates = calls[layer.key]
        tokens = zoo.sample_inputs(model)["input_ids"].numel()
        assert hidden.shape == (tokens, layer.hidden_size)
        assert hidden.is_floating_point()
        assert ids.shape == gates.shape == (tokens, layer.top_k)
        assert ids.dtype in (torch.int32, torch.int64)
        assert gates.is_floating_point()
        assert ids.min() >= 0
        assert ids.max() < layer.num_experts
        assert ids.unique().numel() > layer.top_k, "the weights of the zoo do not spread the tokens"
        if layer.groups > 1:  # the zoo lets a token pick from one group
            group = ids // (layer.num_experts // layer.groups)
            assert (group == group[:, :1]).all()
        if layer.top_k > 1:
            assert (ids.sort(dim=1).values.diff(dim=1) > 0).all(), "an expert twice for one token"


@every_seam
def test_every_moe_layer_is_found(model_type: str) -> None:
    model = tiny_model(model_type)
    layers = find_moe_layers(model)
    stack = model.get_submodule(layers[0].stack)
    with_experts = [
        index
        for index, layer in enumerate(stack)
        if any(p.ndim == 3 and p.shape[0] == zoo.EXPERTS and "expert" in name for name, p in layer.named_parameters())
    ]
    assert len(layers) >= 2
    assert [layer.index for layer in layers] == with_experts
    assert [layer.key for layer in layers] == [str(index) for index in with_experts]
    assert len(stack) == text_config(model.config).num_hidden_layers
    for kinds in ("mlp_layer_types", "layers_block_type"):
        said = getattr(text_config(model.config), kinds, None)
        if said and {"sparse", "moe"} & set(said):
            assert with_experts == [i for i, kind in enumerate(said) if kind == "sparse" or "moe" in kind]


@every_seam
def test_sizes_and_names(model_type: str) -> None:
    model = tiny_model(model_type)
    state = model.state_dict()
    for layer in find_moe_layers(model):
        experts = model.get_submodule(layer.name)
        assert layer.num_experts == zoo.EXPERTS
        assert experts.down_proj.shape[0] == zoo.EXPERTS
        assert layer.expert_params * zoo.EXPERTS == sum(p.numel() for p in experts.parameters(recurse=False))
        assert {layer.hidden_size, layer.width} == set(experts.down_proj.shape[1:])
        for name in layer.router:
            shape = tuple(state[name].shape)
            assert shape[expert_dim(shape, layer.num_experts)] == zoo.EXPERTS
        for name in layer.shared:
            assert next(model.get_submodule(name).parameters()).numel() > 0
        assert expert_count_keys(text_config(model.config), zoo.EXPERTS)


@every_seam
def test_meta_model_gives_the_same(model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.device("meta"):
        bare = type(model)(model.config)
    assert find_moe_layers(bare) == find_moe_layers(model)


@every_seam
def test_router_names_do_not_depend_on_other_sizes(model_type: str) -> None:
    # Half of the zoo's sizes are 8, as is the number of experts; 12 is no other size.
    config = zoo.tiny_config(model_type)
    inner = text_config(config)
    for name in expert_count_keys(inner, zoo.EXPERTS):
        setattr(inner, name, 12)
    with torch.device("meta"):
        other = zoo.model_class(model_type)(config)
    found = find_moe_layers(other)
    assert found[0].num_experts == 12
    assert [layer.router for layer in found] == [layer.router for layer in find_moe_layers(tiny_model(model_type))]


@every_seam
def test_removal_of_router_rows_is_complete(model_type: str) -> None:
    """Cut experts and router rows of the state dict; a model of half the experts takes it and picks only from these."""
    model = tiny_model(model_type)
    layers = find_moe_layers(model)
    if any(layer.removable for layer in layers):
        pytest.skip(next(layer.removable for layer in layers if layer.removable))
    size = zoo.EXPERTS // layers[0].groups  # keep the first half of each group
    kept = [e for e in range(zoo.EXPERTS) if e % size < size // 2]
    small = with_experts(model, dict.fromkeys((layer.key for layer in layers), kept))
    cut = find_moe_layers(small)
    assert [layer.num_experts for layer in cut] == [len(kept)] * len(layers)
    calls = seam_calls(small, cut)
    assert max(int(ids.max()) for _, ids, _ in calls.values()) == len(kept) - 1
    assert logits(small).isfinite().all()


@pytest.mark.parametrize("model_type", sorted(zoo.REFUSED))
def test_refusals_say_why(model_type: str) -> None:
    with torch.device("meta"):
        model = zoo.model_class(model_type)(zoo.tiny_config(model_type))
    with pytest.raises(UnsupportedModelError, match=zoo.REFUSED[model_type]):
        find_moe_layers(model)


def test_dense_models_are_refused() -> None:
    sizes = dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size"], 16)
    llama = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **sizes)
    for config in (
        llama,
        zoo.tiny_config("gemma4_text", enable_moe_block=False),
        zoo.tiny_config("doge", is_moe=False),
    ):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        with pytest.raises(UnsupportedModelError, match="is not a Mixture-of-Experts model"):
            find_moe_layers(model)


def test_reasons_against_removal() -> None:
    def reason(model_type: str, at: int = 0) -> str | None:
        return find_moe_layers(tiny_model(model_type))[at].removable

    assert reason("olmoe") is None
    assert re.search("tid2eid is a table of expert ids", str(reason("deepseek_v4")))
    assert reason("deepseek_v4", 1) is None
    assert re.search("no weight with exactly one row per expert", str(reason("zaya")))
    assert re.search("other than text", str(reason("ernie4_5_vl_moe")))


def test_unusual_places() -> None:
    """Names that a walk, a cut and a report lean on, spelled out for families with parts in unusual places."""

    def last(model_type: str) -> MoELayer:
        return find_moe_layers(tiny_model(model_type))[-1]

    gemma = last("gemma4_text")
    assert (gemma.name, gemma.block) == ("model.layers.3.experts", "model.layers.3")
    assert gemma.router == ("model.layers.3.router.per_expert_scale", "model.layers.3.router.proj.weight")
    lfm = last("lfm2_moe")
    assert lfm.router == ("model.layers.3.feed_forward.gate.weight", "model.layers.3.feed_forward.expert_bias")
    deepseek = last("deepseek_v3")
    assert (deepseek.groups, deepseek.shared) == (2, ("model.layers.3.mlp.shared_experts",))
    assert last("granitemoehybrid").shared == ("model.layers.3.shared_mlp",)
    wrapped = last("qwen3_vl_moe")
    assert wrapped.stack == "model.language_model.layers"
    muse = last("muse_spark")
    assert muse.hidden_size == 16 < text_config(zoo.tiny_config("muse_spark")).hidden_size
    assert not is_experts(zoo.tiny_model("inkling_text").get_submodule("model.layers.3.mlp.shared_experts"))


def test_further_experts_of_a_layer_have_keys_of_their_own() -> None:
    model = zoo.tiny_model("olmoe")
    block = model.model.layers[1].mlp
    block.second = copy.deepcopy(block.experts)
    assert [layer.key for layer in find_moe_layers(model)] == ["0", "1", "1.second", "2", "3"]
