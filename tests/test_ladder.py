"""Ladder: neurons chosen by what remains after a refit, the refit itself, and the statistics that both are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import small
import tiny
import zoo
from contract import close, ids_of, load, walked
from understudy.channel_scores import get_channel_score
from understudy.channels import channel_views
from understudy.data import Blocks, token_blocks
from understudy.errors import NumericError, PlanError, StatsError
from understudy.kinds import check_plan, expected_bytes, get_kind
from understudy.layout import model_facts
from understudy.moe import find_moe_layers
from understudy.plans import Plan, PlanModel
from understudy.recipe import Calibration, Selection
from understudy.refit import RIDGE, centred, order_of_loss, refitted
from understudy.scores import Context
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.stages.calibrate import calibrate, collect
from understudy.stages.compare import compare
from understudy.stages.compress import compress
from understudy.stages.select import plan
from understudy.stats import ExpertStats, Stats, load_stats
from understudy.tokens import load_tokenizer
from understudy.virtual import made, planned

FAMILIES = ["olmoe", "gpt_oss", "nemotron_h", "deepseek_v3", "mixtral"]
ALL = ("channels", "grams", "gradients")
MAPS = ("activation_gram", "down_gram", "gradient_down_gram")
DEMO = Path(__file__).parents[1] / "examples" / "demo"


# --- the algebra, with numbers made up ---


def expert(seed: int = 0, width: int = 6, tokens: int = 25) -> dict[str, np.ndarray]:
    """One expert: activations, gates, its down matrix `[I, H]` and a metric of answers."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
    u = rng.normal(size=(9, 4))
    return {"h": h, "g": rng.random(tokens), "down": rng.normal(size=(width, 4)), "F": u.T @ u / 9}


def sums(x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    g2 = x["g"] ** 2
    return (x["h"] * g2[:, None]).T @ x["h"], g2 @ x["h"], g2.sum()


def problem(x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows of the regression `[n + I, I]` that the ridge makes, what they should answer, and r."""
    g = x["g"][:, None]
    centre = (g**2 * x["h"]).sum(0) / (g**2).sum()
    rows = g * (x["h"] - centre)
    r = RIDGE * (rows**2).sum(0).mean()
    rows = np.concatenate((rows, np.sqrt(r) * np.eye(rows.shape[1])))
    return rows, rows @ x["down"], r


def left(x: dict[str, np.ndarray], kept: list[int]) -> float:
    """What the best columns for these neurons leave of the objective, in the metric, from scratch."""
    rows, wanted, _ = problem(x)
    fitted = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
    error = wanted - rows[:, kept] @ fitted
    return float(np.trace(error @ x["F"] @ error.T))


def slow_order(x: dict[str, np.ndarray]) -> list[float]:
    """Scores by trying every neuron at each step."""
    kept, score, last = list(range(x["h"].shape[1])), [0.0] * x["h"].shape[1], 0.0
    while kept:
        now = left(x, kept)
        cost, j = min((left(x, [k for k in kept if k != j]) - now, j) for j in kept)
        last = max(last, cost)
        score[j] = last
        kept.remove(j)
    return score


def test_order_is_that_of_trying_every_neuron() -> None:
    experts = [expert(seed) for seed in range(4)]
    experts.insert(2, expert(9, tokens=1))  # one token: nothing varies
    given = [np.stack(part) for part in zip(*map(sums, experts))]
    metric = np.stack([x["down"] @ x["F"] @ x["down"].T for x in experts])
    got = order_of_loss(*given, metric)
    for n, x in enumerate(experts):
        want = [0.0] * 6 if n == 2 else slow_order(x)
        np.testing.assert_allclose(got[n], want, rtol=1e-8, err_msg=str(n))
        assert n == 2 or len(set(got[n])) == 6
    np.testing.assert_array_equal(got, order_of_loss(*given, metric))


def test_many_neurons_go_as_one_at_a_time() -> None:
    """Steps that are made together against the plain rule with whole matrices, as it is in the papers."""
    experts = [expert(seed, width=150, tokens=400) for seed in range(3)]
    given = [np.stack(part) for part in zip(*map(sums, experts))]
    got = order_of_loss(*given, np.stack([x["down"] @ x["F"] @ x["down"].T for x in experts]))
    for n, x in enumerate(experts):
        P, root = np.linalg.inv(centred(*sums(x))[0]), np.linalg.cholesky(x["F"])
        Y, alive, last = root.T @ x["down"].T, list(range(150)), 0.0
        for _ in range(150):
            costs = [(float((Y[:, j] ** 2).sum() / P[j, j]), j) for j in alive]
            cost, j = min(costs)
            last = max(last, cost)
            assert got[n, j] == pytest.approx(last, rel=1e-6)
            p = P[:, j] / P[j, j]
            Y, P = Y - np.outer(Y[:, j], p), P - np.outer(P[:, j], p)
            alive.remove(j)


def test_refit_is_least_squares() -> None:
    x = expert(1)
    moment, mean = centred(*sums(x))
    rows, wanted, _ = problem(x)
    for kept in ([0, 2, 5], [4], [], list(range(6))):
        columns, constant = refitted(moment, mean, x["down"], np.array(kept, int))
        # the ridge pulls the columns of the others to 0, where they are not free
        want = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
        np.testing.assert_allclose(columns, want, rtol=1e-8, atol=1e-12)
        g2 = x["g"] ** 2
        missing = x["h"] @ x["down"] - x["h"][:, kept] @ columns
        np.testing.assert_allclose(constant, g2 @ missing / g2.sum(), rtol=1e-8, atol=1e-12)
    assert np.array_equal(columns, x["down"])
    np.testing.assert_allclose(constant, 0, atol=1e-12)


def test_one_token_leaves_columns_and_gives_a_constant() -> None:
    x = expert(2, tokens=1)
    moment, mean = centred(*(np.asarray(part, np.float32) for part in sums(x)))
    columns, constant = refitted(moment, mean, x["down"], np.array([1, 3]))
    assert np.array_equal(columns, x["down"][[1, 3]])
    np.testing.assert_allclose(x["h"][0, [1, 3]] @ columns + constant, x["h"][0] @ x["down"], rtol=1e-5)


# --- statistics ---


def calibrated(model_type: str, folder: Path, ids: torch.Tensor, groups: tuple[str, ...] = ALL) -> Stats:
    """Statistics of a tiny model of a family."""
    if not (folder / "model").exists():
        zoo.tiny_model(model_type).save_pretrained(folder / "model")
    skeleton = Skeleton(folder / "model")
    facts = model_facts(skeleton, "tiny")
    blocks = Blocks(ids.numpy().astype(np.int32), np.zeros(len(ids), np.int16), ("test",), (), "0" * 64)
    work = folder / f"work-{len(list(folder.iterdir()))}"
    layers, probes = collect(skeleton, facts, blocks, Calibration(batch_size=2, collect=groups), work)
    return Stats(facts, {"collect": list(groups)}, layers, probes)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stats]:
    folder = tmp_path_factory.mktemp("olmoe")
    return folder, calibrated("olmoe", folder, ids_of(6, 16))


def slow_grams(folder: Path, stats: Stats, ids: torch.Tensor) -> dict[str, dict[str, np.ndarray]]:
    """The same of the whole model in float64, route by route (olmoe)."""
    model = load(folder / "model", "olmoe", experts_implementation="eager").double().requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    seen: dict[str, Any] = {}
    for key, layer in stats.model.layers.items():

        def keep(module: Any, args: Any, output: torch.Tensor, key: str = key) -> None:
            output.retain_grad()
            seen[key] = module, [a.detach() for a in args], output

        model.get_submodule(layer.name).register_forward_hook(keep)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    found = {}
    for key, (experts, (hidden, index, gates), output) in seen.items():
        width, u = experts.down_proj.shape[2], output.grad
        gram, down = np.zeros((zoo.EXPERTS, width, width)), experts.down_proj.detach()
        for x, chosen, weights in zip(hidden, index.tolist(), gates.tolist(), strict=True):
            for e, g in zip(chosen, weights, strict=True):
                gate, up = (experts.gate_up_proj[e].detach() @ x).chunk(2)
                h = (nn.functional.silu(gate) * up).numpy()
                gram[e] += g**2 * np.outer(h, h)
        metric = torch.stack([sum(torch.outer(w.T @ t, w.T @ t) for t in u) for w in down])
        found[key] = {
            "activation_gram": gram,
            "down_gram": torch.stack([w.T @ w for w in down]).numpy(),
            "gradient_down_gram": metric.numpy(),
        }
    return found


def test_sums_are_those_of_loops_over_routes(olmoe: tuple[Path, Stats]) -> None:
    folder, stats = olmoe
    for key, want in slow_grams(folder, stats, ids_of(6, 16)).items():
        got = stats.layers[key]
        assert got.gradient_tokens == got.tokens == 6 * 16
        for name, value in want.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(getattr(got, name), value, rtol=1e-4, atol=1e-5 * scale, err_msg=name)
        diagonal = np.einsum("eii->ei", got.activation_gram)
        np.testing.assert_allclose(diagonal, got.gated_activation_sq_sum, rtol=1e-4, atol=1e-9)


def test_large_sums_are_maps_of_the_file(olmoe: tuple[Path, Stats], tmp_path: Path) -> None:
    stats = olmoe[1]
    file = stats.save(tmp_path / "a.safetensors")
    got, some = load_stats(file), load_stats(file, only={"tokens", "activation_gram"})
    for key, layer in got.layers.items():
        for name, value in layer.arrays().items():
            assert isinstance(getattr(layer, name), np.memmap) == (name in MAPS), name
            np.testing.assert_array_equal(value, stats.layers[key].arrays()[name])
        assert not layer.activation_gram.flags.writeable
        assert set(some.layers[key].arrays()) == {"tokens", "activation_gram"}
        assert isinstance(some.layers[key].activation_gram, np.memmap)
    assert got.save(tmp_path / "b.safetensors").read_bytes() == file.read_bytes()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(StatsError, match="damaged"):
        load_stats(file)


def test_halves_make_the_whole(olmoe: tuple[Path, Stats]) -> None:
    folder, whole = olmoe
    ids = ids_of(6, 16)
    first, second = (calibrated("olmoe", folder, part) for part in (ids[:2], ids[2:]))
    small.assert_close((first + second).layers, whole.layers, rtol=1e-4)
    for layer in calibrated("olmoe", folder, ids[:2], ("channels", "gradients")).layers.values():
        assert all(getattr(layer, name) is None for name in (*MAPS, "gradient_tokens"))


# --- the kind and the method ---


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_folder_answers_as_planned(model_type: str, tmp_path: Path) -> None:
    stats = calibrated(model_type, tmp_path, ids_of(6, 16))
    chosen = plan(stats, method="ladder", ratio=0.6).plan
    assert chosen.how == {"slim": {"order": "obs", "constant": True, "refit": True}}
    source, ids = Skeleton(tmp_path / "model"), ids_of(2, 8, seed=4)
    done = apply(tmp_path / "model", chosen, tmp_path / "out", stats=stats)  # verifies what it wrote
    assert done.nbytes == expected_bytes(chosen, stats.model)
    got = load(tmp_path / "out", model_type)
    with torch.no_grad():
        logits = got(ids).logits
        assert close(logits, walked(planned(source, chosen, stats), ids))
    key, layer = next(iter(stats.model.layers.items()))
    whole = load(tmp_path / "model", model_type).get_submodule(layer.name)
    entry = chosen.layers[key]["slim"]
    assert isinstance(entry, dict)
    hidden = torch.from_numpy(stats.probes[key].hidden)
    for e, width in entry.items():
        want = by_lstsq(stats.layers[key], channel_views(whole)["down"][e], e, int(width))
        with torch.no_grad():
            answer = get_kind("slim").reference(whole, hidden, e, entry, chosen.how["slim"], stats.layers[key])
            own = whole(hidden, torch.full((len(hidden), 1), e), torch.ones(len(hidden), 1))
        assert answer is not None and answer.shape == own.shape
        if width:
            place, row = got.get_submodule(layer.name).slim_place(e)
            columns = channel_views(place)["down"][row].double().numpy()
            np.testing.assert_allclose(columns, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def by_lstsq(sums: ExpertStats, down: torch.Tensor, e: int, width: int) -> np.ndarray:
    """Refitted columns of the best neurons of an expert, by least squares on a root of its second moments."""
    mean = sums.gated_activation_sum[e] / max(sums.gate_sq_sum[e], 1e-30)
    A = sums.activation_gram[e] - sums.gate_sq_sum[e] * np.outer(mean, mean)
    kept = np.sort(np.argsort(-get_channel_score("obs").compute(sums, None)[e], kind="stable")[:width])  # type: ignore[arg-type]
    if sums.count[e] < 2:
        return down[kept].double().numpy()
    values, vectors = np.linalg.eigh(A)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    r = RIDGE * A.diagonal().mean()
    rows = np.concatenate((root, np.sqrt(r) * np.eye(len(A))))
    return np.linalg.lstsq(rows[:, kept], rows @ down.double().numpy(), rcond=None)[0]


def test_needs_and_settings(olmoe: tuple[Path, Stats]) -> None:
    stats, kind = olmoe[1], get_kind("slim")
    how = {"order": "obs", "constant": True, "refit": True}
    assert {"activation_gram", "gradient_down_gram", "gated_activation_sum"} <= set(kind.having(how).needs)
    assert "activation_sum" not in kind.having(how).needs
    entry: dict[int, float] = {1: 5}
    assert kind.having(how).stored_bytes(stats.model.layers["0"], entry) == 5 * 3 * 32 * 4 + 32 * 4
    for wrong, message in (
        ({"refit": True}, "how: refit of slim comes with a constant; add constant: true"),
        ({"refit": 1, "constant": True}, "how: refit of slim is true or false, not 1"),
        ({"refti": True}, "how: slim has no setting 'refti'; it has order, constant and refit"),
    ):
        edited = Plan(
            method="edited", model=PlanModel.of(stats.model), layers={"0": {"slim": entry}}, how={"slim": wrong}
        )
        with pytest.raises(PlanError, match=message):
            check_plan(edited, stats.model)


def test_what_is_missing_or_broken_is_one_clear_line(olmoe: tuple[Path, Stats], tmp_path: Path) -> None:
    folder, stats = olmoe
    bare = calibrated("olmoe", folder, ids_of(2, 16), ("channels",))
    with pytest.raises(
        StatsError, match=r"method ladder needs activation_gram.*calibrate with --collect grams,gradients"
    ):
        plan(bare, method="ladder", ratio=0.5)
    without = replace(stats, layers={k: replace(x, gradient_down_gram=None) for k, x in stats.layers.items()})
    with pytest.raises(StatsError, match="calibrate with --collect gradients"):
        plan(without, method="ladder", ratio=0.5)
    plan(without, method="ladder_plain", ratio=0.5)
    gram = np.array(stats.layers["1"].activation_gram)
    gram[3, 2, 4] = np.nan
    broken = replace(stats, layers={**stats.layers, "1": replace(stats.layers["1"], activation_gram=gram)})
    with pytest.raises(NumericError, match="layer 1: the obs score of neuron 0 of expert 3 is NaN"):
        plan(broken, method="ladder", ratio=0.5)


def test_a_refit_that_is_not_finite_says_where(olmoe: tuple[Path, Stats]) -> None:
    folder, stats = olmoe
    model = load(folder / "model", "olmoe")
    layer = next(x for x in find_moe_layers(model) if x.key == "1")
    experts: Any = model.get_submodule(layer.name)
    with torch.no_grad():
        experts.down_proj[3, 0, 0] = torch.inf
    entry: dict[int, float] = {3: 5}
    how = {"slim": {"order": "obs", "constant": True, "refit": True}}
    stand_ins = get_kind("slim").stand_ins(entry, how["slim"])
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(NumericError, match="layer 1: slim: what is refitted of expert 3 is NaN or infinite"),
    ):
        made(layer, stand_ins, {"slim": entry}, how, stats.layers["1"], experts)


def test_unseen_experts_go_first(olmoe: tuple[Path, Stats]) -> None:
    layer = olmoe[1].layers["0"]
    silent = {name: np.array(getattr(layer, name)) for name in ("count", "gate_sq_sum", "gated_activation_sum")}
    for value in silent.values():
        value[2] = 0
    gram = np.array(layer.activation_gram)
    gram[2] = 0
    score = get_channel_score("obs").compute(
        replace(layer, **silent, activation_gram=gram), Context(olmoe[1].model.layers["0"], 0, Selection())
    )
    assert (score[2] < np.delete(score, 2, 0).min()).all()


def test_it_loses_less_than_heapr_at_equal_bytes(tmp_path: Path) -> None:
    """On the demo model, which is trained, with its own text; KL of the logits to those of the original."""
    model, text = DEMO / "model", (str(DEMO / "train"),)
    file = tmp_path / "stats.safetensors"
    calibrate(model, file, data=text, samples=16, seq_len=64, collect=ALL, seed=0)
    stats = load_stats(file)
    test = token_blocks((str(DEMO / "test"),), load_tokenizer(model, False), seq_len=64, samples=6, seed=0)
    ids, source = torch.from_numpy(test.ids.astype(np.int64)), Skeleton(model)
    original = walked(source, ids).log_softmax(-1)
    budget = stats.model.nbytes - stats.model.routed_bytes // 2
    kl = {}
    entrants: dict[str, dict[str, Any]] = {name: {"method": name} for name in ("heapr", "ladder", "ladder_plain")}
    entrants |= {"refitted": {"method": "heapr", "refit": True}, "constant": {"method": "ladder", "kind": "constant"}}
    for method, settings in entrants.items():
        chosen = plan(stats, **settings, size=str(budget))
        assert budget - 100_000 < chosen.expected_bytes <= budget, method  # an expert takes 98 kB
        logits = walked(planned(source, chosen.plan, stats), ids).log_softmax(-1)
        kl[method] = float((original.exp() * (original - logits)).sum(-1).mean())
    assert kl["ladder"] < 0.75 * kl["heapr"], kl
    assert kl["ladder"] < kl["refitted"] < kl["heapr"] < kl["constant"], kl
    assert kl["ladder_plain"] < kl["heapr"], kl


def test_whole_experts_become_constants_that_engines_read(olmoe: tuple[Path, Stats], tmp_path: Path) -> None:
    """Those whose neurons together lose least for their bytes; each layer keeps its best; nothing of ours is in it."""
    folder, stats = olmoe
    chosen = plan(stats, method="ladder", kind="constant", ratio=0.5).plan
    lost = {key: get_channel_score("obs").compute(x, None).sum(1) for key, x in stats.layers.items()}  # type: ignore[arg-type]
    gone = {(key, e) for key, kinds in chosen.layers.items() for e, width in kinds["slim"].items() if width == 0}  # type: ignore[union-attr]
    stay = {(key, e) for key, x in lost.items() for e in range(len(x))} - gone
    assert len(gone) == len([e for kinds in chosen.layers.values() for e in kinds["slim"]])
    free = {(key, e) for key, e in stay if e != lost[key].argmax()}
    assert max(lost[key][e] for key, e in gone) <= min((lost[key][e] for key, e in free), default=np.inf)
    done = apply(folder / "model", chosen, tmp_path / "out", stats=stats)
    config = json.loads((done.folder / "config.json").read_text())
    assert not config["architectures"][0].startswith("Understudy")
    targets = config["compression_config"]["transform_config"]["expert_substitution"]["targets"].values()
    formats = {x["format"] for target in targets for x in target["replacements"].values()}
    assert formats == {"constant-v1"}
    key, expert = sorted(gone)[0]
    name = stats.model.layers[key].name
    experts = load(done.folder, "olmoe").get_submodule(name)
    want = stats.layers[key].weighted_mean[expert]
    row = experts.constants[experts.constant_row(expert)].detach().numpy()
    np.testing.assert_allclose(row, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_each_layer_can_give_the_same_share(olmoe: tuple[Path, Stats]) -> None:
    stats = olmoe[1]

    def freed(scope: str) -> list[int]:
        entries = plan(stats, method="ladder", ratio=0.5, scope=scope, width_classes=0).plan.layers
        kind = get_kind("slim").having({"order": "obs", "constant": True, "refit": True})
        return [-kind.added_bytes(layer, entries[key]["slim"]) for key, layer in stats.model.layers.items()]

    layer = next(iter(stats.model.layers.values()))
    even, half = freed("layer"), layer.experts * layer.expert_bytes / 2
    assert all(half <= x < half + layer.channel_bytes for x in even)
    assert len(set(freed("model"))) > 1


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_plan_for_a_size_is_judged_once(
    olmoe: tuple[Path, Stats], scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is that of the plan that comes out, of the farthest layer where each gives the same share."""
    from understudy.methods import ladder

    asked, own = [], ladder.rungs_of
    monkeypatch.setattr(ladder, "rungs_of", lambda *given: asked.append(given) or own(*given))
    stats = olmoe[1]
    size = stats.model.nbytes - stats.model.routed_bytes // 2
    found = plan(stats, method="ladder", scope=scope, size=f"{size}B")
    assert len(asked) == 1
    problem = asked[0][0]
    rungs = own(problem, asked[0][1])
    parts = [[key] for key in rungs] if scope == "layer" else [list(rungs)]
    layers = found.plan.layers
    most = max(
        ladder.beyond_least({key: rungs[key] for key in part}, {key: layers.get(key, {}) for key in part})
        for part in parts
    )
    each = " in each layer" if scope == "layer" else ""
    said = f"by its score it loses at most {most:.1%} more than any choice of as many bytes{each} must"
    assert said in found.notes


def test_compress_and_compare(tmp_path: Path) -> None:
    model, text = tiny.make_model(tmp_path / "model"), str(tiny.make_text(tmp_path))
    more = {"data": text, "samples": 6, "seq_len": 24}
    compress(str(model), tmp_path / "out", method="ladder", ratio=0.5, **more)
    assert "refit: true" in (tmp_path / "out" / "understudy" / "plan.yaml").read_text()
    test = str(tiny.make_text(tmp_path, "test", 50))
    results = compare(
        str(model),
        tmp_path / "cmp",
        methods="heapr,ladder",
        ratios=".5",
        seeds="0",
        test=test,
        test_seq_len=24,
        no_speed=True,
        **more,
    )
    found = {record.label: record for record in results.results}
    assert set(found) == {"heapr", "ladder"}
    for record in found.values():
        assert record.skipped is None and record.bytes is not None
        assert record.budget_bytes - 5000 < record.bytes <= record.budget_bytes
    assert found["ladder"].stats == found["heapr"].stats
