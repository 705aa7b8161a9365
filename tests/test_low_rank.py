"""Affine maps of low rank: the fit, what is collected, how they run and train, and the folders that hold them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import small
import understudy
import zoo
from contract import calibrated, close, ids_of, load, one_expert, plan_of, walked, without_understudy
from slow_bases import Layer, gradients
from understudy.affine_fit import HELD_OUT, _largest, fit
from understudy.errors import CheckpointError, NumericError, PlanError, StatsError
from understudy.experts import parts_of
from understudy.kinds import all_kinds, check_plan, expected_bytes, get_kind, stand_ins_of
from understudy.kinds.low_rank import LOW_RANK
from understudy.plans import Plan
from understudy.refit import RIDGE
from understudy.sizes import count_params
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.standins import StandIn, declared, impossible, known_to_engines
from understudy.stats import ExpertStats, Stats, load_stats
from understudy.sums import RANKS
from understudy.training.trainable import prepare, trained
from understudy.virtual import planned

FIELDS = ("affine_in", "affine_out", "affine_mean", "affine_gain", "affine_error")


# --- the fit, with numbers made up ---


def routes(seed: int = 0, count: int = 60, size: int = 12, noise: float = 0.3) -> dict[str, np.ndarray]:
    """Routes of one expert whose outputs are bent, with a mean of their own."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    y = np.tanh(x @ rng.normal(size=(size, size)) / 4) @ rng.normal(size=(size, size)) + 2
    return {"x": x, "y": y + noise * rng.normal(size=y.shape), "g": 0.1 + rng.random(count)}


def slow_fit(d: dict[str, np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W of a rank, m and c: least squares on all rows, ridge included, then what it answers at its best rank."""
    q = d["g"] ** 2
    m, c = ((q[:, None] * d[name]).sum(0) / q.sum() for name in "xy")
    rows, wanted = (d["g"][:, None] * (d[name] - mean) for name, mean in (("x", m), ("y", c)))
    ridge = RIDGE * (rows**2).sum(0).mean()
    rows = np.concatenate((rows, np.sqrt(ridge) * np.eye(rows.shape[1])))
    wanted = np.concatenate((wanted, np.zeros((rows.shape[1], wanted.shape[1]))))
    whole = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    v = np.linalg.svd(rows @ whole)[2][:rank]
    return whole @ v.T @ v, m, c


def error(d: dict[str, np.ndarray], w: np.ndarray, m: np.ndarray, c: np.ndarray) -> float:
    return float((d["g"][:, None] ** 2 * (d["y"] - c - (d["x"] - m) @ w) ** 2).sum())


def fitted(d: dict[str, np.ndarray], rank: int) -> Any:
    return fit(*(torch.from_numpy(d[name]).float() for name in "xyg"), rank)


@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("count", [5, 60])
def test_fit_is_least_squares_at_its_best_rank(rank: int, count: int) -> None:
    d, largest = routes(count=count), 12
    found = fitted(d, largest)
    w, m, c = slow_fit(d, rank)
    got = (found.into_HR[:, :rank] @ found.out_RH[:rank]).numpy()
    np.testing.assert_allclose(got, w, rtol=0, atol=1e-4 * np.abs(w).max())
    np.testing.assert_allclose(found.mean_H, m, rtol=1e-5)
    np.testing.assert_allclose(found.constant_H, c, rtol=1e-5)
    assert found.error == pytest.approx(error(d, 0 * w, m, c), rel=1e-5)
    lengths = (found.into_HR.norm(dim=0), found.out_RH.norm(dim=1))
    torch.testing.assert_close(*(x[: min(rank, count - 1)] for x in lengths), rtol=1e-6, atol=0)


def test_large_matrices_are_decomposed_as_well() -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(200, 200, generator=rng, dtype=torch.float64)).Q for _ in range(2))
    scale = 0.9 ** torch.arange(200, dtype=torch.float64)
    u, s, v = _largest(left * scale @ right.T, 8)
    torch.testing.assert_close(s, scale[:8], rtol=1e-9, atol=0)
    torch.testing.assert_close(u * s @ v, left[:, :8] * scale[:8] @ right.T[:8], rtol=0, atol=1e-6)


def test_gains_are_those_of_routes_held_out() -> None:
    """By fitting the others and trying every rank on the rest; never rising, and 0 once one does not help."""
    d, size = routes(1), 12
    held = np.arange(60) % HELD_OUT == HELD_OUT - 1
    others, rest = ({name: x[part] for name, x in d.items()} for part in (~held, held))
    left = [error(rest, *slow_fit(others, rank)) for rank in range(size + 1)]
    found, (_, m, c) = fitted(d, size), slow_fit(d, 0)
    total = error(d, np.zeros((size, size)), m, c)
    want, least = [], np.inf
    for rank in range(size):
        inside = [error(d, *slow_fit(d, r)) for r in (rank, rank + 1)]
        least = max(0.0, min(least, (left[rank] - left[rank + 1]) / left[0] * total, inside[0] - inside[1]))
        want.append(least)
    np.testing.assert_allclose(found.gain_R, want, rtol=1e-3, atol=1e-4 * total)
    assert 0.3 * total < sum(want) < total


def test_noise_gains_nothing_and_few_routes_gain_nothing() -> None:
    rng, size = np.random.default_rng(0), 12
    noise = routes(2, count=200) | {"y": rng.normal(size=(200, size))}
    found = fitted(noise, size)
    assert float(found.gain_R.sum()) < 0.02 * found.error
    assert float(error(noise, *slow_fit(noise, size))) < 0.97 * found.error, "what it fitted is less"
    assert not fitted(routes(count=HELD_OUT - 1), size).gain_R.any()
    assert fitted(routes(count=HELD_OUT - 1), size).into_HR.any()
    linear = routes(3, count=400)
    linear["y"] = linear["x"] @ rng.normal(size=(size, 2)) @ rng.normal(size=(2, size))
    found = fitted(linear, size)
    assert float(found.gain_R[:2].sum()) > 0.85 * found.error, "the ridge takes the rest"
    assert float(found.gain_R[2:].sum()) < 0.01 * found.error


def test_what_does_not_vary_is_a_constant_and_what_is_broken_shows() -> None:
    d = routes(count=9)
    for same in ({name: x[:1] for name, x in d.items()}, d | {"x": d["x"][:1].repeat(9, 0)}):
        found = fitted(same, 12)
        assert not found.into_HR.any() and not found.out_RH.any() and not found.gain_R.any()
        np.testing.assert_allclose(found.mean_H, same["x"][0], rtol=1e-5)
    alike = {name: np.concatenate((x[:1].repeat(HELD_OUT - 1, 0), x[1:2])) for name, x in d.items()}
    assert fitted(alike, 12).gain_R.isfinite().all(), "all that are not held out are alike"
    faint = fitted(d | {"g": d["g"] * 1e-18}, 12)
    faint_HH, whole_HH = (x.into_HR @ x.out_RH for x in (faint, fitted(d, 12)))
    torch.testing.assert_close(faint_HH, whole_HH, rtol=0, atol=1e-3 * float(whole_HH.abs().max()))
    assert faint.error == pytest.approx(1e-36 * fitted(d, 12).error, rel=1e-5)
    still = fitted(d | {"y": d["y"][:1].repeat(9, 0)}, 12)
    assert float(still.out_RH.abs().max()) < 1e-2 and still.into_HR.isfinite().all()
    d["y"][3, 4] = np.nan
    assert fitted(d, 12).into_HR.isnan().all()


# --- statistics ---


@functools.lru_cache(10)
def tokens() -> Tensor:
    return ids_of(6, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Stats]]:
    """Tiny folders, and statistics of them."""

    @functools.cache
    def of(model_type: str = "olmoe", dtype: torch.dtype = torch.float32) -> tuple[Path, Stats]:
        folder = tmp_path_factory.mktemp(model_type)
        zoo.tiny_model(model_type).to(dtype).save_pretrained(folder / "model")
        extra = ("low_rank", "channels")
        return folder / "model", calibrated(folder / "model", folder / "work", tokens(), extra=extra)

    return of


@torch.no_grad()
def seen(folder: Path, stats: Stats, model_type: str) -> dict[str, list[dict[str, np.ndarray]]]:
    """What every expert of every layer was given and answered, route by route."""
    model, found = load(folder, model_type), {}
    for key, layer in stats.model.layers.items():
        experts, calls = model.get_submodule(layer.name), []
        handle = experts.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args))
        model(input_ids=tokens(), use_cache=False)
        handle.remove()
        (hidden, index, gates), each = calls[0], []
        for expert in range(layer.experts):
            token, slot = ((index == expert) & (gates != 0)).nonzero(as_tuple=True)
            y = [one_expert(experts, x, expert).double().numpy() for x in hidden[token]]
            x, g = hidden[token].double().numpy(), gates[token, slot].double().numpy()
            each.append({"x": x, "y": np.array(y).reshape(x.shape), "g": g})
        found[key] = each
    return found


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "muse_spark", "nemotron_h"])
def test_statistics_are_those_of_loops_over_routes(model_type: str, source: Callable[..., tuple[Path, Stats]]) -> None:
    folder, stats = source(model_type)
    for key, experts in seen(folder, stats, model_type).items():
        got = stats.layers[key]
        np.testing.assert_allclose(got.affine_error, got.weighted_scatter, rtol=1e-3, atol=1e-9)
        for expert, d in enumerate(experts):
            if len(d["g"]) < 2:
                assert not got.affine_in[expert].any() and not got.affine_gain[expert].any()
                continue
            full = got.affine_in.shape[2]
            assert full == min(RANKS, d["x"].shape[1])
            for rank in (2, full):
                w, m, c = slow_fit(d, rank)
                a, b = got.affine_in[expert][:, :rank], got.affine_out[expert][:rank]
                np.testing.assert_allclose(a @ b, w, rtol=0, atol=2e-3 * np.abs(w).max())
            np.testing.assert_allclose(got.affine_mean[expert], m, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(got.weighted_mean[expert], c, rtol=1e-3, atol=1e-5)
            assert (got.affine_gain[expert] >= 0).all() and (np.diff(got.affine_gain[expert]) <= 0).all()
            assert got.affine_gain[expert].sum() <= got.affine_error[expert] * (1 + 1e-6)


def test_merged_statistics_have_the_map_of_the_larger_part(
    source: Callable[..., tuple[Path, Stats]], tmp_path: Path
) -> None:
    folder, whole = source()
    parts = [
        calibrated(folder, tmp_path / str(n), ids, extra=["low_rank"]) for n, ids in enumerate(tokens().split([2, 4]))
    ]
    merged, bare = parts[0] + parts[1], calibrated(folder, tmp_path / "bare", tokens()[:2])
    for key, layer in merged.layers.items():
        one, other = (part.layers[key] for part in parts)
        for expert in range(zoo.EXPERTS):
            larger = other if other.gate_sq_sum[expert] > one.gate_sq_sum[expert] else one
            np.testing.assert_array_equal(layer.affine_in[expert], larger.affine_in[expert])
            np.testing.assert_array_equal(layer.affine_out[expert], larger.affine_out[expert])
            more = layer.gate_sq_sum[expert] / max(larger.gate_sq_sum[expert], 1e-30)
            np.testing.assert_allclose(layer.affine_gain[expert], larger.affine_gain[expert] * more)
            np.testing.assert_allclose(layer.affine_error[expert], larger.affine_error[expert] * more)
        np.testing.assert_allclose(layer.affine_mean, whole.layers[key].affine_mean, rtol=1e-4, atol=1e-5)
        assert (merged + bare).layers[key].affine_in is None
    assert {layer.affine_in.dtype for layer in merged.layers.values()} == {np.dtype(np.float32)}


def test_the_matrices_are_maps_of_the_file(source: Callable[..., tuple[Path, Stats]], tmp_path: Path) -> None:
    stats = source()[1]
    got, some = (load_stats(stats.save(tmp_path / "a"), only) for only in (None, {"affine_gain", "affine_error"}))
    for key, layer in got.layers.items():
        for name in FIELDS:
            mine = stats.layers[key].arrays()[name]
            tolerance = 1e-6 * np.abs(mine).max() if name == "affine_mean" else 0
            np.testing.assert_allclose(getattr(layer, name), mine, rtol=0, atol=tolerance)
            assert isinstance(getattr(layer, name), np.memmap) == (name in FIELDS[:2])
        assert set(some.layers[key].arrays()) == {"affine_gain", "affine_error"}


# --- at the seam ---

AFFINE = {
    "maps alone": {0: 3, 2: 3, 3: 1, 6: 5},
    "every form": {0: 3, 4: 2, 7: 3},
}
OTHERS = {
    1: StandIn("merged-v1", into=5),
    5: StandIn("merged-v1", into=5),
    2: StandIn("slim-v1", width=10, constant=True),
    3: StandIn("constant-v1"),
    6: StandIn("shared-v1", into=6, rank=3),
}
NARROW = {e: StandIn("slim-v1", width=8 + 8 * (e > 4)) for e in range(2, 8)}


def forms(name: str) -> dict[int, StandIn]:
    ranks = AFFINE.get(name, {0: 2, 1: 3})
    others = {"maps alone": {}, "every form": OTHERS, "no whole expert": NARROW}[name]
    return others | {e: StandIn("affine-v1", rank=rank) for e, rank in ranks.items()}


@functools.lru_cache(40)
def layer_of(model_type: str, implementation: str | None = None) -> Layer:
    return Layer(model_type, implementation)


@pytest.mark.parametrize("name", [*AFFINE, "no whole expert"])
@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [("olmoe", "eager"), ("olmoe", "batched_mm"), *((t, None) for t in ("olmoe", "gpt_oss", "muse_spark", "step3p7"))],
)
def test_answers_and_gradients(model_type: str, implementation: str | None, name: str) -> None:
    layer = layer_of(model_type, implementation)
    cut = layer.cut(forms(name))
    ranks = {"maps alone": [1, 3, 5], "every form": [2, 3], "no whole expert": [2, 3]}
    assert [maps.a.shape[1] for maps in cut.thin] == ranks[name]
    for count, open_to in ((3, None), (40, None), (12, [1, 5])):
        hidden, index, gates = layer.routes(count, 2, open_to)
        inputs = [hidden.clone().requires_grad_(), gates.clone().requires_grad_()]
        got, want = cut(inputs[0], index, inputs[1]), layer.slow(cut, inputs[0], index, inputs[1])
        near(got, want, "answer")
        trained = dict(cut.named_parameters())
        both = (gradients(x, [*inputs, *trained.values()], unused=x is want) for x in (got, want))
        for leaf, mine, theirs in zip(["hidden", "gates", *trained], *both, strict=True):
            near(mine, theirs, leaf)
        with torch.no_grad():
            near(cut(hidden, index, gates), want, "without gradients")
    with torch.no_grad():
        hidden, index, gates = layer.routes(40)
        exact = layer.slow(cut.bfloat16().float(), hidden.bfloat16().float(), index, gates.bfloat16().float())
        half = cut.bfloat16()(hidden.bfloat16(), index, gates.bfloat16())
        assert half.dtype == torch.bfloat16
        near(half.float(), exact, "16 bits", 3e-2)


def near(got: Tensor, want: Tensor, name: str, share: float = 2e-5) -> None:
    largest = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=share * largest, msg=lambda text: f"{name}: {text}")


def test_parts_are_named_and_placed() -> None:
    cut = layer_of("olmoe").cut(forms("every form"))
    assert [name for name in parts_of(cut) if name.startswith("thin")] == ["thin.0", "thin.1"]
    assert cut.thin_place(4) == (cut.thin[0], 0) and cut.thin_place(7) == (cut.thin[1], 1)
    shapes = {name: tuple(p.shape) for name, p in cut.named_parameters() if name.startswith("thin.1")}
    assert shapes == {"thin.1.a": (2, 3, zoo.HIDDEN), "thin.1.b": (2, zoo.HIDDEN, 3)}


# --- folders ---

TYPES = ["olmoe", "gpt_oss", "nemotron_h", "mixtral", "granitemoe", "qwen3_vl_moe"]


def mixed(stats: Stats) -> Plan:
    """Maps of several ranks beside everything else, and a layer of them alone."""
    keys = list(stats.model.layers)
    layers: dict[str, Any] = {key: {"low_rank": {0: 1, 3: 4, 5: 4, 7: RANKS}} for key in keys}
    layers[keys[0]] = {"low_rank": {2: 3}, "constant": [0], "slim": {1: 8, 4: 0}, "merge": [[5, 7]]}
    if len(keys) > 1:
        layers[keys[1]] = {"low_rank": {2: 3, 3: 2}, "slim": {e: 8 + 8 * (e > 5) for e in (0, 1, 4, 5, 6, 7)}}
    plan = plan_of(stats, layers)
    return plan.model_copy(update={"how": {"slim": {"constant": True}}})


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_folder_answers_as_planned(
    model_type: str, dtype: torch.dtype, source: Callable[..., tuple[Path, Stats]], tmp_path: Path
) -> None:
    """Verification compares every layer with the slow reference; here the bytes, and the model run as a whole."""
    folder, stats = source(model_type, dtype)
    plan = mixed(stats)
    done = apply(folder, plan, tmp_path / "out", stats=stats)
    assert done.nbytes == expected_bytes(plan, stats.model)
    assert done.loads == "transformers after `import understudy`"
    got, skeleton = load(tmp_path / "out", model_type, dtype="auto"), planned(Skeleton(folder), plan, stats)
    with torch.no_grad():
        logits = got(input_ids=tokens()[:2], use_cache=False).logits
    streamed = walked(skeleton, tokens()[:2])
    assert close(logits, streamed) if dtype == torch.float32 else (logits - streamed).abs().max() < 0.2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(name.startswith("Understudy") for name in config["architectures"])
    with without_understudy(), pytest.raises((RuntimeError, ValueError, KeyError, AttributeError)):
        zoo.model_class(model_type).from_pretrained(tmp_path / "out")


def test_a_map_is_the_formula(source: Callable[..., tuple[Path, Stats]], tmp_path: Path) -> None:
    """The written expert answers c + (x - m) A B, and is nearer to the whole one than a constant on its own tokens."""
    folder, stats = source()
    key, layer = next(iter(stats.model.layers.items()))
    expert = int(stats.layers[key].gate_sq_sum.argmax())
    plan = plan_of(stats, {key: {"low_rank": {expert: 8}}})
    out = load(apply(folder, plan, tmp_path / "out", stats=stats).folder, "olmoe").get_submodule(layer.name)
    d, sums = seen(folder, stats, "olmoe")[key][expert], stats.layers[key]
    with torch.no_grad():
        got = torch.stack([one_expert(out, x, expert) for x in torch.from_numpy(d["x"]).float()]).double().numpy()
    w, m, c = slow_fit(d, 8)
    np.testing.assert_allclose(got, c + (d["x"] - m) @ w, rtol=0, atol=1e-3 * np.abs(got).max())
    weights = d["g"][:, None] ** 2
    assert (weights * (got - d["y"]) ** 2).sum() < 0.9 * sums.affine_error[expert]
    hidden = torch.from_numpy(d["x"]).float()
    whole = load(folder, "olmoe").get_submodule(layer.name)
    slow = LOW_RANK.reference(whole, hidden, expert, {expert: 8}, {}, sums)
    np.testing.assert_allclose(slow, got, rtol=0, atol=1e-5 * np.abs(got).max())


def test_bytes_by_hand(source: Callable[..., tuple[Path, Stats]]) -> None:
    layer = source()[1].model.layers["0"]
    assert LOW_RANK.stored_bytes(layer, {0: 1, 3: 8}) == (2 + 16 + 2) * 32 * 4
    assert LOW_RANK.added_bytes(layer, {3: 8}) == 17 * 32 * 4 - layer.expert_bytes
    assert LOW_RANK.stored_bytes(layer, ()) == 0


def test_parameters_are_counted(source: Callable[..., tuple[Path, Stats]], tmp_path: Path) -> None:
    folder, stats = source()
    plan = plan_of(stats, {"0": {"low_rank": {0: 1, 3: 8}}})
    out = apply(folder, plan, tmp_path / "out", stats=stats).folder
    whole, cut = (count_params(Skeleton(x), {}) for x in (folder, out))
    layer, fewer = stats.model.layers["0"], 2 * stats.model.layers["0"].expert_params - (2 + 16 + 2) * 32
    assert whole["total"] - cut["total"] == whole["routed"] - cut["routed"] == fewer
    assert whole["active"] - cut["active"] == round(layer.top_k / layer.experts * fewer)


def test_recovery_trains_maps_and_leaves_the_rest(source: Callable[..., tuple[Path, Stats]]) -> None:
    folder, stats = source()
    skeleton = planned(Skeleton(folder), plan_of(stats, {"0": {"low_rank": {0: 1, 3: 8}}}), stats)
    prepare(skeleton.model, skeleton.layers, "stand-ins", 4, 0)
    names = {name.rpartition("experts.")[2] for name in trained(skeleton.model)}
    assert names == {"constants", "thin.0.a", "thin.0.b", "thin.1.a", "thin.1.b"}


# --- what cannot be ---

FORMS = [
    {"format": "affine-v1", "rank": 3},  # without its constant
    {"format": "affine-v1", "tensors": {"value": "v"}},
    {"format": "affine-v1", "rank": 0, "tensors": {"value": "v"}},
    {"format": "affine-v1", "rank": 2, "width": 3, "tensors": {"value": "v"}},
    {"format": "affine-v1", "rank": 2, "into": 3, "tensors": {"value": "v"}},
    {"format": "constant-v1", "rank": 2, "tensors": {"value": "v"}},
]


@pytest.mark.parametrize("form", FORMS)
def test_declarations_of_another_form_are_refused(form: dict[str, Any]) -> None:
    from understudy.standins import declare

    config = {"compression_config": declare({"m.experts": ({3: StandIn("affine-v1", rank=3)}, {3: "v"})})}
    assert declared(config) == {"m.experts": {3: StandIn("affine-v1", rank=3, constant=True)}}
    assert not known_to_engines(declared(config)["m.experts"])
    target = config["compression_config"]["transform_config"]["expert_substitution"]["targets"]["m.experts"]
    assert target["replacements"]["3"] == {"format": "affine-v1", "rank": 3, "tensors": {"value": "v"}}
    target["replacements"]["3"] = form
    with pytest.raises(CheckpointError, match="in a form that is not read"):
        declared(config)


@pytest.mark.parametrize(
    ("kinds", "how", "message"),
    [
        ({"low_rank": {3: 0}}, {}, "layer 0: low_rank gives expert 3 rank 0, possible are 1 to 32; use constant for"),
        ({"low_rank": {3: 33}}, {}, "layer 0: low_rank gives expert 3 rank 33, possible are 1 to 32; give a lower one"),
        ({"low_rank": [3]}, {}, r"layer 0: low_rank takes \{3: 512\}, not expert ids"),
        ({"low_rank": dict.fromkeys(range(8), 2)}, {}, "all 8 experts would be replaced; low_rank needs at least one"),
        (
            {"low_rank": dict.fromkeys(range(6), 2), "constant": [6, 7]},
            {},
            "layer 0: no expert keeps any weights of its own",
        ),
        ({"low_rank": {3: 2}}, {"low_rank": {"rank": 2}}, "how: low_rank has no setting 'rank'; it has none"),
        (
            {"low_rank": {3: 2}, "modulate": "all"},
            {"modulate": {"main_k": 1, "vectors": 3}},
            "modulate cannot share a layer with low_rank: .* use vectors: 1",
        ),
    ],
)
def test_an_impossible_plan_gets_one_clear_line(
    kinds: dict[str, Any], how: dict[str, Any], message: str, source: Callable[..., tuple[Path, Stats]]
) -> None:
    stats = source()[1]
    plan = Plan(**plan_of(stats, {"0": kinds}).model_dump() | {"how": how})
    with pytest.raises(PlanError, match=message) as caught:
        check_plan(plan, stats.model)
    assert "\n" not in str(caught.value)


def test_a_hidden_size_below_the_largest_rank(source: Callable[..., tuple[Path, Stats]]) -> None:
    facts = source()[1].model
    small_ones = {key: layer.model_copy(update={"hidden": 16}) for key, layer in facts.layers.items()}
    with pytest.raises(PlanError, match="rank 17, possible are 1 to 16"):
        get_kind("low_rank").check(small_ones, {"0": {1: 17}})


def test_what_statistics_lack_or_hold_broken_is_said(source: Callable[..., tuple[Path, Stats]], tmp_path: Path) -> None:
    folder, stats = source()
    plan = plan_of(stats, {"0": {"low_rank": {3: 2}}})
    with pytest.raises(StatsError, match="the plan has low_rank, made of statistics; give --stats"):
        apply(folder, plan, tmp_path / "a")
    with pytest.raises(StatsError, match=r"low_rank needs affine_in.*calibrate with --collect low_rank"):
        apply(folder, plan, tmp_path / "a", stats=changed(stats, **dict.fromkeys(FIELDS)))
    nan = np.array(stats.layers["0"].affine_in)
    nan[3, 1, 1] = np.nan
    with pytest.raises(NumericError, match=r"layer 0: the statistics hold NaN or infinity \(affine_in\)"):
        apply(folder, plan, tmp_path / "a", stats=changed(stats, affine_in=nan))
    narrow = changed(
        stats, affine_in=stats.layers["0"].affine_in[:, :, :1], affine_out=stats.layers["0"].affine_out[:, :1]
    )
    with pytest.raises(StatsError, match=r"statistics of maps \(32, 1\), the plan and the model ask for \(32, 2\)"):
        apply(folder, plan, tmp_path / "a", stats=narrow)
    with pytest.raises(PlanError, match="expert 3 becomes an affine map, which no expert of the family can be"):
        apply(folder, plan, tmp_path / "a", stats=stats, materialise=True)
    assert not (tmp_path / "a").exists()


def changed(stats: Stats, **fields: Any) -> Stats:
    layers: dict[str, ExpertStats] = {**stats.layers, "0": replace(stats.layers["0"], **fields)}
    return replace(stats, layers=layers)


def test_it_is_a_kind_like_any_other(source: Callable[..., tuple[Path, Stats]]) -> None:
    stats = source()[1]
    assert all_kinds()["low_rank"] is LOW_RANK and not LOW_RANK.losers
    plan = plan_of(stats, {"0": {"low_rank": {4: 2, 1: 7}, "constant": [2]}})
    found = stand_ins_of(plan, "0", stats.model.layers["0"])
    assert found[1] == StandIn("affine-v1", rank=7) and found[4].constant and not found[4].free
    assert impossible(found, 8) is None
    again = Plan.model_validate(plan.model_dump())
    assert again == plan


def test_from_the_command_line_to_a_model(tmp_path: Path) -> None:
    folder, text = small.model_folder(tmp_path / "model"), small.text_file(tmp_path / "text.txt", 600)
    file = tmp_path / "stats.safetensors"
    understudy.calibrate(folder, file, data=text, samples=8, seq_len=16, collect="low_rank")
    stats = load_stats(file)
    plan = plan_of(stats, {"1": {"low_rank": {0: 4, 1: 2}}})
    saved = plan.save(tmp_path / "plan.yaml")
    done = understudy.apply(folder, saved or tmp_path / "plan.yaml", tmp_path / "out", stats=file)
    assert done.nbytes == expected_bytes(plan, stats.model)
