"""Every group of sums against a slow, obvious reference: hooks on the whole model, and loops in float64."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small
import zoo
from contract import one_expert
from understudy.activations import ActivationStore
from understudy.channels import channel_views, channel_width, rest, set_rest
from understudy.collectors import Resident, Watch, all_collectors, collectors_for
from understudy.errors import CheckpointError, UnderstudyError
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import calibrate
from understudy.stats import EXTRA, ExpertStats, load_stats
from understudy.sums import FEW, group_of
from understudy.walk import Walk

BATCH, DENSE = 2, 7
ALL = Calibration(collect=("sets", "dense"), dense_tokens=DENSE, batch_size=BATCH)
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {},  # shared experts, groups, a correction bias that is no part of the logits
    "gpt_oss": {},  # a bias that is part of the logits; biases of experts
    "qwen2_moe": {},  # a shared expert with a gate of its own
    "granitemoe": {"residual_multiplier": 0.22},
    "minimax_m3_vl": {"text_config": {"routed_scaling_factor": 2.5}},  # scaled in the block
    "cohere2_moe": {},  # attention in parallel
}
# of what the block puts out in the stream, and of routed experts in what the block puts out
SCALES = {"granitemoe": (0.22, 1.0), "minimax_m3_vl": (1.0, 2.5)}


def tokens(rows: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def watched(
    folder: Path, ids: torch.Tensor, settings: Calibration, first: int = 0, total: int | None = None
) -> dict[str, ExpertStats]:
    """Sums of all layers by streaming, as one of several processes has them where `first` and `total` say so."""
    skeleton, found = Skeleton(folder), {}
    walk = Walk(skeleton, ids.numpy(), settings.batch_size, ActivationStore(1 << 30))
    rest = {"batches": walk.batches, "first": first, "total": total or ids.numel()}

    @contextmanager
    def observe(index: int, decoder: torch.nn.Module) -> Iterator[None]:
        layers = [layer for layer in skeleton.layers if layer.index == index]
        watches = [Watch(Resident(skeleton, layer, decoder, settings, **rest)) for layer in layers]
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.attached())
            yield
        found.update({layer.key: watch.result()[0] for layer, watch in zip(layers, watches)})

    with walk.ready():
        walk.through_layers(observe)
    assert not any(
        "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in skeleton.model.modules()
    ), "a hook stayed"
    return found


class Seen:
    """What one layer of a whole model took and gave."""

    def __init__(self, model: Any, layer: Any, ids: torch.Tensor) -> None:
        self.layer, self.experts = layer, model.get_submodule(layer.name)
        decoder, block = model.get_submodule(f"{layer.stack}.{layer.index}"), model.get_submodule(layer.block)
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str, value: Any) -> None:
            value = value[0] if isinstance(value, tuple) else value
            kept[name] = value.detach().clone().reshape(-1, value.shape[-1])

        def entered(module: torch.nn.Module, args: Any) -> None:
            for name, value in zip(("x", "ids", "g"), args):
                keep(name, value)

        handles = [
            decoder.register_forward_pre_hook(
                lambda m, args, kwargs: keep("before", args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            ),
            decoder.register_forward_hook(lambda m, args, output: keep("after", output)),
            block.register_forward_hook(lambda m, args, output: keep("block", output)),
            self.experts.register_forward_pre_hook(entered),
            self.experts.register_forward_hook(lambda m, args, output: keep("routed", output)),
        ]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        self.before, self.after, self.block, self.routed = (
            kept[name].double().numpy() for name in ("before", "after", "block", "routed")
        )
        self.x, self.chosen = kept["x"], kept["ids"].tolist()
        self.gates = kept["g"].double().tolist()

    def y(self, token: int, expert: int) -> np.ndarray:
        return one_expert(self.experts, self.x[token], expert).double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def reference(model: Any, layer: Any, ids: torch.Tensor, family: str) -> dict[str, Any]:
    """Every sum by its definition."""
    seen, E, H = Seen(model, layer, ids), layer.num_experts, layer.hidden_size
    scale, inner = SCALES.get(family, (1.0, 1.0))
    found: dict[str, Any] = {name: np.zeros(E) for name in ("norm_sq_sum", "output_max", "shift_norm_sum")}
    sets: Counter[tuple[int, ...]] = Counter()
    for t, (chosen, gates) in enumerate(zip(seen.chosen, seen.gates)):
        sets[tuple(sorted(chosen))] += 1
        shift = max(0.0, 1 - cosine(seen.after[t] - scale * inner * seen.routed[t], seen.after[t]))
        for e, g in zip(chosen, gates):
            y = seen.y(t, e)
            found["norm_sq_sum"][e] += y @ y
            found["output_max"][e] = max(found["output_max"][e], np.abs(y).max())
            found["shift_norm_sum"][e] += shift * g * np.linalg.norm(y)
    found["topk_sets"] = np.array(sorted(sets))
    found["topk_counts"] = np.array([sets[s] for s in sorted(sets)], float)
    found["moe_cos_sum"] = sum(cosine(h - scale * m, h) for h, m in zip(seen.after, seen.block))
    found["block_cos_sum"] = sum(cosine(a, b) for a, b in zip(seen.before, seen.after))
    return found | of_weights(model, layer) | of_router(model, layer, seen, ids) | of_dense(seen, E, H)


def router_of(model: Any, layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The router's matrix, and the bias of its linear map."""
    name = next(name for name in layer.router if model.get_parameter(name).ndim == 2)
    router = model.get_submodule(name.rpartition(".")[0])
    bias = router.bias.double().numpy() if hasattr(router, "bias") else np.zeros(layer.num_experts)
    return model.get_parameter(name).double().numpy(), bias


def of_weights(model: Any, layer: Any) -> dict[str, Any]:
    named = dict(model.get_submodule(layer.name).named_parameters())
    each = [[named[n][e].double().numpy() for n in named if not n.endswith("bias")] for e in range(layer.num_experts)]
    return {
        "weight_abs_sum": np.array([sum(np.abs(w).sum() for w in ws) for ws in each]),
        "weight_sq_sum": np.array([sum((w**2).sum() for w in ws) for ws in each]),
        "weight_numel": float(sum(w.size for w in each[0])),
        "router_norm": np.array([np.linalg.norm(row) for row in router_of(model, layer)[0]]),
    }


def of_router(model: Any, layer: Any, seen: Seen, ids: torch.Tensor) -> dict[str, Any]:
    (W, bias), E = router_of(model, layer), layer.num_experts
    logits = seen.x.double().numpy() @ W.T + bias
    gram, cos = np.zeros((E, E)), np.zeros((E, E))
    for block in logits.reshape(*ids.shape, E):
        for i in range(E):
            for j in range(E):
                gram[i, j] += block[:, i] @ block[:, j]
                cos[i, j] += cosine(block[:, i], block[:, j])
    norms = sum(np.linalg.norm(row) for row in logits)
    return {"sequences": float(len(ids)), "logit_norm_sum": norms, "logit_gram": gram, "logit_cos_sum": cos}


def of_dense(seen: Seen, E: int, H: int) -> dict[str, Any]:
    places = [round(p) for p in np.linspace(0, len(seen.x) - 1, DENSE)]
    y = [np.array([seen.y(t, e) for t in places]) for e in range(E)]
    centred = [a - a.mean(0) for a in y]
    pairs = [(i, j) for i in range(E) for j in range(E)]
    cos = [sum(cosine(a, b) for a, b in zip(y[i], y[j])) for i, j in pairs]
    hsic = [((centred[i].T @ centred[j]) ** 2).sum() for i, j in pairs]
    return {
        "dense_tokens": float(DENSE),
        "dense_sum": np.array([a.sum(0) for a in y]),
        "dense_cos_sum": np.array(cos).reshape(E, E),
        "dense_hsic": np.array(hsic).reshape(E, E),
        "dense_activations": activations_of(seen, E, places),
    }


def activations_of(seen: Seen, E: int, places: list[int]) -> np.ndarray:
    """Activations [E, I, N] of a layer's experts: what they put out where `down_proj` hands each neuron through."""
    plain, width, H = copy.deepcopy(seen.experts), channel_width(seen.experts), seen.x.shape[1]
    found = np.empty((E, width, len(places)))
    for e in range(E):
        set_rest(plain, e, torch.zeros_like(rest(plain, e)))
        for start in range(0, width, H):  # as many as an expert puts out
            channel_views(plain)["down"][e].copy_(torch.eye(width + H, H)[:width].roll(start, 0))
            for n, t in enumerate(places):
                found[e, start : start + H, n] = one_expert(plain, seen.x[t], e)[: width - start].numpy()
    return found


def folder_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    zoo.tiny_model(family, **FAMILIES.get(family, {})).to(dtype).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_what_they_say(family: str, tmp_path: Path) -> None:
    folder, ids = folder_of(family, tmp_path / "model"), tokens()
    layers = Skeleton(folder).layers
    whole = zoo.model_class(family).from_pretrained(folder).eval().requires_grad_(False)
    got = watched(folder, ids, ALL)
    layer = layers[-1]  # the others run the same code
    for name, value in reference(whole, layer, ids, family).items():
        other, scale = got[layer.key].arrays()[name], float(np.abs(value).max())
        np.testing.assert_allclose(other, value, rtol=2e-5, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_parts_add_up(family: str, tmp_path: Path) -> None:
    folder, ids = folder_of(family, tmp_path / "model"), tokens(rows=5)
    whole, total = watched(folder, ids, ALL), ids.numel()
    first = watched(folder, ids[:3], ALL, 0, total)
    second = watched(folder, ids[3:], ALL, ids[:3].numel(), total)
    merged = {key: first[key] + second[key] for key in first}
    for key, layer in whole.items():
        assert merged[key].dense_tokens == DENSE, "of all processes together"
        for name, value in layer.arrays().items():
            if name == "dense_hsic":
                continue  # centred over what one process has
            other, scale = merged[key].arrays()[name], float(np.abs(value).max())
            np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6 * scale, err_msg=f"layer {key}, {name}")


def test_activations_are_of_a_few_tokens_spread_over_the_text(tmp_path: Path) -> None:
    """The same few, however the text is split; of two runs on different text those of the first, then of the second."""
    folder, ids = folder_of("olmoe", tmp_path / "model"), tokens(rows=9)
    many = ALL.model_copy(update={"dense_tokens": 80})
    whole = watched(folder, ids, many)
    parts = [watched(folder, part, many, first, 81) for part, first in ((ids[:4], 0), (ids[4:], 36))]
    model = zoo.model_class("olmoe").from_pretrained(folder).eval().requires_grad_(False)
    layer = Skeleton(folder).layers[-1]
    tokens_of = [round(place) for place in np.linspace(0, 80, 80)]
    places = [tokens_of[round(k)] for k in np.linspace(0, 79, FEW)]
    expected = activations_of(Seen(model, layer, ids), layer.num_experts, places)
    one, (a, b) = whole[layer.key], (part[layer.key] for part in parts)
    np.testing.assert_allclose(one.dense_activations, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert one.dense_activations.dtype == np.float32
    assert 0 < a.dense_activations.shape[2] < FEW
    np.testing.assert_allclose((a + b).dense_activations, one.dense_activations, rtol=1e-4, atol=1e-7)
    more = (a + one).dense_activations
    assert more.shape == one.dense_activations.shape
    n = a.dense_activations.shape[2]
    np.testing.assert_array_equal(more[:, :, :n], a.dense_activations)
    np.testing.assert_array_equal(more[:, :, n:], one.dense_activations[:, :, : FEW - n])
    np.testing.assert_array_equal((one + a).dense_activations, one.dense_activations)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_batches_do_not_matter(family: str, tmp_path: Path) -> None:
    """Nor how many tokens the first of them has, from which is told what a family does."""
    folder, ids = folder_of(family, tmp_path / "model"), tokens(rows=40)
    one, many = (watched(folder, ids, ALL.model_copy(update={"batch_size": n})) for n in (1, 40))
    small.assert_close(many, one, 1e-5)
    assert all(layer.shift_norm_sum is not None for layer in many.values())


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("flex_olmo", {"moe_cos_sum", "shift_norm_sum"}),  # a norm behind the block
        ("axk1", {"shift_norm_sum"}),  # a norm at the end of the block, over routed and shared experts together
        ("nemotron_h_omni", {"shift_norm_sum"}),  # experts in a narrower space
        ("deepseek_v4", {"moe_cos_sum", "shift_norm_sum", "block_cos_sum"}),  # several streams
        ("zaya", {"sequences", "logit_norm_sum", "logit_gram", "logit_cos_sum", "router_norm"}),  # one more class
    ],
)
def test_what_a_family_does_not_show_is_left_out(family: str, missing: set[str], tmp_path: Path) -> None:
    layers = watched(folder_of(family, tmp_path / "model"), tokens(), ALL)
    cheap = {"outputs", "weights", "router", "stream", "sets", "dense"}
    names = [name for name in ExpertStats.__dataclass_fields__ if group_of(name) in cheap]
    for layer in layers.values():
        lacking = {name for name in names if getattr(layer, name) is None}
        assert missing <= lacking
        if family != "zaya":  # which also scales its stream by vectors
            assert lacking == missing


def test_bfloat16_is_recognised(tmp_path: Path) -> None:
    """Rounding must not pass for a family that does something else, nor the other way round."""
    ids = tokens()
    for family, there in (("granitemoe", True), ("qwen2_moe", True), ("flex_olmo", False)):
        layers = watched(folder_of(family, tmp_path / family, torch.bfloat16), ids, ALL)
        assert all((layer.moe_cos_sum is not None) == there for layer in layers.values()), family
        assert all((layer.shift_norm_sum is not None) == there for layer in layers.values()), family


def test_small_turns_are_not_lost(tmp_path: Path) -> None:
    """A block that hardly moves the stream: 1 - cos is far below what a float32 cosine resolves."""
    model = zoo.tiny_model("olmoe").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj"):
            parameter.mul_(1e-3)
    model.save_pretrained(tmp_path / "model")
    layers = Skeleton(tmp_path / "model").layers
    got = watched(tmp_path / "model", tokens(), Calibration())[layers[0].key]
    expected = reference(model, layers[0], tokens(), "olmoe")["shift_norm_sum"]
    np.testing.assert_allclose(got.shift_norm_sum, expected, rtol=1e-2)


def test_which_groups_run() -> None:
    cheap = {c.group for c in collectors_for(Calibration())}
    assert {"weights", "base", "router", "stream"} <= cheap
    assert not cheap & set(EXTRA)
    assert {c.group for c in collectors_for(ALL)} == cheap | {"sets", "dense"}
    assert set(all_collectors()) <= {group_of(name) for name in ExpertStats.__dataclass_fields__}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.model_folder(tmp_path_factory.mktemp("source") / "model")


def test_weights_alone(source: Path, tmp_path: Path) -> None:
    """No text, no tokenizer: what the weights say is what a whole calibration says of them."""
    data = small.text_file(tmp_path / "text.txt")
    base = small.model_folder(tmp_path / "base", seed=5)
    whole = calibrate(source, tmp_path / "whole.st", data=data, samples=2, seq_len=16, base=str(base))
    seen: list[int] = []
    out = tmp_path / "alone.st"
    calibrate(source, out, weights_only=True, base=str(base), progress=lambda done, total: seen.append(done))
    alone = load_stats(out)
    assert alone.data["weights_only"] is True
    assert seen[-1] == zoo.LAYERS
    assert small.beside(out) == {"text.txt", "base", "whole.st"}
    origin = zoo.tiny_model("olmoe", seed=5)
    for key, layer in alone.layers.items():
        assert layer.tokens == 0
        assert not layer.count.any()
        for name, value in layer.arrays().items():
            if group_of(name) in ("weights", "base"):
                np.testing.assert_array_equal(value, getattr(whole.layers[key], name))
        assert layer.logit_gram is None
        rows = origin.get_parameter(f"model.layers.{key}.mlp.gate.weight").double()
        np.testing.assert_allclose(layer.base_router_norm, rows.norm(dim=1).detach().numpy(), rtol=1e-12)
        assert np.abs(layer.base_router_norm - layer.router_norm).min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "text.txt"}, "--weights-only reads no text; leave out --data"),
        ({"collect": ("sets",)}, "--weights-only reads no text; leave out --collect"),
        ({"sequential": "ream", "sequential_ratio": 0.5}, "--weights-only reads no text; leave out --sequential"),
    ],
)
def test_weights_alone_with_settings_of_text(
    options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnderstudyError, match=re.escape(message)):
        calibrate(source, tmp_path / "out.st", weights_only=True, **options)


def test_a_base_of_another_architecture(source: Path, tmp_path: Path) -> None:
    other = small.model_folder(tmp_path / "other", "mixtral")
    more = small.model_folder(tmp_path / "more", num_experts=16)
    for base, why in (
        (other, "model type 'mixtral', not 'olmoe'"),
        (more, r"'model.layers.0.mlp.gate.weight' has shape \(16, 32\), not \(8, 32\)"),
        (tmp_path / "gone", "no such model folder"),
    ):
        with pytest.raises(CheckpointError, match=why) as caught:
            calibrate(source, tmp_path / "out.st", weights_only=True, base=str(base))
        assert "\n" not in str(caught.value)
    assert small.beside(tmp_path / "out.st") == {"other", "more"}


def test_groups_by_commas(source: Path, tmp_path: Path) -> None:
    assert Calibration(collect="sets,dense").collect == ("sets", "dense")
    with pytest.raises(UnderstudyError, match=r"collect\.1: .*'dense'.*got 'sparse'") as caught:
        calibrate(source, tmp_path / "out.st", collect=("sets,sparse",))
    assert "\n" not in str(caught.value)
