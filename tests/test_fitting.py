"""Vectors fitted to what all routes answer: the search, the statistics, and the folders that start from them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import understudy
import zoo
from contract import close, ids_of, load, tensors_of, walked
from slow_bases import FAMILIES, Layer
from small import assert_close, blocks_of, model_folder, text_file
from understudy import fitting
from understudy.collection import collect
from understudy.errors import CheckpointError, PlanError, StatsError, UnderstudyError
from understudy.fitting import Fit, Sample, fit, modulated_copy, pulled, pushed, sample_of
from understudy.layout import model_facts
from understudy.moe import find_moe_layers
from understudy.plans import Plan
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stats import Stats, load_stats
from understudy.sums import group_of
from understudy.verify import verify_folder
from understudy.virtual import outcome, planned

OWN = [family for family in FAMILIES if family != "zaya"]  # whose tokens choose one expert


@functools.lru_cache(40)
def layer_of(model_type: str) -> Layer:
    return Layer(model_type, None if model_type == "step3p7" else "eager")


def problem(layer: Layer, vectors: int, tokens: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Any, Sample]:
    """Experts with vectors, and a sample of their tokens."""
    hidden, index, gates = layer.routes(tokens)
    layer.whole.to(dtype)
    made = modulated_copy(layer.whole, layer.num_experts, 2, vectors, False)
    return made, sample_of(layer.whole, hidden.to(dtype), index, gates.to(dtype))


def answer(made: Any, sample: Sample, more: Tensor) -> Tensor:
    """What the experts answer with these vectors `[E, S]`, which are zeros again afterwards."""
    parameters = list(made.modulation.parameters())
    with torch.no_grad():
        for parameter, part in zip(parameters, more.split([p.shape[1] for p in parameters], 1), strict=True):
            parameter.copy_(part)
        out = made(sample.hidden_NH, sample.index_Nk, sample.gates_Nk)
        for parameter in parameters:
            parameter.zero_()
    return out


# ---- the search --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("model_type", OWN)
def test_derivatives_are_those_of_differences(model_type: str, vectors: int) -> None:
    """J v by two backward passes, and J^T u, in families whose forwards differ; nothing is left behind."""
    layer = layer_of(model_type)
    made, sample = problem(layer, vectors)
    parameters = list(made.modulation.parameters())
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    out = made(sample.hidden_NH, sample.index_Nk, sample.gates_Nk)
    moved = pushed(out, parameters, v)
    step = 1e-3
    more, less = (answer(made, sample, sign * step * torch.cat(v, 1)) for sign in (1, -1))
    differences = (more - less) / (2 * step)
    scale = float(differences.abs().max())
    wrong = ((moved - differences).abs() > 0.02 * scale).any(1)  # a step may cross the bound of a clamp
    assert scale > 1e-3
    assert int(wrong.sum()) <= (2 if model_type == "step3p7" else 0)
    u = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    back = pulled(out, parameters, u)
    assert float((u * moved).sum()) == pytest.approx(float((back * torch.cat(v, 1)).sum()), rel=1e-3, abs=1e-3 * scale)
    assert all(p.grad is None and p.requires_grad for p in layer.whole.parameters())
    assert all(p.grad is None for p in made.parameters())


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_search_ends_where_least_squares_does(vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ridge problem with the Jacobian written out, row by row, solved by NumPy."""
    made, sample = problem(layer_of("olmoe"), vectors, tokens=10)
    monkeypatch.setattr(fitting, "_STEPS", 250)
    held = torch.arange(10) % 8 == 0
    taught = sample.part(~held)
    parameters = list(made.modulation.parameters())
    out = made(taught.hidden_NH, taught.index_Nk, taught.gates_Nk)
    rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in out.flatten()]
    jacobian = torch.stack([torch.cat(row, 1).flatten() for row in rows]).double().numpy()
    missing = (taught.answer_NH - out).detach().flatten().double().numpy()
    share = made.modulation.split(taught.index_Nk, taught.gates_Nk, torch.arange(8))[2].double()
    mass = (share.square().sum(0) + 1)[:, None].expand(8, sum(p.shape[1] for p in parameters))
    draw = torch.randn(mass.shape, generator=torch.Generator().manual_seed(0)).double()
    curve = np.square(jacobian @ draw.flatten().numpy()).sum() / float((draw.square() * (mass - 1)).sum())
    ridge = 0.01 * curve * mass.flatten().numpy()
    both = np.concatenate([jacobian, np.diag(np.sqrt(ridge))])
    expected = np.linalg.lstsq(both, np.concatenate([missing, np.zeros(len(ridge))]), rcond=None)[0]
    steps = list(fitting._descent(fitting._Layer(made), taught, mass[:, :1].float(), 0))
    np.testing.assert_allclose(steps[-1].flatten().numpy(), expected, atol=1e-3 * np.abs(expected).max())
    assert np.abs(steps[0].flatten().numpy() - expected).max() > 0.05 * np.abs(expected).max()  # it took some search


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [1, 3])
def test_the_error_falls_on_tokens_that_were_held_out(vectors: int, dtype: torch.dtype) -> None:
    layer = layer_of("mixtral")
    made, sample = problem(layer, vectors, 300, dtype)
    goal = 0.3 * torch.randn(layer.num_experts, fitting._Layer(made).vectors.shape[1])
    sample = replace(sample, answer_NH=answer(made, sample, goal))  # that vectors can meet
    found = fit(made, sample)
    assert found.more_ES.dtype == torch.float32
    assert found.steps > 1
    assert found.fitted < 0.6 * found.plain
    held = sample.part(torch.arange(300) % 8 == 0)
    by_hand = [float((held.answer_NH.float() - answer(made, held, x).float()).square().sum()) for x in both(found)]
    assert by_hand == pytest.approx([found.plain, found.fitted], rel=1e-5)
    assert found.square == pytest.approx(float(held.answer_NH.float().square().sum()), rel=1e-5)
    again = fit(modulated_copy(layer.whole, layer.num_experts, 2, vectors, False), sample)
    assert torch.equal(again.more_ES, found.more_ES)
    layer.whole.to(torch.float32)


def both(found: Fit) -> list[Tensor]:
    return [torch.zeros_like(found.more_ES), found.more_ES]


def test_where_nothing_is_gained_ones_stay() -> None:
    made, sample = problem(layer_of("olmoe"), 1, 64)
    random = 50 * torch.randn(sample.answer_NH.shape, generator=torch.Generator().manual_seed(3))
    for given in (random, torch.full_like(random, torch.nan)):
        taught = torch.arange(64) % 8 != 0
        opposite = torch.where(taught[:, None], given, sample.answer_NH)  # what is learnt is wrong where it is tried
        found = fit(made, replace(sample, answer_NH=opposite))
        assert not found.more_ES.any()
        assert found.steps == 0
        assert found.fitted == found.plain


def test_an_expert_that_is_never_auxiliary_keeps_ones() -> None:
    layer = layer_of("olmoe")
    made, sample = problem(layer, 1, 400)
    rare = sample.gates_Nk.masked_fill(sample.index_Nk == 3, 2.0)  # always among the strongest
    sample = sample_of(layer.whole, sample.hidden_NH, sample.index_Nk, rare)
    goal = answer(made, sample, 0.3 * torch.randn(8, layer.hidden_size, generator=torch.Generator().manual_seed(4)))
    found = fit(made, replace(sample, answer_NH=goal))
    assert found.weight_E[3] == 0
    assert not found.more_ES[3].any()
    assert (found.more_ES.abs().sum(1) > 0).sum() == 7


def test_weights_are_not_copied() -> None:
    layer = layer_of("olmoe")
    made = modulated_copy(layer.whole, layer.num_experts, 2, 1, False)
    assert made.down_proj.data_ptr() == layer.whole.down_proj.data_ptr()
    assert not made.down_proj.requires_grad
    assert not hasattr(layer.whole, "modulation")


# ---- statistics --------------------------------------------------------------------------------------------------


def alike(folder: Path, model_type: str, **changes: Any) -> Path:
    """A tiny model whose experts are alike, so that vectors can make up for those that do not run."""
    model_folder(folder, model_type, **changes)
    model = zoo.tiny_model(model_type, **changes)
    for layer in find_moe_layers(model):
        for parameter in model.get_submodule(layer.name).parameters(recurse=False):
            parameter.data.copy_(5 * (parameter.data[:1] + 0.3 * parameter.data))
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


class Source:
    """A tiny model with four experts for a token, its text, and statistics with fitted vectors."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = alike(root / "model", "olmoe", num_experts_per_tok=4, num_hidden_layers=2)
        self.stats = {vectors: self.calibrated(vectors=vectors) for vectors in (1, 3)}

    def calibrated(self, rows: slice = slice(None), groups: tuple[str, ...] = ("modulation",), **more: Any) -> Stats:
        skeleton, ids = Skeleton(self.folder), ids_of(24, 16)[rows]
        facts = model_facts(skeleton, "model")
        settings = Calibration(batch_size=4, collect=groups, **more)
        work = self.root / f"work-{len(list(self.root.iterdir()))}"
        layers, probes = collect(skeleton, facts, blocks_of(ids), settings, work)
        return Stats(facts, {"collect": list(groups)}, layers, probes)

    def plan(self, vectors: int = 1, more: dict[str, Any] | None = None, **options: Any) -> Plan:
        plan = understudy.plan(self.stats[vectors], method="compressed_experts", vectors=vectors, fit=True, **options)
        layers = {key: {**kinds, **(more or {})} for key, kinds in plan.plan.layers.items()}
        return plan.plan.model_copy(update={"layers": layers})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("fitting"))


def means(stats: Stats, key: str) -> np.ndarray:
    """The vectors minus one that statistics hold."""
    layer = stats.layers[key]
    return layer.modulation_sum / np.maximum(layer.modulation_weight, 1e-300)[:, None]


def test_statistics_are_those_of_a_fit_to_the_tokens_of_the_layer(source: Source) -> None:
    model: Any = load(source.folder, "olmoe")
    seen: list[tuple[Tensor, ...]] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(tuple(x.clone() for x in args)))
    with torch.no_grad():
        for ids in ids_of(24, 16).split(4):
            model(input_ids=ids, use_cache=False)
    handle.remove()
    for vectors in (1, 3):
        expected = fit(
            modulated_copy(experts, 8, 2, vectors, False), sample_of(experts, *map(torch.cat, zip(*seen, strict=True)))
        )
        layer = source.stats[vectors].layers["0"]
        np.testing.assert_allclose(means(source.stats[vectors], "0"), expected.more_ES.numpy(), atol=1e-6)
        np.testing.assert_allclose(layer.modulation_weight, expected.weight_E.numpy(), rtol=1e-6)
        figures = [layer.modulation_square, layer.modulation_plain, layer.modulation_fitted]
        assert figures == pytest.approx([expected.square, expected.plain, expected.fitted], rel=1e-5)
        assert expected.fitted < expected.plain
        told = layer.modulation_main_k, layer.modulation_vectors, layer.modulation_renormalise
        assert told == (2, vectors, 0)


def test_nothing_else_changes_by_a_bit(source: Source) -> None:
    groups = ("sets", "dense", "channels")
    plain, more = source.calibrated(groups=groups), source.calibrated(groups=(*groups, "modulation"))
    rest = {
        key: replace(layer, **{n: None for n in layer.arrays() if group_of(n) == "modulation"})
        for key, layer in more.layers.items()
    }
    assert_close(rest, plain.layers, 0, exact=True)
    assert more.layers["0"].modulation_sum is not None


def test_fewer_tokens(source: Source) -> None:
    few = source.calibrated(fit_tokens=60).layers["0"]
    assert float(few.modulation_weight.sum()) == pytest.approx(52)  # 60 less every eighth; each adds 1
    assert float(source.stats[1].layers["0"].modulation_weight.sum()) == pytest.approx(24 * 16 * 7 / 8)


def test_merged_saved_and_read(source: Source, tmp_path: Path) -> None:
    first, second = source.calibrated(slice(0, 8)), source.calibrated(slice(8, 24))
    whole = load_stats((first + second).save(tmp_path / "stats"))
    for key in whole.layers:
        shares = [part.layers[key].modulation_weight[:, None] for part in (first, second)]
        mean = (means(first, key) * shares[0] + means(second, key) * shares[1]) / np.maximum(sum(shares), 1e-9)
        np.testing.assert_allclose(means(whole, key), mean, atol=1e-6)
        assert whole.layers[key].modulation_main_k == 2
    assert not np.allclose(means(first, "0"), means(second, "0"), atol=1e-3)
    without = source.calibrated(slice(8, 24), groups=())
    assert (first + without).layers["0"].modulation_sum is None
    for odd, message in (({"main_k": 1}, "--main-k 2 and 1"), ({"renormalise": 1}, "--renormalise 0 and 1")):
        changed = {f"modulation_{name}": np.float64(value) for name, value in odd.items()}
        other = replace(second, layers={key: replace(x, **changed) for key, x in second.layers.items()})
        with pytest.raises(StatsError, match=f"vectors fitted with {message} cannot be merged"):
            first + other


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [1, 3])
def test_written_as_the_statistics_say(vectors: int, source: Source, tmp_path: Path) -> None:
    """Values and answers are those of a model whose vectors were set by hand."""
    plan, stats = source.plan(vectors), source.stats[vectors]
    assert plan.how["modulate"]["fit"] is True
    applied = understudy.apply(source.folder, plan, tmp_path / "out", stats=stats)
    ones = plan.model_copy(update={"how": {"modulate": {**plan.how["modulate"], "fit": False}}})
    understudy.apply(source.folder, ones, tmp_path / "ones")
    model = load(tmp_path / "ones", "olmoe")
    with torch.no_grad():
        before = model(input_ids=ids_of(), use_cache=False).logits
        for key in stats.layers:
            parameters = list(model.get_submodule(f"model.layers.{key}.mlp.experts.modulation").parameters())
            parts = torch.from_numpy(means(stats, key)).float().split([p.shape[1] for p in parameters], 1)
            for parameter, part in zip(parameters, parts, strict=True):
                assert not parameter.any()
                parameter.copy_(part)
        after = model(input_ids=ids_of(), use_cache=False).logits
        got = load(applied.folder, "olmoe")(input_ids=ids_of(), use_cache=False).logits
    model.save_pretrained(tmp_path / "by-hand")
    theirs, mine = tensors_of(tmp_path / "by-hand"), tensors_of(applied.folder)
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)
    assert torch.equal(got, after)
    assert not close(got, before)
    assert close(walked(planned(Skeleton(source.folder), plan, stats), ids_of()), got)


BESIDE = [
    (1, {"constant": [1, 4]}),
    (3, {"constant": [1, 4]}),
    (1, {"merge": ((0, 1), (4, 2, 6))}),
    (1, {"slim": {1: 8, 3: 8, 6: 0}}),
]


@pytest.mark.parametrize(("vectors", "more"), BESIDE)
def test_beside_stand_ins(vectors: int, more: dict[str, Any], source: Source, tmp_path: Path) -> None:
    """Applying verifies each layer against the slow way."""
    groups = ("modulation", "channels", "dense")
    stats = source.calibrated(slice(0, 8), groups, vectors=vectors)
    understudy.apply(source.folder, source.plan(vectors, more), tmp_path / "out", stats=stats)


@pytest.mark.parametrize(("model_type", "vectors"), [("gpt_oss", 1), ("gpt_oss", 3), ("nemotron_h", 3), ("mixtral", 3)])
def test_other_families(model_type: str, vectors: int, tmp_path: Path) -> None:
    """Biased and transposed, without a gate: verified for one vector and three."""
    folder, out = alike(tmp_path / "model", model_type), tmp_path / "out"
    told = {"data": text_file(tmp_path / "text.txt"), "samples": 8, "seq_len": 16, "vectors": vectors}
    assert understudy.compress(folder, out, method="compressed_experts", fit=True, **told) is not None
    assert any(t.any() for name, t in tensors_of(out).items() if "modulation" in name)


@pytest.mark.parametrize("vectors", [1, 3])
def test_verification_sees_other_vectors(vectors: int, source: Source, tmp_path: Path) -> None:
    """On disk, and in what the layer answers."""
    plan, stats = source.plan(vectors), source.stats[vectors]
    folder = understudy.apply(source.folder, plan, tmp_path / "out", stats=stats).folder
    whole = Skeleton(source.folder)
    pieces = outcome(whole, plan, stats).pieces
    verify_folder(whole, folder, plan, pieces, stats)
    moved = {key: replace(x, modulation_sum=-x.modulation_sum) for key, x in stats.layers.items()}
    with pytest.raises(CheckpointError, match="verification failed, layer 0 differs from the plan"):
        verify_folder(whole, folder, plan, pieces, replace(stats, layers=moved))
    other = outcome(whole, plan, replace(stats, layers=moved)).pieces
    with pytest.raises(CheckpointError, match=r"verification failed, .*modulation.* differs from its source"):
        verify_folder(whole, folder, plan, other, stats)


@pytest.mark.parametrize("given", [True, False])
def test_in_one_go(given: bool, source: Source, tmp_path: Path) -> None:
    """Calibration collects what the plan needs, for the plan's settings; whatever is not at its default is shown."""
    data = text_file(tmp_path / "text.txt")
    told: dict[str, Any] = {"main_k": 1, "vectors": 3, "renormalise": True} if given else {}
    made = understudy.compress(
        source.folder, tmp_path / "out", data=data, samples=4, seq_len=16, method="compressed_experts", fit=True, **told
    )
    assert made is not None
    assert "fitted vectors lower the squared error" in made.plan.notes[-1]
    kept = load_stats(tmp_path / "out" / "understudy" / "stats.safetensors")
    layer = kept.layers["0"]
    main_k, vectors, scale = (1, 3, 1) if given else (2, 1, 0)
    assert (layer.modulation_main_k, layer.modulation_vectors, layer.modulation_renormalise) == (main_k, vectors, scale)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--collect modulation" in card
    if given:
        assert card.count("--main-k 1 --vectors 3 --renormalise") == 3  # in one step, to calibrate, and to plan
        return
    # without --fit these flags are of the plan alone
    plain = understudy.compress(
        source.folder, tmp_path / "plain", data=data, samples=2, seq_len=16, method="compressed_experts", main_k=3
    )
    assert plain is not None
    recipe = json.loads((tmp_path / "plain" / "understudy" / "recipe.json").read_text())
    assert recipe["calibration"]["collect"] == []


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"main_k": 1}, "layer 0: its vectors were fitted for main_k 2, .* and the plan has main_k 1, "),
        ({"vectors": 3}, "fitted for main_k 2, vectors 1, renormalise 0, and the plan has main_k 2, vectors 3, "),
        ({"renormalise": True}, "layer 0: .* the plan has main_k 2, vectors 1, renormalise 1; calibrate with"),
        ({"plain": True}, "--fit has no effect with --plain"),
        ({"method": "mone", "ratio": 0.5}, "--fit has no effect on method mone; leave it out"),
    ],
)
def test_plans_that_do_not_go(options: dict[str, Any], message: str, source: Source) -> None:
    with pytest.raises(UnderstudyError, match=message):
        understudy.plan(source.stats[1], **{"method": "compressed_experts", "fit": True, **options})


def test_no_vectors_were_fitted(source: Source, tmp_path: Path) -> None:
    none = source.calibrated(slice(0, 4), groups=())
    with pytest.raises(StatsError, match="calibrate with --collect modulation"):
        understudy.plan(none, method="compressed_experts", fit=True)
    plan = source.plan()
    with pytest.raises(StatsError, match="the plan has modulate, made of statistics; give --stats"):
        understudy.apply(source.folder, plan, tmp_path / "out")
    other = source.calibrated(slice(0, 4), main_k=1)
    with pytest.raises(StatsError, match="layer 0: its vectors were fitted for main_k 1"):
        understudy.apply(source.folder, plan, tmp_path / "out", stats=other)


@pytest.mark.parametrize(
    ("how", "more", "message"),
    [
        ({"fit": 1}, {}, "fit of modulate is true or false, not 1"),
        ({"fit": True, "plain": True}, {}, "has no vectors to fit; leave out plain or fit"),
        (
            {"fit": True, "vectors": 3},
            {"merge": ((0, 1),)},
            "modulate cannot share a layer with merge: .*use vectors: 1",
        ),
    ],
)
def test_settings_of_the_kind(how: dict[str, Any], more: dict[str, Any], message: str, source: Source) -> None:
    from understudy.kinds import check_plan

    plan = source.plan(1, more)
    with pytest.raises(PlanError, match=message):
        check_plan(plan.model_copy(update={"how": {"modulate": {"main_k": 2, **how}}}), source.stats[1].model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"main_k": 4, "collect": ("modulation",)}, "--main-k 4 is not fewer than the 4 experts .* give 1 to 3"),
        ({"main_k": 2}, "--main-k has no effect without --collect modulation"),
        ({"vectors": 3, "collect": ("dense",)}, "--vectors has no effect without --collect modulation"),
        ({"vectors": 2, "collect": ("modulation",)}, "--vectors 2: an expert has 1 vector or 3"),
    ],
)
def test_calibrations_that_do_not_go(options: dict[str, Any], message: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UnderstudyError, match=message):
        understudy.calibrate(source.folder, tmp_path / "stats", data="no such text", **options)


def test_a_layer_whose_tokens_choose_one_expert_has_no_vectors(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "one", num_experts_per_tok=1)
    data = text_file(tmp_path / "text.txt")
    stats = understudy.calibrate(folder, tmp_path / "stats", data=data, samples=2, seq_len=16, collect=("modulation",))
    assert all(layer.modulation_sum is None for layer in stats.layers.values())
