"""Applying a plan: what is kept is kept byte for byte, what is written loads as promised, and damage never gets out."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import small
import zoo
from contract import calibrated, masked, plan_of, tensors_of
from understudy.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from understudy.errors import CheckpointError, NumericError, OutputError, PlanError, StatsError, UnderstudyError
from understudy.held import held
from understudy.moe import expert_dim
from understudy.plans import Plan
from understudy.skeleton import Skeleton
from understudy.stages import apply as stage
from understudy.stages.apply import apply
from understudy.stats import ExpertStats, Stats

IDS = torch.randint(4, zoo.VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
COUNT_KEY = {
    "olmoe": "num_experts",
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "deepseek_v3": "n_routed_experts",  # in two groups
    "gpt_oss": "num_local_experts",  # biased and stacked
}
# What is loaded where understudy is not installed: logits of ordinary folders, and what becomes of the others.
STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
found = {}
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            found[folder] = model(input_ids=ids).logits
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
assert not any(name.startswith("understudy") for name in sys.modules)
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """For each family: source, statistics, and a folder of either kind with its plan."""
    found = {}
    for model_type in COUNT_KEY:
        root = tmp_path_factory.mktemp(model_type)
        source = small.model_folder(root / "source", model_type)
        stats = calibrated(source, root / "work", IDS)
        rng = np.random.default_rng(0)
        drop, constant = {}, {}
        for position, key in enumerate(stats.model.layers):
            half = zoo.EXPERTS // 2
            drop[key] = {"drop": [int(rng.integers(half)), half + int(rng.integers(half))]}  # one from each group
            constant[key] = {"constant": rng.choice(zoo.EXPERTS, 2 + position, replace=False).tolist()}
        plans = {"drop": plan_of(stats, drop), "constant": plan_of(stats, constant)}
        folders = {kind: apply(source, plan, root / kind, stats=stats).folder for kind, plan in plans.items()}
        found[model_type] = SimpleNamespace(source=source, stats=stats, plans=plans, **folders)
    return found


@pytest.fixture(scope="module")
def strangers(made: dict[str, SimpleNamespace], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without understudy makes of every folder."""
    folders = [str(folder) for one in made.values() for folder in (one.drop, one.constant)]
    cwd = tmp_path_factory.mktemp("stranger")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, json.dumps(IDS.tolist()), *folders]
    subprocess.run(command, check=True, cwd=cwd, env=environment, capture_output=True, timeout=300)
    return dict(torch.load(cwd / "found.pt"))


@pytest.fixture
def olmoe(made: dict[str, SimpleNamespace]) -> SimpleNamespace:
    return made["olmoe"]


def sliced(source: Path, plan: Plan, model_type: str) -> Any:
    """A model of the smaller config with the rows of kept experts, made in memory."""
    whole = zoo.model_class(model_type).from_pretrained(source)
    state = whole.state_dict()
    for layer in Skeleton(source).layers:
        kept = torch.tensor(plan.kept(layer.key, layer.num_experts))
        for name in [n for n in state if n.startswith(layer.name + ".")]:
            state[name] = state[name][kept]
        for name in layer.router:
            state[name] = state[name].index_select(expert_dim(state[name].shape, layer.num_experts), kept)
    config = copy.deepcopy(whole.config)
    setattr(config, COUNT_KEY[model_type], len(kept))
    model = type(whole)(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("model_type", COUNT_KEY)
def test_dropping_gives_an_ordinary_folder(
    model_type: str, made: dict[str, SimpleNamespace], strangers: dict[str, Any]
) -> None:
    one = made[model_type]
    got = strangers[str(one.drop)]
    assert isinstance(got, torch.Tensor), got
    with torch.no_grad():
        expected = sliced(one.source, one.plans["drop"], model_type)(input_ids=IDS).logits
    assert torch.equal(got, expected)
    config, before = (json.loads((f / "config.json").read_text()) for f in (one.drop, one.source))
    changed = {k: (before[k], config[k]) for k in before if config[k] != before[k]}
    assert list(changed.values()) == [(zoo.EXPERTS, zoo.EXPERTS - 2)]
    assert set(changed) < {"num_experts", "num_local_experts", "n_routed_experts"}
    assert set(config) == set(before)


@pytest.mark.parametrize("model_type", COUNT_KEY)
def test_constants_need_understudy(
    model_type: str, made: dict[str, SimpleNamespace], strangers: dict[str, Any]
) -> None:
    one = made[model_type]
    found = strangers[str(one.constant)]
    assert isinstance(found, str), "a stranger got logits from it"
    assert found.startswith(("RuntimeError", "ValueError")), found
    whole = zoo.model_class(model_type).from_pretrained(one.source).eval()
    with torch.no_grad(), masked(whole, one.plans["constant"], one.stats):
        expected = whole(input_ids=IDS).logits
    for experts in ("eager", "batched_mm", "grouped_mm"):
        model = AutoModelForCausalLM.from_pretrained(one.constant, experts_implementation=experts).eval()
        with torch.no_grad():
            got = model(input_ids=IDS).logits
        assert float((got - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max())), experts
    config, before = (json.loads((f / "config.json").read_text()) for f in (one.constant, one.source))
    assert config.pop("compression_config")
    assert config == before


def test_the_number_of_experts_under_an_older_name(made: dict[str, SimpleNamespace], tmp_path: Path) -> None:
    """Configs on the hub say num_experts where today's transformers saves num_local_experts."""
    one = made["qwen3_moe"]
    source = Path(shutil.copytree(one.source, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (source / "config.json").write_text(json.dumps(config))
    out = apply(source, one.plans["drop"], tmp_path / "out").folder
    assert json.loads((out / "config.json").read_text()) == config | {"num_experts": zoo.EXPERTS - 2}
    models = [AutoModelForCausalLM.from_pretrained(f).eval() for f in (out, one.drop)]
    with torch.no_grad():
        a, b = (model(input_ids=IDS).logits for model in models)
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["drop", "constant"])
@pytest.mark.parametrize("model_type", COUNT_KEY)
def test_what_is_kept_is_kept_byte_for_byte(model_type: str, kind: str, made: dict[str, SimpleNamespace]) -> None:
    one = made[model_type]
    written, source = (raw_tensors(f) for f in (getattr(one, kind), one.source))
    expected = {}
    for name, tensor in source.items():
        key = found[1] if (found := re.search(r"layers\.(\d+)\.", name)) else ""
        kept = one.plans[kind].kept(key, zoo.EXPERTS)  # all of them in a dense layer
        rows = r"experts\." if kind == "constant" else r"experts\.|gate\.|router\."
        of_all = tensor.shape[0] == zoo.EXPERTS and re.search(rows, name)
        if single := re.search(r"(?<=\.experts\.)\d+(?=\.)", name):
            if (old := int(single[0])) in kept:
                new = kept.index(old) if kind == "drop" else old
                expected[f"{name[: single.start()]}{new}{name[single.end() :]}"] = tensor
        else:
            expected[name] = tensor[list(kept)] if of_all and key in one.stats.layers else tensor
    added = set(written) - set(expected)
    assert all(re.search(r"novices\.\d+\.approx_value$|constants", name) for name in added)
    assert bool(added) == (kind == "constant")
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


def raw_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, as the bytes of their elements where those are floats."""
    return {k: v.view(torch.int32) if v.dtype == torch.float32 else v for k, v in tensors_of(folder).items()}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_bfloat16_constants_are_of_the_dtype_of_the_experts(model_type: str, tmp_path: Path) -> None:
    source = small.model_folder(tmp_path / "source", model_type, torch.bfloat16)
    stats = calibrated(source, tmp_path / "work", IDS)
    plan = plan_of(stats, {"0": {"constant": [1, 2]}, "3": {"constant": [7]}})
    out = apply(source, plan, tmp_path / "out", stats=stats).folder
    assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}
    experts = AutoModelForCausalLM.from_pretrained(out, dtype="auto").get_submodule(stats.model.layers["3"].name)
    expected = torch.from_numpy(stats.layers["3"].mean[[7]].astype(np.float32)).bfloat16()
    assert torch.equal(experts.constants, expected)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_replacing_nothing_changes_nothing(model_type: str, made: dict[str, SimpleNamespace], tmp_path: Path) -> None:
    one = made[model_type]
    applied = apply(one.source, plan_of(one.stats, {}), tmp_path / "out")
    assert applied.nbytes == applied.source_nbytes
    before, after = raw_tensors(one.source), raw_tensors(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((f / "config.json").read_text()) for f in (one.source, tmp_path / "out"))
    assert before == after
    a, b = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (one.source, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(a(input_ids=IDS).logits, b(input_ids=IDS).logits)


def test_many_small_shards(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    out, limit = tmp_path / "out", 20_000
    apply(olmoe.source, olmoe.plans["constant"], out, stats=olmoe.stats, max_shard_size="20KB")
    index = json.loads((out / INDEX).read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 10
    found = {}
    for number, path in enumerate(files, start=1):
        assert path.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = load_file(path)
        found.update(dict.fromkeys(tensors, path.name))
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    small_, large = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (out, olmoe.constant))
    with torch.no_grad():
        assert torch.equal(small_(input_ids=IDS).logits, large(input_ids=IDS).logits)
    assert (olmoe.constant / SINGLE).exists()
    assert not (olmoe.constant / INDEX).exists()
    with pytest.raises(UnderstudyError, match="'huge' is not a size"):
        apply(olmoe.source, olmoe.plans["constant"], tmp_path / "no", stats=olmoe.stats, max_shard_size="huge")


def test_other_files_come_along(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    source = Path(shutil.copytree(olmoe.source, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    for name in ("LICENSE", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (source / name).write_text(name)
    (source / "README.md").write_text("the card of the original")
    out = tmp_path / "out"
    apply(source, olmoe.plans["constant"], out, stats=olmoe.stats)
    before, after = small.hashes(source), small.hashes(out)
    carried = {name for name in before if name in after and before[name] == after[name]}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert carried == {"LICENSE", "generation_config.json"} | tokenizer | templates
    assert AutoTokenizer.from_pretrained(out)("w10 w11")["input_ids"] == [10, 11]
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == 2
    assert {p.name for p in (out / "understudy").iterdir()} == {"plan.yaml", "provenance.json"}


def test_the_plan_is_kept_as_a_person_wrote_it(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    path = olmoe.plans["drop"].save(tmp_path / "plan.yaml")
    path.write_text("# my own remark\n" + path.read_text())
    stats = olmoe.stats.save(tmp_path / "stats.safetensors")
    out = apply(str(olmoe.source), str(path), str(tmp_path / "out"), stats=str(stats)).folder
    assert (out / "understudy" / "plan.yaml").read_bytes() == path.read_bytes()
    note = json.loads((out / "understudy" / "provenance.json").read_text())
    assert set(note["parents"]) == {"plan", "stats"}
    assert raw_tensors(out).keys() == raw_tensors(olmoe.drop).keys()


@contextmanager
def refused(error: type[Exception], message: str, out: Path) -> Iterator[None]:
    """One line, and nothing new in the folder where the output would have been."""
    before = {p.name for p in out.parent.iterdir()} if out.parent.is_dir() else set()
    with pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert "partial" not in str(caught.value)
    assert before == ({p.name for p in out.parent.iterdir()} if out.parent.is_dir() else set())


def test_what_does_not_belong_together(made: dict[str, SimpleNamespace], tmp_path: Path) -> None:
    olmoe, out = made["olmoe"], tmp_path / "out"
    other = small.model_folder(tmp_path / "other", seed=1)
    with refused(PlanError, r"the plan was made for source \(.*\), not for .*other", out):
        apply(other, olmoe.plans["drop"], out)
    stats = calibrated(other, tmp_path / "work", IDS)
    with refused(StatsError, r"these statistics are of other \(\w+\), the model is .*source \(\w+\); calibrate", out):
        apply(olmoe.source, olmoe.plans["constant"], out, stats=stats)
    with refused(StatsError, "the plan has constant, made of statistics; give --stats", out):
        apply(olmoe.source, olmoe.plans["constant"], out)
    with refused(PlanError, "constant holds stand-ins already; apply the plan to the original model", out):
        apply(olmoe.constant, olmoe.plans["constant"], out, stats=olmoe.stats)
    with refused(PlanError, "gone.yaml: no such plan", out):
        apply(olmoe.source, tmp_path / "gone.yaml", out)
    with refused(StatsError, "gone.st: no such statistics", out):
        apply(olmoe.source, olmoe.plans["constant"], out, stats=tmp_path / "gone.st")
    broken = broken_stats(olmoe.stats, float("nan"))
    with refused(NumericError, r"layer 2: the statistics hold NaN or infinity \(mean\); calibrate again", out):
        apply(olmoe.source, olmoe.plans["constant"], out, stats=broken)
    apply(olmoe.source, olmoe.plans["drop"], out, stats=None)


def broken_stats(stats: Stats, value: float) -> Stats:
    layer = stats.layers["2"]
    return replace(stats, layers=stats.layers | {"2": replace(layer, mean=np.full_like(layer.mean, value))})


@pytest.mark.parametrize("what", ["file", "folder", "link to a folder"])
def test_an_output_that_is_taken_is_left_alone(what: str, olmoe: SimpleNamespace, tmp_path: Path) -> None:
    out, taken = tmp_path / "out", tmp_path / ("taken" if what.startswith("link") else "out")
    if what == "file":
        taken.write_text("mine")
    else:
        taken.mkdir()
        (taken / "mine").write_text("mine")
    if taken != out:
        out.symlink_to(taken)
    before = small.hashes(tmp_path)
    with refused(OutputError, r"exists already( and is not empty)?; choose another --out", out):
        apply(olmoe.source, olmoe.plans["drop"], out)
    assert small.hashes(tmp_path) == before
    with refused(OutputError, r"exists already", out):
        apply(olmoe.source, olmoe.plans["drop"], olmoe.source)


def test_an_empty_output_folder_gives_way(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with refused(PlanError, "no such plan", out):
        apply(olmoe.source, tmp_path / "gone.yaml", out)
    assert out.is_dir(), "it was the caller's"
    assert apply(olmoe.source, olmoe.plans["drop"], out).folder == out
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    apply(olmoe.source, olmoe.plans["drop"], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (real / SINGLE).exists()
    apply(olmoe.source, olmoe.plans["drop"], tmp_path / "new" / "deep" / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "disk", "link", "new"}
    assert {p.name for p in real.parent.iterdir()} == {"real"}


def test_one_run_for_one_output(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held(out) as work:
        (work / "of the other run").write_text("")
        with pytest.raises(OutputError, match="out: another run is writing it; wait for that one, or choose"):
            apply(olmoe.source, olmoe.plans["drop"], out)
        assert (work / "of the other run").exists()
    apply(olmoe.source, olmoe.plans["drop"], out)  # what nobody holds is left over from a killed run
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert not (out / "of the other run").exists()


def test_the_source_stays_untouched(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    source = Path(shutil.copytree(olmoe.source, tmp_path / "source"))
    before = small.hashes(source)
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    apply(source, olmoe.plans["constant"], tmp_path / "out", stats=olmoe.stats)
    assert small.hashes(source) == before
    (tmp_path / "out" / SINGLE).open("r+b").close()
    source.chmod(0o755)


def flip(folder: Path, name: str) -> None:
    """Turn over one bit in the middle of a tensor."""
    entry = read_header(folder / SINGLE)[name]
    with (folder / entry.file).open("r+b") as f:
        f.seek(entry.start + entry.nbytes // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder and write them as one sound file."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def swap(tensors: dict[str, torch.Tensor], a: str, b: str) -> None:
    for name in [n for n in tensors if a in n]:
        other = name.replace(a, b)
        tensors[name], tensors[other] = tensors[other], tensors[name]


# of layer 1: kept experts and constants of the plan below
KEPT, OTHER, GONE = "layers.1.mlp.experts.2.", "layers.1.mlp.experts.4.", "layers.1.mlp.novices.0."
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a kept expert": (
        lambda f: flip(f, f"model.{KEPT}down_proj.weight"),
        f"model.{KEPT}down_proj.weight differs",
    ),
    "a bit of an embedding": (lambda f: flip(f, "model.embed_tokens.weight"), "embed_tokens.weight differs from its"),
    "a bit of a constant": (lambda f: flip(f, f"model.{GONE}approx_value"), "approx_value differs"),
    "a kept expert is gone": (
        lambda f: rewrite(f, lambda t: [t.pop(n) for n in [*t] if KEPT in n]),
        rf"missing \['model.{KEPT}down_proj",
    ),
    "a replaced expert is there": (
        lambda f: rewrite(f, lambda t: t.update({f"model.{KEPT}".replace("2", "0"): torch.ones(2)})),
        "unexpected",
    ),
    "two experts are swapped": (lambda f: rewrite(f, lambda t: swap(t, KEPT, OTHER)), "differs from its source"),
    "two constants are swapped": (
        lambda f: rewrite(f, lambda t: swap(t, GONE, GONE.replace(".0.", ".3."))),
        "approx_value differs",
    ),
    "another dtype": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()})),
        r"model\.norm\.weight is F64",
    ),
    "a shard is cut short": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-8]),
        "truncated",
    ),
    "no weights at all": (lambda f: (f / SINGLE).unlink(), "has neither"),
}


@pytest.fixture
def plan(olmoe: SimpleNamespace) -> Plan:
    return plan_of(olmoe.stats, {"1": {"constant": [0, 3]}, "2": {"constant": [5]}})


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_on_the_way_to_disk_is_caught(
    case: str, olmoe: SimpleNamespace, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = DAMAGE[case]
    write = stage.write_folder

    def spoiled(folder: Path, *args: Any, **kwargs: Any) -> None:
        write(folder, *args, **kwargs)
        damage(folder)

    monkeypatch.setattr(stage, "write_folder", spoiled)
    with refused(CheckpointError, message, tmp_path / "out"):
        apply(olmoe.source, plan, tmp_path / "out", stats=olmoe.stats)


def redeclare(config: dict[str, Any]) -> None:
    """Say that expert 1 is the constant, not 0: every tensor is there and right, and every answer is wrong."""
    targets = config["compression_config"]["transform_config"]["expert_substitution"]["targets"]
    replacements = targets["model.layers.1.mlp.experts"]["replacements"]
    replacements["1"] = replacements.pop("0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (redeclare, "layer 1 differs from the plan by"),
        (lambda c: c.pop("compression_config"), "has shape|are incomplete or do not fit"),
        (lambda c: c.update(hidden_size=16), "has shape|are incomplete or do not fit"),
        (lambda c: c.update(hidden_act="relu"), "layer 1 differs from the plan by"),
    ],
)
def test_a_config_that_says_something_else_is_caught(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    olmoe: SimpleNamespace,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = stage.write_rest

    def spoiled(staging: Path, source: Checkpoint, config: dict[str, Any]) -> None:
        change(config)
        write(staging, source, config)

    monkeypatch.setattr(stage, "write_rest", spoiled)
    with refused(CheckpointError, message, tmp_path / "out"):
        apply(olmoe.source, plan, tmp_path / "out", stats=olmoe.stats)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.7.up_proj.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"]
)
def test_broken_weights_of_the_source_are_named(
    name: str, olmoe: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(olmoe.source, tmp_path / "source"))
    path = next(p for p in source.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    tensors[name].view(-1)[40 if tensors[name].dim() > 1 else 20] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    plan = plan_of(olmoe.stats, {"1": {"constant": [0, 3]}})
    monkeypatch.setattr(Checkpoint, "fingerprint", olmoe.stats.model.fingerprint)
    message = f"source: tensor {re.escape(name)} holds NaN or infinity; the checkpoint is broken"
    with refused(NumericError, message, tmp_path / "out"):
        apply(source, plan, tmp_path / "out", stats=olmoe.stats)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond a size: Python ignores the signal, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_cannot_grow(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    with refused(OutputError, r"out: cannot be written \(File too large\)", tmp_path / "out"):
        with largest_file(100_000):
            apply(olmoe.source, olmoe.plans["constant"], tmp_path / "out", stats=olmoe.stats)
    with largest_file(300):
        with refused(OutputError, r"stats\.st: cannot be written \(File too large\)", tmp_path / "stats.st"):
            olmoe.stats.save(tmp_path / "stats.st")
        with refused(OutputError, r"plan\.yaml: cannot be written \(File too large\)", tmp_path / "plan.yaml"):
            olmoe.plans["drop"].save(tmp_path / "plan.yaml")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of a given size."""
    mounted = []

    def mount(nbytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        if shutil.which("mount") is None:
            pytest.skip("there is no mount here")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("mounting needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(
    olmoe: SimpleNamespace, disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_disk = disk(300_000)
    with refused(OutputError, r"disk is a mount point, which cannot be replaced; choose a new folder", tmp_path / "x"):
        apply(olmoe.source, olmoe.plans["constant"], small_disk, stats=olmoe.stats)
    out, stats = small_disk / "out", small_disk / "stats.st"
    with refused(OutputError, r"out: 4\d\d\.\d\d KB are needed there, 30\d\.\d\d KB are free", out):
        apply(olmoe.source, olmoe.plans["constant"], out, stats=olmoe.stats)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))  # free, till others write
    with refused(OutputError, r"out: cannot be written \(disk full, 4\d\d\.\d\d KB are needed\)", out):
        apply(olmoe.source, olmoe.plans["constant"], out, stats=olmoe.stats)
    with suppress(OSError), (small_disk / "full").open("wb", buffering=0) as f:
        while f.write(b"0" * 4096):
            pass
    for save, target in ((olmoe.stats.save, stats), (olmoe.plans["drop"].save, small_disk / "plan.yaml")):
        with refused(OutputError, r"cannot be written \(No space left on device\)", target):
            save(target)


def test_a_disk_too_small_for_the_rest(olmoe: SimpleNamespace, disk: Callable[[int], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(olmoe.source, tmp_path / "source"))
    (source / "merges.txt").write_bytes(b"0" * 200_000)
    out = disk(600_000) / "out"
    with refused(OutputError, r"out: cannot be written \(No space left on device\)", out):
        apply(source, olmoe.plans["constant"], out, stats=olmoe.stats)


def test_a_disk_too_small_for_activations(olmoe: SimpleNamespace, disk: Callable[[int], Path], tmp_path: Path) -> None:
    from understudy.stages.calibrate import calibrate

    data = small.text_file(tmp_path / "text.txt", words=2000)
    out = disk(100_000) / "stats.st"
    with pytest.raises(OutputError, match=r"activations cannot be written \(No space left on device\); free some"):
        calibrate(olmoe.source, out, data=data, samples=30, seq_len=32)
    assert not out.exists()
    assert not list(out.parent.rglob("*.tmp*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    with refused(OutputError, r"out: cannot be written \(Permission denied\)", parent / "out"):
        apply(olmoe.source, olmoe.plans["drop"], parent / "out")


def test_random_tokens_verify_what_has_no_statistics(olmoe: SimpleNamespace, tmp_path: Path) -> None:
    without = replace(olmoe.stats, probes={})
    for kind, stats in (("drop", None), ("constant", without)):
        apply(olmoe.source, olmoe.plans[kind], tmp_path / kind, stats=stats)
    assert isinstance(without.layers["0"], ExpertStats)
