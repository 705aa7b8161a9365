"""Evaluation against slow references: the whole model loaded by transformers, loops over blocks and positions."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from understudy import quality
from understudy.data import token_blocks
from understudy.errors import DataError, DependencyError, NumericError, UnderstudyError
from understudy.layout import model_facts
from understudy.metrics import Metrics
from understudy.plans import Plan, PlanModel
from understudy.sizes import count_params
from understudy.skeleton import Skeleton
from understudy.stages.apply import apply
from understudy.stages.calibrate import calibrate
from understudy.stages.evaluate import evaluate

WORDS = [f"w{i}" for i in range(93)]
HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS, POSITIONS = 32, 16, 8, 2, 3, 64
EXPERT_PARAMS = 3 * HIDDEN * WIDTH
REPLACED = {"0": (0, 2, 3, 7), "1": (5,)}  # layer 2 stays whole
TEXT: dict[str, Any] = {"samples": 6, "seq_len": 16, "batch_size": 4}


def save_tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_model(folder: Path, noise: float = 0.0, words: list[str] = WORDS, vocabulary: int = 96) -> Path:
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        vocab_size=vocabulary,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
    )
    model = OlmoeForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
                parameter.add_(noise * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    save_tokenizer(folder, words)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def words(count: int, low: int, high: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(low, high, count))

    (folder / "prose.txt").write_text(words(200, 0, 60))
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": words(23, 40, 93)}) + "\n" for _ in range(9)))
    return str(folder / "prose.txt"), str(folder / "code.jsonl")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("perturbed") / "model", noise=0.03)


@pytest.fixture(scope="module")
def compressed(original: Path, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Constants for an uneven choice of experts."""
    work = tmp_path_factory.mktemp("compressed")
    stats = calibrate(original, work / "stats.safetensors", data=data[0], samples=8, seq_len=16)
    layers = {key: {"constant": ids} for key, ids in REPLACED.items()}
    plan = Plan(method="edited", model=PlanModel.of(stats.model), layers=layers)
    return apply(original, plan, work / "model", stats=stats).folder


@torch.no_grad()
def reference(model: Path, against: Path, data: tuple[str, ...], samples: int, seq_len: int) -> dict[str, Any]:
    """Every figure by source and under "all", one position after the other."""
    tokenizer = AutoTokenizer.from_pretrained(against)
    blocks = token_blocks(data, tokenizer, seq_len=seq_len, samples=samples)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval() for m in (model, against))
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in blocks.names}
    for name in blocks.names:
        for block in torch.from_numpy(blocks.of(name)).long():
            q_SV, p_SV = (m(input_ids=block[None]).logits[0].double() for m in (ours, theirs))
            for position in range(seq_len - 1):
                q, p, token = q_SV[position].softmax(0), p_SV[position].softmax(0), block[position + 1]
                kl = float((p * (p / q).log()).sum())
                rows[name].append((-math.log(q[token]), -math.log(p[token]), kl, float(p.argmax() == q.argmax())))
    rows["all"] = [row for name in blocks.names for row in rows[name]]
    means = {name: np.mean(values, axis=0) for name, values in rows.items()}
    return {
        "perplexity": {name: math.exp(mean[0]) for name, mean in means.items()},
        "original": {name: math.exp(mean[1]) for name, mean in means.items()},
        "kl": {name: mean[2] for name, mean in means.items()},
        "top1": {name: mean[3] for name, mean in means.items()},
    }


# ---- text -----------------------------------------------------------------------------------------------------------


def test_perplexity_equals_the_slow_reference(original: Path, data: tuple[str, str]) -> None:
    found = evaluate(original, data=data, **TEXT)
    assert set(found.perplexity) == {"prose", "code", "all"}
    assert found.perplexity == pytest.approx(reference(original, original, data, 6, 16)["perplexity"], rel=1e-5)
    assert (found.kl, found.kl_by_source, found.top1_agreement, found.against, found.tasks) == (None,) * 4 + ({},)


def test_a_model_is_no_distance_from_itself(original: Path, data: tuple[str, str]) -> None:
    found = evaluate(original, against=original, data=data, **TEXT)
    assert found.kl == 0.0
    assert found.top1_agreement == 1.0
    assert found.against is not None
    assert found.against["perplexity"] == found.perplexity
    assert found.against["params"] == found.params


@pytest.mark.parametrize("which", ["perturbed", "compressed"])
def test_distance_equals_the_slow_reference(
    which: str, original: Path, data: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    found = evaluate(model, against=original, data=data, **TEXT)
    expected = reference(model, original, data, 6, 16)
    assert found.perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found.kl_by_source == pytest.approx(expected["kl"], rel=1e-5)
    assert found.kl == found.kl_by_source["all"] > 1e-4
    assert found.top1_by_source == expected["top1"]
    assert found.top1_agreement == found.top1_by_source["all"] < 1
    assert found.against is not None
    assert found.against["perplexity"] == pytest.approx(expected["original"], rel=1e-5)


def test_neither_chunks_nor_spilling_nor_batches_change_the_figures(
    perturbed: Path, original: Path, data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(perturbed, against=original, data=data, **TEXT)
    monkeypatch.setattr(quality, "_CHUNK_BYTES", 4 * 2 * 96 * 5)  # 5 positions of a batch of 2
    monkeypatch.setattr(quality, "_PIECE_BYTES", 4 * 2 * 96 * 2)
    pieces = evaluate(perturbed, against=original, data=data, **(TEXT | {"batch_size": 2}), activation_memory="1KB")
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.kl_by_source == pytest.approx(whole.kl_by_source, rel=1e-5)
    assert pieces.top1_by_source == whole.top1_by_source


def test_masked_vocabulary_does_not_spoil_the_divergence() -> None:
    logits = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0))
    logits[..., 7] = -math.inf
    p = logits.log_softmax(-1)
    assert quality._divergence(p, p).tolist() == [0.0]
    q = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(1)).log_softmax(-1)  # masks nothing
    rest = torch.arange(10) != 7
    expected = (p.exp() * (p - q))[..., rest].sum((1, 2))
    assert quality._divergence(p, q).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert quality._divergence(q, p).tolist() == [math.inf]


@pytest.mark.parametrize(("step", "error"), [(1e-3, 1e-4), (0.1, 1e-6)])
def test_the_divergence_of_close_models_is_exact_in_float32(step: float, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 50, 5000, generator=generator)
    moved = logits + step * torch.randn(logits.shape, generator=generator)
    p, q = (x.double().log_softmax(-1) for x in (logits, moved))
    expected = (p.exp() * (p - q)).sum((1, 2))
    got = quality._divergence(logits.log_softmax(-1), moved.log_softmax(-1))
    assert got.tolist() == pytest.approx(expected.tolist(), rel=error)


def test_progress_names_both_walks(original: Path, data: tuple[str, str]) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(original, against=original, data=data, **TEXT, progress=lambda *at: seen.append(at))
    assert [at for at in seen if at[1] == at[2]] == [
        ("walk model", LAYERS, LAYERS),
        ("walk original", LAYERS, LAYERS),
        ("predict", 2, 2),
        ("examples", 1, 1),
    ]


def test_the_bundled_text_is_the_default_and_said_to_be(original: Path) -> None:
    found = evaluate(original, samples=2, seq_len=16)
    assert set(found.perplexity) == {"bundled", "all"}
    assert "bundled" in found.notes[0]


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_params_of_an_ordinary_model(original: Path, data: tuple[str, str]) -> None:
    found = evaluate(original, data=data, **TEXT)
    model = AutoModelForCausalLM.from_pretrained(original)
    total = sum(p.numel() for p in model.parameters())
    routed = LAYERS * EXPERTS * EXPERT_PARAMS
    active = total - routed + LAYERS * TOP_K * EXPERT_PARAMS
    assert found.params == {"total": total, "routed": routed, "active": active}
    assert found.bytes == 4 * total
    facts = model_facts(Skeleton(original), "x")
    assert (facts.params, facts.routed_params) == (total, routed)


def test_active_params_of_constants_are_measured_on_the_text(
    original: Path, compressed: Path, data: tuple[str, str]
) -> None:
    found = evaluate(compressed, data=data, **TEXT)
    picks: dict[str, list[torch.Tensor]] = {key: [] for key in map(str, range(LAYERS))}
    model = AutoModelForCausalLM.from_pretrained(compressed).eval()
    for key, seen in picks.items():
        experts = model.model.layers[int(key)].mlp.experts
        experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[1]))
    ids = token_blocks(data, AutoTokenizer.from_pretrained(original), seq_len=16, samples=6).ids
    with torch.no_grad():
        for block in torch.from_numpy(ids).long():
            model(input_ids=block[None])
    constants = sum(map(len, REPLACED.values()))
    routed = (LAYERS * EXPERTS - constants) * EXPERT_PARAMS + constants * HIDDEN
    outside = sum(p.numel() for p in model.parameters()) - routed
    active = float(outside)
    for key, seen in picks.items():
        for expert in torch.cat(seen).flatten().tolist():
            active += (HIDDEN if expert in REPLACED.get(key, ()) else EXPERT_PARAMS) / ids.size
    assert found.params == {"total": outside + routed, "routed": routed, "active": round(active)}


def test_active_params_without_text_are_those_of_equally_likely_experts(compressed: Path) -> None:
    found = count_params(Skeleton(compressed), {})
    shares = [len(REPLACED.get(str(i), ())) / EXPERTS for i in range(LAYERS)]
    routes = sum(TOP_K * ((1 - share) * EXPERT_PARAMS + share * HIDDEN) for share in shares)
    assert found["active"] == round(found["total"] - found["routed"] + routes)


def test_active_params_do_not_fall_with_dropped_experts(original: Path, tmp_path: Path) -> None:
    facts = model_facts(Skeleton(original), "x")
    layers = {str(i): {"drop": (1, 3, 4, 6)} for i in range(LAYERS)}
    plan = Plan(method="edited", model=PlanModel.of(facts), layers=layers)
    folder = apply(original, plan, tmp_path / "model").folder
    found, before = count_params(Skeleton(folder), {}), count_params(Skeleton(original), {})
    assert found["routed"] == before["routed"] // 2
    assert before["active"] - found["active"] == LAYERS * 4 * HIDDEN  # the rows of the router


# ---- the file -------------------------------------------------------------------------------------------------------


def test_metrics_are_written_beside_the_model(compressed: Path, original: Path, data: tuple[str, str]) -> None:
    file = compressed / "understudy" / "metrics.json"
    found = evaluate(compressed, against=original, data=data, **TEXT)
    first = file.read_bytes()
    assert json.loads(first) == found.to_dict()
    assert {"perplexity", "kl", "top1_agreement", "bytes", "params", "tasks"} <= json.loads(first).keys()
    assert list(json.loads(first)) == sorted(json.loads(first))
    assert found.provenance["data"]["blocks"] == {"prose": 3, "code": 3}
    evaluate(compressed, against=original, data=data, **TEXT)
    assert file.read_bytes() == first


def test_metrics_that_cannot_be_written_are_returned_with_a_note(
    original: Path, data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Metrics, path: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Metrics, "save", full)
    found = evaluate(original, data=data, **TEXT)
    assert found.perplexity["all"] > 1
    assert "No space left on device" in found.notes[-1]


def test_a_model_from_the_hub_gets_no_file(
    original: Path, data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy.stages.evaluate.resolve", lambda model: original)
    monkeypatch.setattr(Metrics, "save", lambda *args: pytest.fail("written"))
    assert "somebody/model is no local folder" in evaluate("somebody/model", data=data, **TEXT).notes[-1]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": POSITIONS + 1}, "--seq-len 65 is more than the 64 positions of"),
        ({"limit": 3}, "--limit has no effect without --tasks"),
        ({"data": (), "tasks": "x", "seed": 1}, "--seed has no effect without --data"),
        ({"data": "nowhere.txt", "seq_len": 16}, "there is no such file"),
        ({"seq_len": 1}, "seq_len: Input should be greater than 1"),
        ({"sample": 3}, "sample: Extra inputs are not permitted"),
    ],
)
def test_bad_settings(original: Path, data: tuple[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnderstudyError, match=message):
        evaluate(original, **({"data": data} | options))


def test_a_source_cannot_be_named_as_the_total(original: Path, tmp_path: Path, data: tuple[str, str]) -> None:
    (tmp_path / "all.txt").write_text(Path(data[0]).read_text())
    with pytest.raises(DataError, match="a source of text is named 'all'"):
        evaluate(original, data=str(tmp_path / "all.txt"), **TEXT)


def test_models_of_different_vocabulary_cannot_be_compared(
    original: Path, tmp_path: Path, data: tuple[str, str]
) -> None:
    other = save_model(tmp_path / "other", vocabulary=100)
    with pytest.raises(DataError, match=r"chooses among 100 tokens and .* among 96: give as --against"):
        evaluate(other, against=original, data=data, **TEXT)


def test_tokenizers_must_read_alike_but_need_not_be_written_alike(
    original: Path, tmp_path: Path, data: tuple[str, str]
) -> None:
    other = save_model(tmp_path / "other", words=WORDS[::-1])
    with pytest.raises(DataError, match="give different ids for the same text"):
        evaluate(other, against=original, data=data, **TEXT)
    save_tokenizer(other, WORDS)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"by": "somebody else"}))
    assert evaluate(other, against=original, data=data, **TEXT).kl == 0.0


def test_a_head_that_overflows_is_named(tmp_path: Path, data: tuple[str, str]) -> None:
    folder = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    model.save_pretrained(folder)
    with pytest.raises(NumericError, match="what it predicts is NaN or infinite in float32"):
        evaluate(folder, data=data, **TEXT)


# ---- tasks ----------------------------------------------------------------------------------------------------------

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one multiple-choice task, `local_choice`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rng = np.random.default_rng(0)
    items = []
    for _ in range(30):
        words = [WORDS[i] for i in rng.integers(0, 93, 12)]
        choices = [" ".join(words[6 : 6 + n]) for n in (1, 3, 2, 4)]
        items.append({"context": " ".join(words[:6]), "choices": choices, "gold": int(rng.integers(4))})
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    text = TASK.format(name="local_choice", file=folder / "items.jsonl", cache=tmp_path / "cache")
    (folder / "local_choice.yaml").write_text(text)
    return folder


@pytest.fixture
def local_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests the scan of the thousands of tasks that come with lm-eval."""
    module = pytest.importorskip("lm_eval.tasks")

    class Local(module.TaskManager):  # type: ignore[misc, name-defined]
        def __init__(self, include_defaults: bool = True, **options: Any) -> None:
            super().__init__(include_defaults=False, **options)

    monkeypatch.setattr(module, "TaskManager", Local)


def own_command_line(model: Path, tasks: Path, out: Path) -> dict[str, Any]:
    """Results of lm-eval's command line in a process of its own, which knows no more than `import understudy`."""
    run = "import understudy; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={model}", "--batch_size", "8"]
    arguments += ["--tasks", "local_choice", "--include_path", str(tasks), "--output_path", str(out), "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", run, *arguments], env=os.environ | offline, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]["local_choice"]


def test_tasks_equal_those_of_lm_evals_own_command_line(
    compressed: Path, original: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    found = evaluate(compressed, against=original, tasks="local_choice", include_path=tasks, device="cpu")
    assert found.perplexity == {}
    assert found.kl is None
    assert found.params == count_params(Skeleton(compressed), {})
    assert capsys.readouterr().out == ""  # nothing but our own JSON may go there
    expected = own_command_line(compressed, tasks, tmp_path / "out")
    assert set(found.tasks) == {"local_choice"}
    assert set(found.tasks["local_choice"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    for metric, value in found.tasks["local_choice"].items():
        assert value == expected[f"{metric},none"]
    assert found.against is not None
    assert set(found.against["tasks"]["local_choice"]) == set(found.tasks["local_choice"])


def test_unknown_and_unreadable_tasks(original: Path, tasks: Path, local_only: None) -> None:
    with pytest.raises(DataError, match="task 'locul_choice' is not among those of lm-eval or in"):
        evaluate(original, tasks=("locul_choice",), include_path=tasks)
    (tasks / "broken.yaml").write_text("task: broken\n  metric: [")
    with pytest.raises(DataError, match=r"broken\.yaml: not a readable task file"):
        evaluate(original, tasks="broken", include_path=tasks)
    (tasks / "items.jsonl").unlink()
    with pytest.raises(DataError, match=r"tasks local_choice cannot be loaded: .*items\.jsonl"):
        evaluate(original, tasks="local_choice", include_path=tasks)
    with pytest.raises(DataError, match=r"--include-path .*nowhere: there is no such folder"):
        evaluate(original, tasks="local_choice", include_path=tasks / "nowhere")


def test_without_lm_eval_the_extra_is_named(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DependencyError, match=r"pip install understudy\[eval\]"):
        evaluate(original, tasks="arc_easy")


def test_what_the_original_is_sure_of_is_a_number() -> None:
    """A logit of -95 beside one of 0 has a probability that float32 holds; the model believes in it."""
    sure, unsure = torch.tensor([[[0.0, -95.0, -math.inf]]]), torch.tensor([[[-3.0, 0.8, -math.inf]]])
    p, q = sure.log_softmax(-1), unsure.log_softmax(-1)
    exact = (p.double().exp() * (p.double() - q.double()))[..., :2].sum()
    assert float(quality._divergence(p, q)) == pytest.approx(float(exact), rel=1e-6)
