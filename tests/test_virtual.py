"""A plan's model without writing it: the same bits as the folder that apply writes, one layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import small
import zoo
from contract import (
    calibrated,
    close,
    collected_for_kinds,
    ids_of,
    load,
    plan_of,
    random_plan,
    tensors_of,
    walked,
    without_understudy,
)
from mixture import INTO, Mixture, registered
from understudy.activations import ActivationStore
from understudy.cli import app
from understudy.errors import PlanError
from understudy.kinds import get_kind
from understudy.plans import Plan
from understudy.shards import Lazy
from understudy.sizes import RouteCounter, count_params
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.stats import Stats
from understudy.virtual import outcome, planned
from understudy.walk import Walk

pytestmark = pytest.mark.usefixtures("mixture_is_known")
FAMILIES = ["olmoe", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss"]
IDS = ids_of()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """A tiny folder of a family with its statistics, made when it is first asked for."""

    @functools.cache
    def made(model_type: str) -> SimpleNamespace:
        root = tmp_path_factory.mktemp(model_type)
        folder = small.model_folder(root / "source", model_type)
        stats = calibrated(folder, root / "work", IDS, extra=collected_for_kinds())
        return SimpleNamespace(root=root, folder=folder, stats=stats, model_type=model_type)

    return made


@pytest.fixture
def source(request: pytest.FixtureRequest, sources: Callable[[str], SimpleNamespace]) -> SimpleNamespace:
    return sources(getattr(request, "param", "olmoe"))


@pytest.fixture
def mixture_is_known() -> Iterator[None]:
    with registered():
        yield


def plan_for(kind: str, stats: Stats) -> Plan:
    """A random plan; of the mixture, one with every form and one without an expert of full width, in turn."""
    if kind != "mixture":
        return random_plan(get_kind(kind), stats)
    mixed = {0: 0, 1: INTO + 6, 2: 11, 3: 6, 4: 1, 6: INTO + 6}
    narrow = {e: 8 if e % 2 else 5 for e in range(zoo.EXPERTS)}
    return plan_of(stats, {k: {kind: narrow if n % 2 else mixed} for n, k in enumerate(stats.model.layers)})


@pytest.mark.parametrize("kind", ["drop", "constant", "merge", "slim", "mixture", "nothing"])
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_the_same_bits_as_the_folder(kind: str, source: SimpleNamespace) -> None:
    plan = plan_of(source.stats, {}) if kind == "nothing" else plan_for(kind, source.stats)
    original = Skeleton(source.folder)
    virtual = planned(original, plan, source.stats)
    out = apply(source.folder, plan, source.root / kind, stats=source.stats).folder
    written = Skeleton(out)
    assert virtual.checkpoint.nbytes == written.checkpoint.nbytes
    assert virtual.checkpoint.config == written.checkpoint.config
    assert {n: (e.dtype, e.shape) for n, e in virtual.checkpoint.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in written.checkpoint.entries.items()
    }
    for name in written.checkpoint.entries:
        assert torch.equal(virtual.checkpoint.read(name), written.checkpoint.read(name)), name
    assert torch.equal(walked(virtual, IDS), walked(written, IDS))
    assert all(p.is_meta for model in (virtual.model, original.model) for p in model.parameters())
    assert torch.equal(walked(virtual, IDS), walked(original, IDS)) == (kind == "nothing")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_weights_are_computed_in_the_dtype_of_the_checkpoint(dtype: str, tmp_path: Path) -> None:
    folder = small.model_folder(tmp_path / "source", "olmoe", torch.bfloat16)
    stats = calibrated(folder, tmp_path / "work", IDS, extra=collected_for_kinds())
    plan = random_plan(get_kind("merge"), stats)
    out = apply(folder, plan, tmp_path / "out", stats=stats).folder
    virtual = planned(Skeleton(folder, dtype=dtype), plan, stats)
    assert torch.equal(walked(virtual, IDS), walked(Skeleton(out, dtype=dtype), IDS))
    assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}


def test_one_layer_at_a_time(source: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights are computed once for each layer on the way to disk, and none are kept in the end."""
    computed: list[str] = []
    own = Mixture.fill

    def fill(self: Any, made: Any, *args: Any) -> None:
        computed.append(str(len(made.kept)))
        own(self, made, *args)

    monkeypatch.setattr(Mixture, "fill", fill)
    plan = plan_for("mixture", source.stats)
    apply(source.folder, plan, source.root / "counted", stats=source.stats)
    assert len(computed) == len(plan.layers)
    found = outcome(Skeleton(source.folder), plan, source.stats)
    lazy = [part for piece in found.pieces for part in piece.parts if isinstance(part, Lazy)]
    assert lazy[0].read() == lazy[0].read()
    assert found.workshop._held is not None
    found.workshop.release()
    assert found.workshop._held is None


def test_a_layer_that_somebody_holds_stays_theirs(source: SimpleNamespace) -> None:
    original, plan = Skeleton(source.folder), plan_for("mixture", source.stats)
    expected = walked(planned(Skeleton(source.folder), plan, source.stats), IDS)
    virtual = planned(original, plan, source.stats)
    layer = original.layers[0]
    with original.resident(layer.index):
        with virtual.resident(layer.index):
            pass
        assert not original.model.get_submodule(layer.name).down_proj.is_meta
    assert torch.equal(walked(virtual, IDS), expected)


ORDINARY = {"merge": None, "slim": None, "mixture": {0: INTO + 6, 6: INTO + 6, 2: 10, 4: 1, 5: 4}}


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("source", ["olmoe", "gpt_oss"], indirect=True)
def test_materialise_writes_an_ordinary_folder(kind: str, source: SimpleNamespace) -> None:
    entry = ORDINARY[kind]
    plan = plan_for(kind, source.stats)
    if kind == "slim":  # a bias that is left of an expert without neurons is a vector
        rows = {key: {"slim": {e: max(n, 2) for e, n in kinds["slim"].items()}} for key, kinds in plan.layers.items()}
        plan = plan_of(source.stats, rows)
    if entry is not None:
        plan = plan_of(source.stats, {key: {kind: entry} for key in source.stats.model.layers})
    out = source.root / f"full-{kind}"
    applied = apply(source.folder, plan, out, stats=source.stats, materialise=True)
    assert applied.at_full_size
    assert applied.nbytes == applied.source_nbytes
    assert applied.loads == "stock transformers and vLLM"
    assert (out / "config.json").read_text() == (source.folder / "config.json").read_text()
    with without_understudy(), torch.no_grad():
        got = load(out, source.model_type)(input_ids=IDS, use_cache=False).logits
    assert close(got, walked(planned(Skeleton(source.folder), plan, source.stats), IDS))
    assert not close(got, walked(Skeleton(source.folder), IDS))


def test_a_vector_is_no_ordinary_expert(source: SimpleNamespace) -> None:
    plan, out = plan_for("constant", source.stats), source.root / "no"
    message = r"layer 0: expert \d becomes a vector, which no expert of the family can be; leave out --materialise"
    with pytest.raises(PlanError, match=message):
        apply(source.folder, plan, out, stats=source.stats, materialise=True)
    assert not out.exists()
    applied = apply(source.folder, plan_of(source.stats, {}), out, materialise=True)
    assert not applied.at_full_size


def test_parameters_by_hand(tmp_path: Path) -> None:
    folder = small.model_folder(tmp_path / "source", "gpt_oss")
    stats = calibrated(folder, tmp_path / "work", IDS)
    plan = plan_of(stats, {"1": {"mixture": {0: 0, 1: INTO + 6, 6: INTO + 6, 2: 9, 3: 4, 4: 1}}})
    with registered():
        virtual = planned(Skeleton(folder), plan, stats)
        walk = Walk(virtual, IDS.numpy(), batch_size=2, store=ActivationStore(1 << 30))
        counter = RouteCounter(virtual)
        with walk.ready():
            walk.through_layers(counter.observe)
    means = counter.means()["1"]
    H, width = zoo.HIDDEN, stats.model.layers["1"].width or 0
    of_neuron, of_expert = 3 * H + 2, stats.model.layers["1"].expert_params
    assert of_expert == width * of_neuron + H
    params = {0: H, 1: of_expert, 2: 9 * of_neuron + 2 * H, 3: 4 * of_neuron + H, 4: 0, 5: of_expert, 6: of_expert}
    params[7] = of_expert
    got = count_params(virtual, counter.means())
    others = (len(virtual.layers) - 1) * zoo.TOP_K * of_expert
    outside = got["total"] - got["routed"]
    stored = (len(virtual.layers) - 1) * zoo.EXPERTS * of_expert + sum(params.values()) - params[1]
    assert got["routed"] == stored
    assert got["active"] == round(outside + others + sum(means[e] * n for e, n in params.items()))
    assert means.sum() < zoo.TOP_K, "some token chose both of the merged experts"


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small.model_folder(tmp_path / "source", "olmoe")
    stats = calibrated(folder, tmp_path / "work", IDS)
    plan = plan_of(stats, {"1": {"merge": [[0, 1]]}}).save(tmp_path / "plan.yaml")
    saved = stats.save(tmp_path / "stats.safetensors")
    arguments = ["apply", str(folder), str(plan), "--stats", str(saved), "--json"]
    for more, note in (
        (["--out", str(tmp_path / "a")], False),
        (["--out", str(tmp_path / "b"), "--materialise"], True),
    ):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 0, result.output
        assert ("nothing is saved" in result.output) == note
