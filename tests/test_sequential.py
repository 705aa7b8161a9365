"""Sequential calibration: each layer is summed up behind the layers before it as they will be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import understudy
from understudy.errors import PlanError
from understudy.recipe import Selection
from understudy.skeleton import Skeleton
from understudy.stages.select import make_plan
from understudy.stats import Stats, load_stats
from understudy.virtual import planned

DEMO = Path(__file__).parents[1] / "examples" / "demo"
TEXT = {"data": (f"{DEMO}/train/math.jsonl.xz",), "samples": 4, "seq_len": 64, "batch_size": 2}


def sequential(out: Path, method: str, ratio: float = 0.5) -> Stats:
    return understudy.calibrate(DEMO / "model", out, sequential=method, sequential_ratio=ratio, **TEXT)


@pytest.mark.parametrize("method", ["ream", "camera"])
def test_a_layer_is_calibrated_behind_the_compressed_ones(tmp_path: Path, method: str) -> None:
    """The slow way: decide on layer after layer, each time calibrating the model as decided so far."""
    found = sequential(tmp_path / "stats.safetensors", method)
    plan = make_plan(found, Selection(method=method, ratio=0.5)).plan
    source = Skeleton(DEMO / "model")
    keys = list(found.layers)
    for done, key in enumerate(keys[1:3], start=1):
        before = plan.model_copy(update={"layers": {k: plan.layers[k] for k in keys[:done]}})
        smaller = planned(source, before, found)
        here = _statistics(smaller, key, tmp_path)
        for name in ("count", "gate_sum", "norm_sum"):
            np.testing.assert_allclose(getattr(found.layers[key], name), getattr(here, name), rtol=1e-5, err_msg=name)


def _statistics(smaller: Skeleton, key: str, folder: Path) -> Any:
    from understudy.collection import collect
    from understudy.data import token_blocks
    from understudy.layout import model_facts
    from understudy.recipe import Calibration
    from understudy.tokens import load_tokenizer

    facts = model_facts(Skeleton(DEMO / "model"), "demo")
    text = {name: TEXT[name] for name in ("samples", "seq_len")}
    blocks = token_blocks(TEXT["data"], load_tokenizer(DEMO / "model", False), seed=0, **text)
    watched = [layer for layer in smaller.layers if layer.key == key]
    smaller.layers = watched
    layers, _ = collect(smaller, facts, blocks, Calibration(batch_size=2), folder / f"work-{key}")
    return layers[key]


def test_the_first_layer_is_as_ever_and_later_ones_are_not(tmp_path: Path) -> None:
    found = sequential(tmp_path / "a.safetensors", "camera", 0.75)
    plain = understudy.calibrate(DEMO / "model", tmp_path / "b.safetensors", **TEXT)
    first, *others = found.layers
    np.testing.assert_array_equal(found.layers[first].count, plain.layers[first].count)
    assert any(not np.array_equal(found.layers[key].count, plain.layers[key].count) for key in others)
    assert load_stats(tmp_path / "a.safetensors").data["sequential"] == "camera at 0.75"


def test_what_has_no_effect_or_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--sequential-ratio has no effect without --sequential"):
        understudy.calibrate(DEMO / "model", tmp_path / "x", sequential_ratio=0.5, **TEXT)
    with pytest.raises(PlanError, match="gradients are of the whole model"):
        sequential(tmp_path / "x", "heapr")
    with pytest.raises(PlanError, match="it cannot be made layer by layer"):
        sequential(tmp_path / "x", "reap")
    with pytest.raises(PlanError, match="did you mean 'ream'"):
        sequential(tmp_path / "x", "reamm")
    with pytest.raises(PlanError, match="--sequential needs --sequential-ratio, more than 0 and less than 1"):
        sequential(tmp_path / "x", "ream", 1.5)
    assert not (tmp_path / "x").exists()
