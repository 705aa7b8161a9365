"""Experts that share bases in folders: declared, counted, written out in full, trained numbers saved and loaded."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import small
import zoo
from contract import calibrated, close, ids_of, load, masked, plan_of, tensors_of, walked, without_understudy
from slow_bases import randomise
from understudy.errors import CheckpointError
from understudy.experts import StandInExperts
from understudy.plans import Plan
from understudy.sizes import count_params
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.standins import ROUTER_SEMANTICS
from understudy.virtual import planned

IDS = ids_of()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """A tiny folder of a family with its statistics and a plan, made when it is first asked for."""

    @functools.cache
    def made(model_type: str) -> SimpleNamespace:
        root = tmp_path_factory.mktemp(model_type)
        folder = small.model_folder(root / "source", model_type)
        stats = calibrated(folder, root / "work", IDS)
        first, last = list(stats.model.layers)[:: len(stats.model.layers) - 1]
        plan = plan_of(stats, {first: {"shared_base": [[5, 0, 2], [7]]}, last: {"shared_base": [[3, 1]]}})
        return SimpleNamespace(root=root, folder=folder, stats=stats, plan=plan, first=first, last=last)

    return made


BEST = {"no base": {"rank": 4, "base": False}, "residual": {"rank": 4, "start": "residual"}}  # best of that rank


def having(plan: Plan, how: dict[str, Any]) -> Plan:
    return plan.model_copy(update={"how": {"shared_base": how}})


def without_base(plan: Plan) -> Plan:
    return having(plan, BEST["no base"])


@torch.no_grad()
def logits(folder: Path, model_type: str) -> torch.Tensor:
    return load(folder, model_type)(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("how", BEST)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h", "qwen3_vl_moe"])
def test_best_of_a_rank(model_type: str, how: str, sources: Callable[[str], SimpleNamespace]) -> None:
    """Low-rank parts, alone or on a base, are the best of that rank: as written, and as a stock loader reads them."""
    source = sources(model_type)
    plan, out, full = (having(source.plan, BEST[how]), *(source.root / f"{how}-{end}" for end in ("thin", "full")))
    applied = apply(source.folder, plan, out, stats=source.stats)
    assert applied.nbytes < source.stats.model.nbytes
    got, whole = logits(out, model_type), load(source.folder, model_type)
    with masked(whole, plan, source.stats), torch.no_grad():
        assert close(got, whole(input_ids=IDS, use_cache=False).logits)
    assert close(walked(planned(Skeleton(source.folder), plan, source.stats), IDS), got)
    load(out, model_type).save_pretrained(source.root / f"{how}-again")
    assert torch.equal(logits(source.root / f"{how}-again", model_type), got)
    assert apply(source.folder, plan, full, stats=source.stats, materialise=True).at_full_size
    with without_understudy():
        assert close(logits(full, model_type), got)
        with pytest.raises((RuntimeError, ValueError, KeyError, AttributeError)):
            load(out, model_type)
    assert not close(logits(source.folder, model_type), got)


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_vl_moe"])
def test_a_residual_of_full_rank_is_the_original(model_type: str, sources: Callable[[str], SimpleNamespace]) -> None:
    source = sources(model_type)
    layer = source.stats.model.layers[source.first]
    plan = having(source.plan, {"rank": min(layer.hidden, layer.width), "start": "residual"})
    out = apply(source.folder, plan, source.root / "full-rank", stats=source.stats).folder
    assert close(logits(out, model_type), logits(source.folder, model_type))


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "qwen3_vl_moe"])
def test_materialised_bases(model_type: str, sources: Callable[[str], SimpleNamespace]) -> None:
    source = sources(model_type)
    out, full = source.root / "shared", source.root / "shared-full"
    apply(source.folder, source.plan, out, stats=source.stats)
    apply(source.folder, source.plan, full, stats=source.stats, materialise=True)
    expected = logits(out, model_type)
    with without_understudy():
        assert close(logits(full, model_type), expected)
    assert not close(logits(source.folder, model_type), expected)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h"])
def test_trained_numbers_are_saved_and_loaded(model_type: str, sources: Callable[[str], SimpleNamespace]) -> None:
    source = sources(model_type)
    out, trained = source.root / "start", source.root / "trained"
    apply(source.folder, source.plan, out, stats=source.stats)
    model = load(out, model_type)
    for module in model.modules():
        if isinstance(module, StandInExperts):
            randomise(module)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    model.save_pretrained(trained)
    assert tensors_of(trained).keys() == tensors_of(out).keys()
    assert torch.equal(logits(trained, model_type), expected)
    assert not close(logits(out, model_type), expected)
    assert close(walked(Skeleton(trained), IDS), expected)


def test_in_bfloat16(tmp_path: Path) -> None:
    folder = small.model_folder(tmp_path / "source", "gpt_oss", torch.bfloat16)
    stats = calibrated(folder, tmp_path / "work", IDS)
    plan = plan_of(stats, {"1": {"shared_base": [[5, 0, 2]]}})
    for name, one in (("shared", plan), ("thin", without_base(plan)), ("near", having(plan, BEST["residual"]))):
        out = apply(folder, one, tmp_path / name, stats=stats).folder
        assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "nemotron_h"])
def test_parameters_by_hand(model_type: str, sources: Callable[[str], SimpleNamespace]) -> None:
    source, H = sources(model_type), zoo.HIDDEN
    layers = source.stats.model.layers
    facts = layers[source.first]
    of_expert, width = facts.expert_params, facts.width
    matrices = 2 if model_type == "nemotron_h" else 3
    assert of_expert == matrices * H * width + (2 * width + H if model_type == "gpt_oss" else 0)
    thin = matrices * 4 * (H + width)
    whole = count_params(Skeleton(source.folder), {})
    means = np.array([0.5, 0.1, 0.2, 0.3, 0.1, 0.4, 0.15, 0.25])
    for plan, base in ((source.plan, of_expert), (without_base(source.plan), 0)):
        got = count_params(planned(Skeleton(source.folder), plan, source.stats), {source.first: means})
        bases = 3 if base else 0
        saved = 6 * (of_expert - thin) - bases * of_expert
        assert got["total"] == whole["total"] - saved
        assert got["routed"] == whole["routed"] - saved
        replaced = means[[0, 2, 5, 7]].sum()
        first = means.sum() * of_expert - replaced * (of_expert - base - thin)
        last = zoo.TOP_K / 8 * (6 * of_expert + 2 * (base + thin))
        assert got["active"] == round(whole["active"] - 2 * zoo.TOP_K * of_expert + first + last)


def shared(**numbers: Any) -> dict[str, Any]:
    return {"format": "shared-v1", **numbers}


BAD = {
    "no rank": ({"0": shared(into=0)}, "not a form of stand-in"),
    "rank 0": ({"0": shared(into=0, rank=0)}, "not a form of stand-in"),
    "a rank in words": ({"0": shared(into=0, rank="four")}, "rank of a shared-v1 is a whole number, not 'four'"),
    "a width": ({"0": shared(into=0, rank=4, width=3)}, "not a form of stand-in"),
    "a rank of another form": ({"0": {"format": "absent-v1", "rank": 4}}, "not a form of stand-in"),
    "two ranks": ({"0": shared(into=0, rank=4), "1": shared(into=1, rank=8)}, "have ranks 4 and 8"),
    "two ranks in a group": ({"0": shared(into=0, rank=4), "1": shared(into=0, rank=8)}, "have ranks 4 and 8"),
    "into a kept one": ({"0": shared(into=1, rank=4)}, "expert 0 shares a base with 1, which is not a member"),
    "into nobody": ({"0": shared(into=9, rank=4)}, "expert 0 shares a base with 9, which is not a member"),
    "into another form": (
        {"0": shared(into=1, rank=4), "1": {"format": "absent-v1"}},
        "expert 0 shares a base with 1, which is not a member of that group",
    ),
    "into another group": (
        {"0": shared(into=1, rank=4), "1": shared(into=2, rank=4), "2": shared(into=2, rank=4)},
        "expert 0 shares a base with 1, which is not a member of that group",
    ),
    "merged into one": (
        {"0": {"format": "merged-v1", "into": 1}, "1": shared(into=1, rank=4)},
        "expert 0 is merged into 1, which is not a merged expert",
    ),
    "some without": ({"0": shared(into=0, rank=4), "1": shared(rank=4)}, "share a base and others have none"),
    "all": ({str(e): shared(into=0, rank=4) for e in range(8)}, "no expert keeps any weights of its own"),
    "one too many": ({"8": shared(into=8, rank=4)}, "expert 8 is not one of the 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_declarations(case: str, sources: Callable[[str], SimpleNamespace], tmp_path: Path) -> None:
    source, (replacements, message) = sources("olmoe"), BAD[case]
    config = json.loads((source.folder / "config.json").read_text())
    config["compression_config"] = declaration(source.stats.model.layers[source.first].name, replacements)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.folder.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "config.json").unlink()
    (broken / "config.json").write_text(json.dumps(config))
    for opened in (lambda: load(broken, "olmoe"), lambda: Skeleton(broken)):
        with pytest.raises(CheckpointError, match=message) as caught:
            opened()
        assert "\n" not in str(caught.value)


def declaration(module: str, replacements: dict[str, Any]) -> dict[str, Any]:
    target = {"weight_layout": "compact_retained_experts", "replacements": copy.deepcopy(replacements)}
    substitution = {"version": 1, "router_semantics": ROUTER_SEMANTICS, "targets": {module: target}}
    return {"transform_config": {"expert_substitution": substitution}}
