"""Budgets of the whole model: a share of its parameters, for every method, and where parameters differ in bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from routes import draw_routes, stats_of
from test_select import everything, fitting
from understudy.budgets import in_parameters, target_of
from understudy.errors import PlanError
from understudy.facts import DenseLayers
from understudy.kinds import added_bytes
from understudy.methods import Method, all_methods
from understudy.recipe import Selection
from understudy.stages.select import make_plan
from understudy.stats import Stats


@pytest.mark.parametrize("method", [m for m in all_methods().values() if m.shrinks], ids=lambda m: m.name)
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_every_method_removes_a_share_of_the_parameters(method: Method, share: float) -> None:
    """Where every parameter has two bytes, that is a size."""
    stats = everything()
    assert stats.model.nbytes == 2 * stats.model.params
    result = make_plan(stats, fitting(method, model_ratio=share))
    assert result.expected_bytes <= (1 - share) * stats.model.nbytes
    size = 2 * math.floor((1 - share) * stats.model.params)
    assert result.plan.layers == make_plan(stats, fitting(method, size=str(size))).plan.layers
    assert result.plan.recipe["model_ratio"] == share


def of_two_dtypes() -> Stats:
    """Experts of one byte a parameter, in a model of four bytes a parameter."""
    sizes: dict[str, Any] = {"expert_params": 288, "expert_bytes": 288, "width": 16, "channel_bytes": 18}
    more = {"element_bytes": 1, "router_row_bytes": 24, "block_bytes": 8 * 288 + 400, "decoder_bytes": 8 * 288 + 800}
    stats = stats_of({key: draw_routes(seed=int(key)) for key in "012"}, **sizes, **more)
    nbytes = stats.model.routed_bytes + 5000
    return replace(
        stats,
        model=stats.model.model_copy(update={"nbytes": nbytes, "params": 3 * 8 * 288 + 1250, "unloaded_bytes": 8}),
    )


def test_parameters_are_counted_and_not_bytes() -> None:
    stats = of_two_dtypes()
    counting = in_parameters(stats.model)
    assert (counting.nbytes, counting.params, counting.unloaded_bytes) == (8162, 8162, 2)
    layer = counting.layers["1"]
    assert (layer.expert_bytes, layer.channel_bytes, layer.element_bytes, layer.router_row_bytes) == (288, 18, 1, 6)
    assert (layer.block_bytes, layer.decoder_bytes) == (8 * 288 + 100, 8 * 288 + 200)
    for method, gone in (("mone", 288 - 6), ("reap", 288 + 6)):  # a constant of 6, or the row of the router as well
        layers = make_plan(stats, Selection(method=method, model_ratio=0.3)).plan.layers
        lost = sum(len(ids) for kinds in layers.values() for ids in kinds.values())
        assert lost == math.ceil(0.3 * 8162 / (3 * gone)) * 3  # the same from each of three layers
        assert -added_bytes(layers, counting, {}) == lost * gone
        assert lost != math.ceil(0.3 * stats.model.nbytes / (3 * gone)) * 3


def test_what_cannot_be_met_names_what_can() -> None:
    stats = of_two_dtypes()
    for method in ("mone", "heapr_freq", "mc_smoe"):
        stats_of_all = everything()
        with pytest.raises(
            PlanError, match=r"^model ratio 0\.95 is out of reach: .* removes 0\.\d{6} of the para"
        ) as e:
            make_plan(stats_of_all, fitting(all_methods()[method], model_ratio=0.95))
        best = float(str(e.value).split("removes ")[1].split()[0])
        assert make_plan(stats_of_all, fitting(all_methods()[method], model_ratio=best)).plan.layers
    with pytest.raises(PlanError, match=r"^model ratio 0\.2 is out of reach: every MoE layer is to stay as it is"):
        make_plan(stats, Selection(model_ratio=0.2, keep_layers="0-2"))
    result = make_plan(stats, Selection(model_ratio=0))
    assert (result.plan.layers, result.notes) == ({}, ("nothing to replace: model ratio 0 removes no parameter",))
    assert target_of(Selection(ratio=0.5), stats.model) is None


def test_every_size_in_bytes_is_counted_in_parameters() -> None:
    """A new size of the facts has to be thought of: here every one of them is two bytes a parameter."""
    stats = everything()
    dense = DenseLayers(setting="a", first=True, width_setting="b", widths={0: 3}, neuron_bytes=36)
    layers = {key: layer.model_copy(update={"router_bytes": 80}) for key, layer in stats.model.layers.items()}
    facts = stats.model.model_copy(update={"dense": dense, "layers": layers, "unloaded_bytes": 100})
    counting = in_parameters(facts)
    assert counting.dense is not None
    pairs = [(facts, counting), (dense, counting.dense), *zip(layers.values(), counting.layers.values(), strict=True)]
    for before, after in pairs:
        for name in type(before).model_fields:
            if name.endswith("bytes"):
                assert getattr(before, name) == 2 * getattr(after, name) > 0, name
