"""Sums over neurons against loops over routes in float64, in families that hold their experts in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from contract import ids_of
from understudy.collectors import Resident, Watch
from understudy.data import Blocks
from understudy.layout import model_facts
from understudy.moe import find_moe_layers
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import collect
from understudy.stats import ExpertStats, Stats
from understudy.sums import group_of

TYPES = ["olmoe", "mixtral", "gpt_oss", "qwen3_moe", "nemotron_h"]
OTHERS = ["step3p7", "openai_privacy_filter"]  # loops of their own
FACTOR = {"openai_privacy_filter": zoo.TOP_K}  # of the routed sum in the block; 1 in the other families
BATCH = 2
FIELDS = [name for name in ExpertStats.__dataclass_fields__ if group_of(name) == "channels"]
LOCAL = {"attribution_sum", "local_loss_sum"}


def calibrated(
    model_type: str,
    folder: Path,
    ids: torch.Tensor,
    experts: str = "auto",
    collect_too: tuple[str, ...] = ("channels",),
) -> Stats:
    """Statistics by streaming."""
    zoo.tiny_model(model_type).save_pretrained(folder / "model")
    skeleton = Skeleton(folder / "model", experts=experts)
    facts = model_facts(skeleton, "tiny")
    blocks = Blocks(ids.numpy().astype(np.int32), np.zeros(len(ids), np.int16), ("test",), (), "0" * 64)
    settings = Calibration(batch_size=BATCH, collect=collect_too)
    layers, probes = collect(skeleton, facts, blocks, settings, folder / "work")
    return Stats(facts, {}, layers, probes)


def calls_of(model: Any, ids: torch.Tensor) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What each batch of a whole float64 model shows at the seam and behind its decoder layer, by layer key."""
    layers = find_moe_layers(model)
    seen: dict[str, list[dict[str, torch.Tensor]]] = {layer.key: [] for layer in layers}
    handles = []
    for layer in layers:

        def at_seam(module: Any, args: Any, kwargs: Any, key: str = layer.key) -> None:
            hidden, index, gates = [*args, *kwargs.values()][:3]
            seen[key].append({"x": hidden, "index": index, "gates": gates})

        def behind(module: Any, args: Any, output: Any, key: str = layer.key) -> None:
            out = output[0] if isinstance(output, tuple) else output
            seen[key][-1]["out"] = out.reshape(-1, out.shape[-1])

        experts = model.get_submodule(layer.name)
        handles.append(experts.register_forward_pre_hook(at_seam, with_kwargs=True))
        handles.append(model.get_submodule(f"{layer.stack}.{layer.index}").register_forward_hook(behind))
    with torch.no_grad():
        for rows in ids.split(BATCH):
            model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def neuron_parts(experts: Any, expert: int, x: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Gate pre-activation (None where ungated), up output and activation of every neuron for one token."""
    transposed = experts.is_transposed if hasattr(experts, "is_transposed") else False
    name = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    weight = getattr(experts, name)[expert]
    projected = x @ (weight if transposed else weight.T)
    if hasattr(experts, f"{name}_bias"):
        projected = projected + getattr(experts, f"{name}_bias")[expert]
    if name == "up_proj":
        return None, projected, experts.act_fn(projected)
    pair = (
        (projected[::2], projected[1::2]) if getattr(experts, "is_concatenated", True) is False else projected.chunk(2)
    )
    return *pair, experts._apply_gate(projected[None])[0]


def slow(experts: Any, calls: list[dict[str, torch.Tensor]], width: int, factor: float) -> dict[str, np.ndarray]:
    """Every sum route by route, each vector for itself."""
    E = zoo.EXPERTS
    sums = {name: np.zeros((E, width)) for name in FIELDS if name not in LOCAL | {"towards_sum"}}
    sums |= {"attribution_sum": np.zeros(E), "towards_sum": np.zeros(E), "local_loss_sum": np.zeros(())}
    down = experts.down_proj if getattr(experts, "is_transposed", False) else experts.down_proj.transpose(1, 2)
    sums["down_sq_norm"] = down.square().sum(2).numpy()
    for call in calls:
        effects: dict[int, list[np.ndarray]] = {e: [] for e in range(E)}
        for x, index, gates, out in zip(call["x"], call["index"], call["gates"], call["out"], strict=True):
            answers = []
            for e, g in zip(index.tolist(), gates.tolist(), strict=True):
                if g == 0:
                    continue
                gate, up, h = neuron_parts(experts, e, x)
                contribution = h[:, None] * down[e]  # [I, H]
                y = contribution.sum(0)
                if hasattr(experts, "down_proj_bias"):
                    y = y + experts.down_proj_bias[e]
                answers.append((e, g, y))
                sums["activation_sum"][e] += h.numpy()
                sums["activation_sq_sum"][e] += (h**2).numpy()
                sums["gated_activation_sum"][e] += (g**2 * h).numpy()
                sums["gated_activation_sq_sum"][e] += (g**2 * h**2).numpy()
                best = sums["gated_activation_sq_max"]
                best[e] = np.maximum(best[e], (g**2 * h**2).numpy())
                sums["projection_sum"][e] += (contribution @ y / y.norm()).numpy()
                sums["up_sq_sum"][e] += (up**2).numpy()
                if gate is not None:
                    sums["preactivation_sq_sum"][e] += (gate**2).numpy()
                sums["towards_sum"][e] += g * float(y.norm()) * (1 - float(torch.cosine_similarity(x, y, dim=0)))
            local, pulls = local_loss(answers, out, factor)
            sums["local_loss_sum"] += local
            for (e, _, _), effect in zip(answers, pulls, strict=True):
                effects[e].append(effect)
        for e, found in effects.items():
            if found:
                values = np.array(found)
                limit = np.quantile(np.abs(values), 0.99, axis=0)
                sums["attribution_sum"][e] += np.clip(values, -limit, limit).sum()
    return sums


def local_loss(
    answers: list[tuple[int, float, torch.Tensor]], out: torch.Tensor, factor: float
) -> tuple[float, list[np.ndarray]]:
    """MoE-Slimming's loss of one token by scaling what the experts answer, and what autograd says of each answer."""
    answered = [(0.9 * y).requires_grad_() for _, _, y in answers]
    with torch.enable_grad():
        rest = out - factor * sum(g * y for _, g, y in answers)
        scaled = rest + factor * sum(g * z for (_, g, _), z in zip(answers, answered, strict=True))
        loss = ((scaled - out) ** 2).sum() / (out**2).sum()
        gradients = torch.autograd.grad(loss, answered)
    return float(loss.detach()), [-(d * z.detach()).numpy() for d, z in zip(gradients, answered, strict=True)]


@pytest.mark.parametrize("model_type", TYPES + OTHERS)
def test_sums_equal_the_slow_reference(model_type: str, tmp_path: Path) -> None:
    ids = ids_of(rows=3, length=10)
    stats = calibrated(model_type, tmp_path, ids)
    model = zoo.tiny_model(model_type).double()
    model.set_experts_implementation("eager")
    calls = calls_of(model, ids)
    for key, layer in list(stats.model.layers.items())[:2]:
        with torch.no_grad():
            expected = slow(model.get_submodule(layer.name), calls[key], layer.width, FACTOR.get(model_type, 1))
        assert set(expected) == set(FIELDS)
        for name, value in expected.items():
            got = getattr(stats.layers[key], name)
            assert got is not None, f"layer {key} lacks {name}"
            scale = np.abs(value).max()
            assert (scale > 0) != (model_type == "nemotron_h" and name == "preactivation_sq_sum"), name
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=2e-5 * scale, err_msg=f"layer {key}, {name}")


@pytest.mark.parametrize("model_type", ["olmoe", "openai_privacy_filter", "deepseek_v3", "granitemoe"])
def test_local_loss_is_what_scaling_the_experts_does_to_the_layer(model_type: str, tmp_path: Path) -> None:
    ids = ids_of(rows=2)
    stats = calibrated(model_type, tmp_path, ids)
    key, layer = list(stats.model.layers.items())[-1]
    model = zoo.tiny_model(model_type).double()
    model.set_experts_implementation("eager")
    whole = torch.cat([call["out"] for call in calls_of(model, ids)[key]])
    experts = model.get_submodule(layer.name)
    handle = experts.register_forward_hook(lambda module, args, output: 0.9 * output)
    scaled = torch.cat([call["out"] for call in calls_of(model, ids)[key]])
    handle.remove()
    expected = float(((scaled - whole) ** 2).sum(1).div((whole**2).sum(1)).sum())
    np.testing.assert_allclose(stats.layers[key].local_loss_sum, expected, rtol=1e-4)


def test_what_a_family_does_not_show_is_left_out(tmp_path: Path) -> None:
    stats = calibrated("muse_spark", tmp_path, ids_of())  # experts narrower than the stream, a norm after each
    for sums in stats.layers.values():
        assert {name for name in FIELDS if getattr(sums, name) is None} == LOCAL
        assert sums.projection_sum.any()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_routes_that_nobody_chose_do_not_count(implementation: str, tmp_path: Path) -> None:
    """Some routers fill a token's unused places with expert 0 at gate 0."""
    zoo.tiny_model("olmoe").save_pretrained(tmp_path)
    skeleton = Skeleton(tmp_path, experts=implementation)
    generator = torch.Generator().manual_seed(0)
    hidden, gates = torch.randn(30, zoo.HIDDEN, generator=generator), torch.rand(30, 2, generator=generator) + 0.1
    index = torch.rand(30, zoo.EXPERTS, generator=generator).argsort(1)[:, :2]
    filled, unused = index.clone(), torch.zeros(30, dtype=torch.bool)
    unused[::3] = True
    filled[unused, 1], gates[unused, 1] = 0, 0.0
    found = []
    with skeleton.resident(0) as decoder, torch.no_grad():
        for _ in range(2):
            resident = Resident(skeleton, skeleton.layers[0], decoder, Calibration(collect=("channels",)))
            watch = Watch(resident)
            with watch.attached():
                resident.experts(hidden, filled, gates)
            found.append(watch.sums())
            filled = torch.where(unused[:, None], filled[:, :1], filled)  # with another expert, still at gate 0
    for name in set(FIELDS) & set(found[0]):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert {"activation_sum", "projection_sum", "towards_sum"} <= set(found[0])


def test_they_add_up_over_batches_and_are_only_there_when_asked_for(tmp_path: Path) -> None:
    ids = ids_of(rows=4)
    whole = calibrated("olmoe", tmp_path / "a", ids)
    parts = [calibrated("olmoe", tmp_path / name, rows) for name, rows in zip("bc", ids.split(2), strict=True)]
    merged = parts[0] + parts[1]
    for key, sums in whole.layers.items():
        for name in FIELDS:
            got, value = getattr(merged.layers[key], name), getattr(sums, name)
            np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6 * np.abs(value).max(), err_msg=name)
    plain = calibrated("olmoe", tmp_path / "d", ids, collect_too=())
    assert all(getattr(sums, name) is None for sums in plain.layers.values() for name in FIELDS)


def test_the_fallback_gives_the_same(tmp_path: Path) -> None:
    for model_type in ("gpt_oss", "nemotron_h"):
        read = calibrated(model_type, tmp_path / f"{model_type}-read", ids_of())
        computed = calibrated(model_type, tmp_path / f"{model_type}-computed", ids_of(), experts="eager")
        for key, sums in read.layers.items():
            for name in FIELDS:
                got, value = getattr(computed.layers[key], name), getattr(sums, name)
                np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name)
