"""CD-MoE against slow references that follow the words of METHODS 4: weights, errors, searches, and what they cost."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import understudy
import zoo
from contract import one_expert
from routes import draw_routes, sums_of
from test_collectors import SCALES, Seen, folder_of, tokens, watched
from understudy.activations import ActivationStore
from understudy.cli import app
from understudy.collectors import Resident
from understudy.collectors.candidates import Candidates, Sample
from understudy.condensed.choosing import Chosen, Products, from_sums, greedy, mean_gates
from understudy.condensed.layers import LayerSearch
from understudy.condensed.running import Outputs, condensed, hidden_js
from understudy.condensed.searching import choose_experts
from understudy.data import token_blocks
from understudy.errors import PlanError, StatsError, UnsupportedModelError
from understudy.plans import Plan, load_plan
from understudy.quality import KL, predict
from understudy.recipe import Calibration, Selection
from understudy.skeleton import Skeleton
from understudy.stats import load_stats
from understudy.tokens import load_tokenizer
from understudy.virtual import planned
from understudy.walk import Walk

SAMPLE = 11
COLLECT = Calibration(collect=("candidates",), dense_tokens=SAMPLE, batch_size=2)
Weights = Mapping[str, Mapping[int, float]]


def js(one: np.ndarray, other: np.ndarray) -> float:
    """Mean divergence over the rows, as METHODS 4.4 says it."""
    found = []
    for h, o in zip(one.astype(np.float64), other.astype(np.float64), strict=True):
        p, q = np.exp(h - h.max()), np.exp(o - o.max())
        p, q = p / p.sum(), q / q.sum()
        kl = [(x * (np.log(x + 1e-10) - np.log((p + q) / 2 + 1e-10))).sum() for x in (p, q)]
        found.append(0.5 * (kl[0] + kl[1]))
    return float(np.mean(found))


class Slow:
    """The whole model in transformers, run anew for every question."""

    def __init__(self, folder: Path, family: str, ids: torch.Tensor) -> None:
        self.model = zoo.model_class(family).from_pretrained(folder).eval().requires_grad_(False)
        self.layers = {layer.key: layer for layer in Skeleton(folder).layers}
        self.ids = ids
        self.original = self.run({})

    @torch.no_grad()
    def run(self, weights: Weights) -> tuple[list[np.ndarray], np.ndarray]:
        """Return what each decoder layer puts out, `[T, H]`, and the logits, with some layers condensed."""
        after: list[np.ndarray] = []
        with ExitStack() as stack:
            for key, kept in weights.items():
                stack.enter_context(self.replaced(self.model.get_submodule(self.layers[key].name), kept))
            for layer in self.model.get_submodule(next(iter(self.layers.values())).stack):
                hook = layer.register_forward_hook(lambda module, args, out: after.append(rows(out)))
                stack.callback(hook.remove)
            logits = self.model(input_ids=self.ids, use_cache=False).logits
        return after, logits.double().numpy()

    @contextmanager
    def replaced(self, experts: Any, kept: Mapping[int, float]) -> Iterator[None]:
        own = experts.forward

        def forward(hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(hidden)
            for e, weight in kept.items():
                one = torch.ones(len(hidden), 1)
                out += weight * own(hidden, torch.full((len(hidden), 1), e), one)
            return out

        experts.forward = forward
        try:
            yield
        finally:
            del experts.forward

    def criterion(self, name: str, weights: Weights, index: int = -1) -> float:
        """How far a decoder layer's output, or with `kl` what the model predicts, is from the original's."""
        (was, predicted), (now, predicts) = self.original, self.run(weights)
        if name == "js":
            return js(was[index], now[index])
        if name == "l2":
            return float(np.linalg.norm(now[index] - was[index]) / np.linalg.norm(was[index]))
        log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (predicted[:, :-1], predicts[:, :-1]))
        return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def rows(output: Any) -> np.ndarray:
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden.reshape(-1, hidden.shape[-1]).double().numpy()


# --- weights and sums ---


def test_weights_are_mean_gates_of_those_who_chose() -> None:
    routes = draw_routes(silent=(3,))
    expected = [np.mean([g for g, _ in routes.of(e)]) if routes.of(e) else 0.0 for e in range(routes.experts)]
    np.testing.assert_allclose(mean_gates(sums_of(routes)), expected, rtol=1e-12)
    assert expected[3] == 0


def products_of(seen: Seen, E: int, places: list[int], scale: float = 1.0) -> dict[str, Any]:
    y = np.array([np.concatenate([seen.y(t, e) for t in places]) for e in range(E)])
    r, h = (np.concatenate([x[t] for t in places]) for x in (seen.routed, seen.after))
    below = r @ r if scale == 0 else h @ h / scale**2
    return {"candidate_gram": y @ y.T, "candidate_dot": y @ r, "candidate_sq": r @ r, "candidate_scale": below}


@pytest.mark.parametrize(
    "family", ["olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe", "granitemoe", "minimax_m3_vl", "flex_olmo"]
)
def test_sums_are_what_they_say(family: str, tmp_path: Path) -> None:
    folder, ids = folder_of(family, tmp_path / "model"), tokens()
    layer = Skeleton(folder).layers[-1]
    whole = zoo.model_class(family).from_pretrained(folder).eval().requires_grad_(False)
    got = watched(folder, ids, COLLECT)[layer.key]
    places = [round(p) for p in np.linspace(0, ids.numel() - 1, SAMPLE)]
    outer, inner = SCALES.get(family, (1.0, 1.0))
    scale = 0 if family == "flex_olmo" else outer * inner  # a norm behind: r is measured by itself
    for name, value in products_of(Seen(whole, layer, ids), layer.num_experts, places, scale).items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=2e-5, atol=2e-6 * np.abs(value).max(), err_msg=name)


def test_parts_add_up(tmp_path: Path) -> None:
    folder, ids = folder_of("olmoe", tmp_path / "model"), tokens(rows=5)
    whole, total = watched(folder, ids, COLLECT), ids.numel()
    first = watched(folder, ids[:3], COLLECT, 0, total)
    second = watched(folder, ids[3:], COLLECT, ids[:3].numel(), total)
    for key, layer in whole.items():
        merged = first[key] + second[key]
        for name in ("candidate_gram", "candidate_dot", "candidate_sq", "candidate_scale"):
            value = getattr(layer, name)
            np.testing.assert_allclose(getattr(merged, name), value, rtol=1e-5, atol=1e-6 * np.abs(value).max())


# --- the choice of experts from sums ---


def drawn(experts: int = 7, dims: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Products]:
    """Outputs of experts on all tokens in one row each, what the routed put out, and their products."""
    rng = np.random.default_rng(seed)
    y, r = rng.normal(size=(experts, dims)) + rng.normal(size=dims), rng.normal(size=dims)
    y *= np.exp(rng.normal(size=(experts, 1)))
    return y, r, Products(y @ y.T, y @ r, float(r @ r), 1.0)


def test_errors_and_fitted_weights_are_those_of_the_outputs() -> None:
    y, r, products = drawn()
    sets = np.array(list(itertools.combinations(range(7), 3)))
    weights = np.random.default_rng(1).normal(size=sets.shape)
    expected = [((r - w @ y[s]) ** 2).sum() for s, w in zip(sets, weights)]
    np.testing.assert_allclose(products.error(sets, weights), expected, rtol=1e-10)
    fitted = [np.linalg.lstsq(y[s].T, r, rcond=None)[0] for s in sets]
    np.testing.assert_allclose(products.fitted(sets), fitted, rtol=1e-6, atol=1e-9)


def test_experts_that_say_the_same_share_a_fitted_weight() -> None:
    y, r, _ = drawn()
    y[4] = y[2]
    products = Products(y @ y.T, y @ r, float(r @ r), 1.0)
    sets = np.array([[1, 2, 4]])
    weights = products.fitted(sets)
    assert weights[0, 1] == pytest.approx(weights[0, 2], rel=1e-6)
    alone = products.fitted(sets[:, :2])
    np.testing.assert_allclose(products.error(sets, weights), products.error(sets[:, :2], alone), rtol=1e-8)


def slow_greedy(candidates: list[int], count: int, value: Any) -> list[int]:
    taken: list[int] = []
    for _ in range(count):
        left = [e for e in candidates if e not in taken]
        values = [value((*taken, e)) for e in left]
        taken.append(left[values.index(min(values))])
    return taken


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fit", [False, True])
def test_greedy_takes_the_best_next(seed: int, fit: bool) -> None:
    y, r, products = drawn(seed=seed)
    gates = np.random.default_rng(seed).random(7)

    def weigh(sets: np.ndarray) -> np.ndarray:
        return products.fitted(sets) if fit else gates[sets]

    def value(ids: tuple[int, ...]) -> float:
        w = np.linalg.lstsq(y[list(ids)].T, r, rcond=None)[0] if fit else gates[list(ids)]
        return float(((r - w @ y[list(ids)]) ** 2).sum())

    found = greedy(range(7), 4, weigh, products.error)
    assert list(found.ids) == slow_greedy(list(range(7)), 4, value)
    np.testing.assert_allclose(found.path, [value(found.ids[: n + 1]) for n in range(4)], rtol=1e-8)
    np.testing.assert_allclose(found.weights, weigh(np.array([found.ids]))[0], rtol=1e-12)
    fewer = greedy(range(7), 2, weigh, products.error)
    assert found.ids[:2] == fewer.ids, "a smaller budget is a prefix"
    widest = greedy(range(7), 4, weigh, products.error, beam=1000)
    best = min(itertools.combinations(range(7), 4), key=value)
    assert sorted(widest.ids) == list(best), "with nothing left out, the best of all"
    wider = greedy(range(7), 4, weigh, products.error, beam=3)
    assert widest.path[-1] <= wider.path[-1] <= found.path[-1] * (1 + 1e-12)


def test_of_equals_the_lowest_goes_in_and_what_is_of_no_use_never() -> None:
    y, r, _ = drawn(4)
    y[:] = y[0]
    products = Products(y @ y.T, y @ r, float(r @ r), 1.0)
    alike = greedy(range(4), 2, lambda sets: np.full(sets.shape, 0.1), products.error)
    assert alike.ids == (0, 1)
    stats = sums_of(draw_routes(silent=(0, 3)))
    fields = {"candidate_gram": np.eye(8), "candidate_dot": np.ones(8), "candidate_sq": 9.0, "candidate_scale": 9.0}
    known = type(stats)(**stats.arrays() | fields)
    assert set(from_sums(known, 99).ids) == {1, 2, 4, 5, 6, 7}
    assert from_sums(known, 0) == Chosen()
    assert from_sums(known, 0).entry(2) == {0: 0.0, 1: 0.0}
    assert Products.of(known).relative(Chosen()) == 1.0


# --- the criterion of the paper ---


def test_divergence_is_that_of_the_words() -> None:
    one, other = (torch.randn(9, 33, generator=torch.Generator().manual_seed(n)) * 2 for n in range(2))
    assert float(hidden_js(one, other).mean()) == pytest.approx(js(one.numpy(), other.numpy()), rel=1e-5)
    assert float(hidden_js(one, one).abs().max()) == 0
    np.testing.assert_allclose(hidden_js(one, other), hidden_js(other, one), rtol=1e-5)


FAMILIES = ["olmoe", "deepseek_v3", "qwen2_moe", "granitemoe"]


class Case:
    """A tiny model in a folder, the text, its statistics, and the slow way to ask it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder, self.ids = folder_of(family, folder / "model"), tokens(rows=4)
        self.stats = watched(self.folder, self.ids, COLLECT)
        self.slow = Slow(self.folder, family, self.ids)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return functools.cache(lambda family: Case(family, tmp_path_factory.mktemp(family)))


class Live:
    """Samples of all layers of a skeleton, as the search takes them, and the live experts to ask while resident."""

    def __init__(self, case: Case, keep: int, criterion: str, **more: Any) -> None:
        ids, self.stats = case.ids, case.stats
        self.source, self.chosen = Skeleton(case.folder), dict[str, Chosen]()
        self.routes = 0  # expert-token products, dense and routed; layers run condensed count as routed ones
        selection = Selection(method="mone", keep_experts=keep, **more)
        weights: dict[str, dict[int, float]] = {}
        settings = Calibration(dense_tokens=ids.numel())

        @contextmanager
        def watching(layer: Any, decoder: Any) -> Iterator[None]:
            resident = Resident(self.source, layer, decoder, settings, search.walk.batches, total=ids.numel())
            seen = Candidates(resident)
            with seen.attached():
                yield
            gates, sample = mean_gates(self.stats[layer.key]), seen.sample()
            inner = "l2" if criterion == "kl" else criterion
            found = choose_experts(sample, resident.experts, gates, selection, inner, 1 << 30)
            self.chosen[layer.key], weights[layer.key] = found, found.by_id

        self.weights = weights
        keys = [layer.key for layer in self.source.layers]
        self.search = search = LayerSearch(self.source, ids.numpy(), 2, criterion, weights, keys, 1 << 30, watching)
        for layer in self.source.layers:
            experts = self.source.model.get_submodule(layer.name)
            experts.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.routes += (*args, *kwargs.values())[1].numel()


@pytest.mark.parametrize("criterion", ["js", "l2"])
@pytest.mark.parametrize(("family", "weights"), [(f, "mean") for f in FAMILIES] + [("deepseek_v3", "fitted")])
def test_experts_are_those_of_a_run_for_every_candidate(
    family: str, criterion: str, weights: str, case: Callable[[str], Case]
) -> None:
    live, slow = Live(case(family), 3, criterion, weights=weights), case(family).slow
    live.search.run(lambda taken: len(taken) == 1)
    for key in list(slow.layers)[-1:]:  # the others run the same code
        layer, gates = slow.layers[key], mean_gates(live.stats[key])
        seen = Seen(slow.model, layer, slow.ids)
        y = {e: one_by_one(seen, e) for e in range(layer.num_experts)}

        def weighed(ids: tuple[int, ...], gates=gates, y=y, seen=seen) -> dict[int, float]:
            if weights == "mean":
                return {e: float(gates[e]) for e in ids}
            rows = np.array([y[e] for e in ids]).T
            return dict(zip(ids, np.linalg.lstsq(rows, seen.routed.ravel(), rcond=None)[0].tolist()))

        def value(ids: tuple[int, ...], key=key, index=layer.index, weighed=weighed) -> float:
            return slow.criterion(criterion, {key: weighed(ids)}, index)

        found = live.chosen[key]
        assert list(found.ids) == slow_greedy(list(range(layer.num_experts)), 3, value)
        np.testing.assert_allclose(found.weights, list(weighed(found.ids).values()), rtol=1e-4)
        if criterion == "js":
            expected = [value(found.ids[: n + 1]) for n in range(3)]
            np.testing.assert_allclose(found.path, expected, rtol=1e-3, atol=1e-8)


def one_by_one(seen: Seen, expert: int) -> np.ndarray:
    return np.concatenate([one_expert(seen.experts, x, expert).double().numpy() for x in seen.x])


def test_outputs_past_the_memory_are_the_same(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    sample = Sample(*(torch.randn(50, 16, generator=draw) for _ in range(3)), reach=0.5)

    def experts(x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x.roll(int(index[0, 0]), 1) * gates

    sets, weights = np.array([[0, 2], [3, 1]]), np.array([[0.3, 0.4], [0.1, -0.2]])
    held, mapped = Outputs(sample, experts, 4, 1 << 20), Outputs(sample, experts, 4, 0)
    assert mapped.y_ENH.equal(held.y_ENH)
    np.testing.assert_array_equal(mapped.js(sets, weights), held.js(sets, weights))
    expected = sample.after_NH + 0.5 * (0.3 * sample.hidden_NH + 0.4 * sample.hidden_NH.roll(2, 1) - sample.routed_NH)
    assert held.js(sets, weights)[0] == pytest.approx(js(sample.after_NH.numpy(), expected.numpy()), rel=1e-4)
    with pytest.raises(UnsupportedModelError, match="search with --criterion l2"):
        Outputs(Sample(sample.hidden_NH, sample.routed_NH, None, None), experts, 4, 0)


def test_a_condensed_layer_listens_to_no_router(tmp_path: Path) -> None:
    model = zoo.tiny_model("olmoe")
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, zoo.HIDDEN)
    index, gates = torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    whole = experts(x, index, gates)
    with condensed(experts, {5: 0.25, 1: -0.5}):
        got = experts(x, index, gates)
    expected = torch.stack([0.25 * one_expert(experts, t, 5) - 0.5 * one_expert(experts, t, 1) for t in x])
    torch.testing.assert_close(got, expected)
    with condensed(experts, {}):
        assert not experts(x, index, gates).any()
    assert experts(x, index, gates).equal(whole)
    assert "forward" not in vars(experts)


# --- the choice of layers ---


def slow_layers(slow: Slow, weights: Weights, criterion: str, count: int, beam: int) -> tuple[Any, list[float]]:
    """Every candidate by a run of the whole model: layers in order, and the criterion after each."""
    known: dict[frozenset[str], float] = {}

    def value(keys: tuple[str, ...]) -> float:
        if frozenset(keys) not in known:
            known[frozenset(keys)] = slow.criterion(criterion, {key: weights[key] for key in keys})
        return known[frozenset(keys)]

    held: list[tuple[str, ...]] = [()]
    for _ in range(count):
        grown = {frozenset((*keys, key)): (*keys, key) for keys in held for key in slow.layers if key not in keys}
        held = sorted(grown.values(), key=value)[:beam]
    return held[0], [value(held[0][: n + 1]) for n in range(count)]


@pytest.mark.parametrize(
    ("family", "criterion"),
    [("olmoe", "js"), ("olmoe", "l2"), ("olmoe", "kl"), ("deepseek_v3", "js"), ("zaya", "kl")],  # zaya hands on more
)
def test_layers_are_those_of_a_run_for_every_candidate(
    family: str, criterion: str, case: Callable[[str], Case]
) -> None:
    live, slow = Live(case(family), 2, criterion), case(family).slow
    all_but_one = len(live.source.layers) - 1
    found = live.search.run(lambda taken: len(taken) >= all_but_one)
    layers, path = slow_layers(slow, live.weights, criterion, all_but_one, 1)
    assert found.layers == layers
    np.testing.assert_allclose(found.path, path, rtol=2e-3, atol=1e-8)


def test_a_wide_beam_finds_the_best_of_all_combinations(case: Callable[[str], Case]) -> None:
    slow = case("olmoe").slow
    for beam in (2, 6):
        live = Live(case("olmoe"), 1, "l2")
        found = live.search.run(lambda taken: len(taken) >= 2, beam=beam)
        expected, _ = slow_layers(slow, live.weights, "l2", 2, beam)
        assert set(found.layers) == set(expected)
    pairs = list(itertools.combinations(slow.layers, 2))
    best = min(pairs, key=lambda pair: slow.criterion("l2", {key: live.weights[key] for key in pair}))
    assert set(found.layers) == set(best)


@pytest.mark.parametrize(("criterion", "bar", "wanted"), [("l2", 2, 1), ("l2", 2, 2), ("l2", 2, 4), ("js", 5, 3)])
def test_what_it_costs(criterion: str, bar: int, wanted: int, case: Callable[[str], Case]) -> None:
    """In runs of the original over the text, with every expert run on all of it."""
    live, ids = Live(case("olmoe"), 2, criterion), case("olmoe").ids
    live.search.run(lambda taken: len(taken) >= wanted)
    E, K, L = zoo.EXPERTS, zoo.TOP_K, zoo.LAYERS
    spent = live.routes / (K * ids.numel() * L)
    dense, experts, layers = E / K, live.search.first_runs / L, live.search.later_runs / L
    assert spent == pytest.approx(dense + experts + layers), "nothing is run that is not counted"
    assert dense + experts <= bar * E / K
    assert layers <= wanted * L / 2
    assert layers <= (wanted * L * (L - 1) / 2 + L - 1) / L


def test_activations_past_the_memory_change_nothing(case: Callable[[str], Case]) -> None:
    one, other = (Live(case("deepseek_v3"), 2, "js") for _ in range(2))
    other.search._limit = 0
    assert one.search.run(lambda taken: len(taken) >= 2) == other.search.run(lambda taken: len(taken) >= 2)


# --- plans ---

DEMO = Path(__file__).parents[1] / "examples" / "demo"
TEXT: dict[str, Any] = {"data": (f"{DEMO}/train/math.jsonl.xz",), "samples": 4, "seq_len": 32}
WANTED: dict[str, Any] = {"method": "cd_moe", "keep_experts": 3}


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    understudy.calibrate(DEMO / "model", path, collect=("candidates",), dense_tokens=64, **TEXT)
    return path


def kept(plan: Plan) -> dict[str, dict[int, float]]:
    return {key: {e: w for e, w in kinds["condense"].items() if w} for key, kinds in plan.layers.items()}


def test_a_plan_takes_the_layers_of_the_least_error(stats: Path) -> None:
    known = load_stats(stats).layers
    chosen = {key: from_sums(layer, 3) for key, layer in known.items()}
    error = {key: Products.of(known[key]).relative(chosen[key]) for key in known}
    order = sorted(error, key=lambda key: error[key])
    for count in (1, 2, 3):
        plan = understudy.plan(stats, layers=count, **WANTED).plan
        assert kept(plan) == {key: chosen[key].by_id for key in sorted(order[:count])}
    share = 13 / 16 / 4  # of all experts, by a layer
    for ratio, count in ((0, 0), (0.01, 1), (share, 1), (share + 0.001, 2), (2 * share, 2), (3 * share, 3)):
        assert len(understudy.plan(stats, ratio=ratio, **WANTED).plan.layers) == count
    fitted = understudy.plan(stats, layers=4 - 1, weights="fitted", **WANTED).plan
    for key, by_id in kept(fitted).items():
        found = Chosen(tuple(by_id), tuple(by_id.values()))
        assert Products.of(known[key]).relative(found) < error[key]
    without = understudy.plan(stats, layers=1, method="cd_moe", keep_experts=0)
    assert kept(without.plan).popitem()[1] == {}
    everything = understudy.plan(stats, layers=1, method="cd_moe", keep_experts=99)
    assert len(kept(everything.plan).popitem()[1]) == 16
    assert "keep fewer than 99 experts, 16 at least" in everything.notes[1]
    assert "have no shared experts, which the paper relies on: what they keep is all" in everything.notes[2]
    assert without.notes[1].endswith("nothing is left in them")


def test_what_cannot_be_planned_is_refused(stats: Path) -> None:
    for more, message in (
        ({"layers": 4}, "--layers 4 is out of reach with 3 layers condensed; keep fewer experts"),
        ({"ratio": 0.9}, "ratio 0.9 is out of reach with 3 layers condensed"),
        ({"layers": 1, "ratio": 0.2}, "give one of --ratio, --size, --model-ratio and --layers"),
        ({}, "give one of --ratio, --size, --model-ratio and --layers"),
        ({"ratio": 0.2, "bases": 2}, "--bases has no effect on method cd_moe"),
        ({"ratio": 0.2, "method": "reap"}, "--keep-experts has no effect on method reap"),
    ):
        with pytest.raises(PlanError, match=message):
            understudy.plan(stats, **(WANTED | more))
    bare = load_stats(stats, only={"tokens", "count", "gate_sum"})
    with pytest.raises(StatsError, match="calibrate with --collect candidates"):
        understudy.plan(bare, layers=1, **WANTED)


@pytest.mark.parametrize("criterion", ["js", "kl"])
def test_a_search_writes_a_plan_and_the_model_of_it_is_as_far_away_as_it_says(
    criterion: str, stats: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"layers": 2, "criterion": criterion, "dense_tokens": 128, **WANTED, **TEXT}
    options |= {"dtype": "float32"}
    found = understudy.search(
        DEMO / "model", stats, tmp_path / "plan.yaml", progress=lambda *x: told.append(x), **options
    )
    assert load_plan(tmp_path / "plan.yaml") == found.plan
    assert found.plan.recipe["search"] == criterion
    assert found.fitness is None
    assert [(what, done) for what, done, _ in told] == [
        *(("experts", n) for n in (1, 2, 3, 4)),
        ("layers", 1),
        ("layers", 2),
    ]
    source = Skeleton(DEMO / "model", dtype="float32")
    blocks = token_blocks(TEXT["data"], load_tokenizer(DEMO / "model", False), seq_len=32, samples=4, seed=0)
    walks = [
        Walk(model, blocks.ids, 4, ActivationStore(1 << 30)) for model in (planned(source, found.plan, None), source)
    ]
    for walk in walks:
        with walk.ready():
            walk.through_layers()
    if criterion == "kl":
        value = predict(walks, lambda *x: None)[:, KL].sum() / blocks.ids[:, 1:].size
    else:
        value = js(*(rows(walk.store.get(0)) for walk in walks))
    said = found.notes[0].rpartition("(")[2].rstrip(")")
    assert float(said) == pytest.approx(float(value), rel=0.01)
    assert "cost in runs of the model over the text: 6.00 for experts" in found.notes[1]


def test_searches_by_size_and_ratio_and_leaves_layers_alone(stats: Path, tmp_path: Path) -> None:
    cheap = {**WANTED, **TEXT, "criterion": "l2", "dense_tokens": 32}
    share = 13 / 16 / 4
    by_ratio = understudy.search(DEMO / "model", stats, tmp_path / "a", ratio=share * 1.5, **cheap)
    assert len(by_ratio.plan.layers) == 2
    by_size = understudy.search(DEMO / "model", stats, tmp_path / "b", size=str(by_ratio.expected_bytes), **cheap)
    assert by_size.plan.layers == by_ratio.plan.layers
    some = understudy.search(DEMO / "model", stats, tmp_path / "c", layers=1, keep_layers="0-2", **cheap)
    assert set(some.plan.layers) == {"3"}


@pytest.mark.parametrize("beam", [1, 2])
def test_an_interrupted_search_goes_on(beam: int, stats: Path, tmp_path: Path) -> None:
    options = {**WANTED, **TEXT, "criterion": "l2", "dense_tokens": 32, "layers": 3, "beam": beam}
    whole = understudy.search(DEMO / "model", stats, tmp_path / "whole.yaml", **options)
    left, out = tmp_path / ".plan.yaml.search.json", tmp_path / "plan.yaml"
    for where in (("experts", 2), ("layers", 1), ("layers", 2)):

        def stop(what: str, done: int, total: int, where: Any = where) -> None:
            if (what, done) == where:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            understudy.search(DEMO / "model", stats, out, progress=stop, **options)
        found = json.loads(left.read_text())
        assert len(found["chosen"]) == (2 if where[0] == "experts" else 4)
        assert len(found.get("known", ())) == {"experts": 0, "layers": (where[1] - 1) * beam + 1}[where[0]]
    again = understudy.search(DEMO / "model", stats, out, **options)
    assert again.plan == whole.plan
    assert again.notes[0] == whole.notes[0]
    assert not left.exists()
    assert "0.00 for layers" not in again.notes[1], "the last round was still to be run"


def test_what_cannot_be_searched_is_refused(stats: Path, tmp_path: Path) -> None:
    for more, message in (
        ({"layers": 4}, "--layers 4 is out of reach with 3 layers condensed"),
        ({"layers": 1, "ratio": 0.1}, "give one of --ratio, --size, --model-ratio and --layers"),
        ({"layers": 1, "generations": 3}, "--generations has no effect on a search with method cd_moe"),
        ({"layers": 1, "keep_super": True}, "--keep-super has no effect on a search"),
        ({"layers": 1, "kind": "drop"}, "cd_moe cannot make drop; use --kind condense"),
        ({"layers": 1, "keep_layers": "0-3"}, "there is no layer to search over"),
        ({"ratio": 0.5, "method": "reap", "kind": "constant", "keep_experts": 6, "beam": 2}, "--beam has no effect"),
        (
            {"ratio": 0.5, "method": "reap", "kind": "constant", "keep_experts": 6, "criterion": "kl"},
            "--criterion has no",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            understudy.search(
                DEMO / "model", stats, tmp_path / "plan.yaml", **(WANTED | TEXT | {"dense_tokens": 2048} | more)
            )
    assert not (tmp_path / "plan.yaml").exists()


def test_from_the_command_line(stats: Path, tmp_path: Path) -> None:
    text = ["--data", TEXT["data"][0], "--samples", "4", "--seq-len", "32"]
    words = ["--method", "cd_moe", "--keep-experts", "2", "--layers", "1", "--weights", "fitted", "--beam", "2"]
    more = ["--criterion", "l2", "--dense-tokens", "32", "--json"]
    where = ["search", str(DEMO / "model"), str(stats), "--out", str(tmp_path / "plan.yaml")]
    result = CliRunner().invoke(app, [*where, *words, *more, *text])
    assert result.exit_code == 0, result.output
    assert "layers in the order in which they were condensed" in json.loads(result.stdout)["notes"][0]
    assert [len(x) for x in kept(load_plan(tmp_path / "plan.yaml")).values()] == [2]
