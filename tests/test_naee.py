"""NAEE: the loss of every subset is that of a block built with fewer experts, and the best subset is chosen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import zoo
from contract import ids_of, tiny_folder
from understudy.data import Blocks
from understudy.errors import PlanError
from understudy.layout import model_facts
from understudy.moe import expert_dim
from understudy.recipe import Calibration, Selection
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import collect
from understudy.stages.select import make_plan
from understudy.stats import Stats

FAMILIES = ["mixtral", "olmoe", "qwen3_moe", "lfm2_moe", "gpt_oss"]


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Stats]:
    folder = tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    skeleton, ids = Skeleton(folder), ids_of().numpy().astype(np.int32)
    blocks = Blocks(ids, np.zeros(len(ids), np.int16), ("test",), (), "0" * 64)
    facts, settings = model_facts(skeleton, folder.name), Calibration(batch_size=2, collect=("subsets",))
    layers, probes = collect(skeleton, facts, blocks, settings, tmp_path_factory.mktemp("work"))
    return request.param, Stats(facts, {}, layers, probes)


def smaller_block(model_type: str, key: str, stats: Stats, kept: list[int]) -> torch.nn.Module:
    """The block of a model that was built with fewer experts, with the rows of those that stay."""
    whole = zoo.tiny_model(model_type)
    config = type(whole.config).from_dict(whole.config.to_dict())
    E = stats.model.layers[key].experts
    for name in ("num_experts", "num_local_experts"):
        if getattr(config, name, None) == E:
            setattr(config, name, len(kept))
    small = type(whole)(config)
    block = stats.model.layers[key].name.rpartition(".")[0]
    mine, theirs = small.get_submodule(block), whole.get_submodule(block).state_dict()
    rows = torch.tensor(kept)
    mine.load_state_dict(
        {
            name: x.index_select(expert_dim(tuple(x.shape), E), rows) if x.shape != y.shape else x
            for (name, x), y in zip(theirs.items(), mine.state_dict().values(), strict=True)
        }
    )
    return mine.eval()


def test_losses_are_those_of_smaller_blocks(measured: tuple[str, Stats]) -> None:
    family, stats = measured
    key, layer = next(iter(stats.model.layers.items()))
    model = zoo.tiny_model(family).eval()
    block = model.get_submodule(layer.name.rpartition(".")[0])
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = ids_of()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hidden = seen[0]
    loss = np.asarray(stats.layers[key].subset_loss)
    assert loss.shape == (1 << layer.experts,)
    for size in (layer.top_k, layer.experts - 1):
        for kept in list(itertools.combinations(range(layer.experts), size))[::5]:
            small = smaller_block(family, key, stats, list(kept))
            with torch.no_grad():
                a, b = block(hidden), small(hidden)
            a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
            expected = sum(float(torch.linalg.norm((x - y).double())) for x, y in zip(a, b, strict=True))
            assert loss[sum(1 << e for e in kept)] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert loss[-1] == pytest.approx(0, abs=1e-5)
    assert np.isinf(loss[1])


def test_the_best_subset_stays(measured: tuple[str, Stats]) -> None:
    _, stats = measured
    plan = make_plan(stats, Selection(method="naee", ratio=0.5)).plan
    for key, layer in stats.model.layers.items():
        loss = np.asarray(stats.layers[key].subset_loss)
        sizes = [sum(1 << e for e in kept) for kept in itertools.combinations(range(layer.experts), layer.experts // 2)]
        kept = sum(1 << e for e in plan.kept(key, layer.experts))
        assert loss[kept] == min(loss[mask] for mask in sizes)
    with pytest.raises(PlanError, match=r"naee cannot leave 1 of 8 experts where a token uses"):
        make_plan(stats, Selection(method="naee", ratio=0.9))
