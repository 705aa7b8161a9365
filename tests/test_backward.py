"""Gradients layer by layer against autograd through a whole model, written down slowly in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import small
import zoo
from understudy.activations import ActivationStore
from understudy.backward import Backward, EveryLayer, sum_gradients
from understudy.collectors.gradients import Gradients
from understudy.data import token_blocks
from understudy.errors import NumericError, UnderstudyError, UnsupportedModelError
from understudy.moe import find_moe_layers
from understudy.skeleton import Skeleton
from understudy.stages.calibrate import calibrate
from understudy.tokens import load_tokenizer
from understudy.walk import Walk

FAMILIES = ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "gemma4"]


@dataclass
class Slow:
    """What the slow reference keeps of one expert: activations and outputs before the gate, with their gradients."""

    h: torch.Tensor  # [n, I]
    z: torch.Tensor  # [n, H]
    down: torch.Tensor  # [H, I]


def slow_experts(experts: Any, kept: dict[int, Slow]) -> Any:
    """A forward in plain loops, by the layouts that the tiny families have."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        turn = (lambda w: w.T) if experts.is_transposed else (lambda w: w)
        for e in range(len(experts.down_proj)):
            token, place = torch.where((top_k_index == e) & (top_k_weights != 0))
            if not len(token):
                continue
            x = hidden_states[token]
            if not experts.has_gate:
                h = experts.act_fn(x @ turn(experts.up_proj[e]).T)
            elif hasattr(experts, "alpha"):  # gpt-oss: biased, interleaved, clamped
                both = x @ turn(experts.gate_up_proj[e]).T + experts.gate_up_proj_bias[e]
                gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
                h = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
            else:
                gate, up = (x @ turn(experts.gate_up_proj[e]).T).chunk(2, dim=-1)
                h = experts.act_fn(gate) * up
            if not h.requires_grad:
                h.requires_grad_()
            down = turn(experts.down_proj[e])
            z = h @ down.T + (experts.down_proj_bias[e] if experts.has_bias else 0)
            h.retain_grad()
            z.retain_grad()
            kept[e] = Slow(h, z, down.detach())
            out = out.index_add(0, token, z * top_k_weights[token, place, None])
        return out

    return forward


def slow_gradients(folder: Path, ids: torch.Tensor) -> dict[str, dict[int, Slow]]:
    """Backward through the whole model in float64, the loss summed over all predicted tokens."""
    model = zoo_model(folder).double().requires_grad_(False)
    kept: dict[str, dict[int, Slow]] = {}
    for layer in find_moe_layers(model):
        kept[layer.key] = {}
        experts = model.get_submodule(layer.name)
        experts.forward = slow_experts(experts, kept[layer.key])
    model.get_input_embeddings().weight.requires_grad_()  # so that there is a graph from the first layer on
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return kept


def zoo_model(folder: Path) -> Any:
    skeleton = Skeleton(folder)
    return type(skeleton.model).from_pretrained(folder, dtype=torch.float32)


def tokens(rows: int = 5, length: int = 10) -> torch.Tensor:
    return torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(3))


class Killed(BaseException):
    """Stands for a kill."""


def layerwise(
    folder: Path,
    ids: torch.Tensor,
    work: Path,
    *,
    batch_size: int = 2,
    memory: int = 0,
    kept: Any = None,
    stop: int = -1,
    samples: int | None = None,
) -> Any:
    """Sums by key, layer by layer; `kept` holds what an earlier call on the same folder left, `stop` kills early."""
    skeleton, blocks, kept = Skeleton(folder), ids.numpy(), {} if kept is None else kept
    outputs, seen = EveryLayer(memory, work / "forth"), []
    if (latest := outputs.latest(-(-len(blocks) // batch_size))) is None:
        walk = Walk(skeleton, blocks, batch_size, outputs)
        with walk.ready():
            walk.through_layers()
    else:
        assert latest == zoo.LAYERS - 1
    back = Backward(skeleton, blocks, batch_size, outputs, ActivationStore(memory, work / "back"), samples)

    def done(index: int) -> None:
        seen.append(index)
        if index == stop:
            raise Killed

    try:
        with back.ready():
            sum_gradients(back, kept.__setitem__, kept.__contains__, done=done)
    except Killed:
        pass
    kept["seen"] = seen
    return kept


def same(got: Any, want: Any, rtol: float = 0) -> None:
    """Compare the sums of all layers."""
    keys = set(want) - {"seen"}
    assert set(got) - {"seen"} == keys and keys
    for key in keys:
        for name, value in want[key].items():
            scale = float(value.max())
            assert scale > 0
            np.testing.assert_allclose(got[key][name], value, rtol=rtol, atol=rtol * scale, err_msg=f"{key} {name}")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.model_folder(tmp_path_factory.mktemp("olmoe") / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_on_the_whole_model(family: str, tmp_path: Path) -> None:
    folder, ids = small.model_folder(tmp_path / "model", family), tokens()
    want = slow_gradients(folder, ids)
    got = layerwise(folder, ids, tmp_path / "work")
    assert set(got) - {"seen"} == set(want)
    for key, experts in want.items():
        scale = max(float((s.h.grad**2).sum(0).max()) for s in experts.values())
        assert scale > 0
        for e in range(zoo.EXPERTS):
            if e not in experts:
                assert not got[key]["gradient_sq_sum"][e].any()
                continue
            h, d = experts[e].h.detach().numpy(), experts[e].h.grad.numpy()
            assert got[key]["gradient_count"][e] == len(h)
            np.testing.assert_allclose(
                got[key]["gradient_sq_sum"][e], (d**2).sum(0), rtol=1e-3, atol=1e-5 * scale, err_msg=f"{key} {e}"
            )
            np.testing.assert_allclose(
                got[key]["effect_sq_sum"][e], ((h * d) ** 2).sum(0), rtol=1e-3, atol=1e-5 * scale
            )


def test_batches_and_memory_do_not_matter(olmoe: Path, tmp_path: Path) -> None:
    ids = tokens()
    one = layerwise(olmoe, ids, tmp_path / "one", batch_size=1)
    same(layerwise(olmoe, ids, tmp_path / "many", batch_size=5, memory=1 << 30), one, 1e-4)
    same(layerwise(olmoe, ids, tmp_path / "again", batch_size=1, memory=1 << 30), one)


def test_sums_of_disjoint_blocks_add_up(olmoe: Path, tmp_path: Path) -> None:
    ids = tokens()
    whole = layerwise(olmoe, ids, tmp_path / "whole")
    parts = [layerwise(olmoe, part, tmp_path / f"{len(part)}") for part in (ids[:2], ids[2:])]
    added = {key: {name: sum(p[key][name] for p in parts) for name in whole[key]} for key in set(whole) - {"seen"}}
    same(added, whole, 1e-4)


@pytest.mark.parametrize(
    ("samples", "walked"), [(1, [0, 1]), (2, [0, 1]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (9, [])]
)
def test_some_blocks_are_walked_back_through(samples: int, walked: list[int], olmoe: Path, tmp_path: Path) -> None:
    """Whole batches, spread evenly; and an interrupted walk goes on with them."""
    ids = tokens()
    want = layerwise(olmoe, ids[walked] if walked else ids, tmp_path / "alone")
    kept = layerwise(olmoe, ids, tmp_path / "some", samples=samples, stop=2)
    assert kept["seen"] == [3, 2]
    same(layerwise(olmoe, ids, tmp_path / "some", samples=samples, kept=kept), want)


def test_a_head_that_overflows_is_one_clear_line(tmp_path: Path) -> None:
    folder = small.model_folder(tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: t * 1e38 if k == "lm_head.weight" else t for k, t in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(NumericError, match=r"gradient of the loss at the head is NaN or infinite in torch.float32"):
        layerwise(folder, tokens(), tmp_path / "work")


@pytest.mark.parametrize("stop", [3, 1, 0])
def test_goes_on_where_it_was_killed(stop: int, olmoe: Path, tmp_path: Path) -> None:
    ids = tokens()
    undisturbed = layerwise(olmoe, ids, tmp_path / "undisturbed")
    assert undisturbed.pop("seen") == [3, 2, 1, 0]
    kept = layerwise(olmoe, ids, tmp_path / "killed", stop=stop)
    assert kept.pop("seen") == list(range(3, stop - 1, -1))
    resumed = layerwise(olmoe, ids, tmp_path / "killed", kept=kept)
    assert resumed.pop("seen") == list(range(stop - 1, -1, -1))
    same(resumed, undisturbed)


def test_starts_again_where_sums_were_lost(olmoe: Path, tmp_path: Path) -> None:
    ids = tokens()
    kept = layerwise(olmoe, ids, tmp_path / "work", stop=1)
    del kept["2"], kept["seen"]
    assert layerwise(olmoe, ids, tmp_path / "work", kept=kept)["seen"] == [3, 2, 1, 0]


def test_layers_below_the_first_with_experts_are_not_visited(tmp_path: Path) -> None:
    folder = small.model_folder(tmp_path / "model", "deepseek_v3")  # its first layer is dense
    assert layerwise(folder, tokens(), tmp_path / "work")["seen"] == [3, 2, 1]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_two_vectors_say_what_the_matrix_of_the_paper_says(family: str, tmp_path: Path) -> None:
    """HEAPr's mean outer product G of gradients at the expert's output, `[H, H]`, and its second pass."""
    folder, ids = small.model_folder(tmp_path / "model", family), tokens()
    want, got = slow_gradients(folder, ids), layerwise(folder, ids, tmp_path / "work")
    for key, experts in want.items():
        for e, slow in experts.items():
            u, h, n = slow.z.grad, slow.h.detach(), len(slow.h)
            fisher = sum(torch.outer(row, row) for row in u) / n
            paper = [
                float((h[:, k] ** 2).mean() * (slow.down[:, k] @ fisher @ slow.down[:, k])) for k in range(h.shape[1])
            ]
            ours = (h**2).mean(0).numpy() * got[key]["gradient_sq_sum"][e] / n
            np.testing.assert_allclose(ours, paper, rtol=2e-3, atol=1e-5 * max(paper), err_msg=f"{key} {e}")


def test_refuses_experts_that_do_not_show_their_activations(olmoe: Path) -> None:
    skeleton = Skeleton(olmoe, experts="eager")
    with pytest.raises(UnsupportedModelError, match="--experts at auto"):
        Gradients(skeleton.model.get_submodule(skeleton.layers[0].name), zoo.EXPERTS)


def test_leaves_the_experts_as_they_were(olmoe: Path, tmp_path: Path) -> None:
    skeleton = Skeleton(olmoe)
    experts = skeleton.model.get_submodule(skeleton.layers[0].name)
    before = dict(experts.__dict__)
    with Gradients(experts, zoo.EXPERTS).attached():
        assert dict(experts.__dict__) != before
    assert dict(experts.__dict__) == before


def run(model: Path, data: str, out: Path, **options: Any) -> tuple[Any, list[int]]:
    """Calibrate with gradients; also what was said of progress."""
    seen: list[int] = []
    text = {"data": data, "samples": 5, "seq_len": 12, "batch_size": 2, "collect": ("gradients",)}
    stats = calibrate(model, out, progress=lambda n, total: seen.append(n), **(text | options))
    return stats, seen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.text_file(tmp_path_factory.mktemp("data") / "text.txt")


def test_calibration_collects_gradients(olmoe: Path, data: str, tmp_path: Path) -> None:
    stats, seen = run(olmoe, data, tmp_path / "stats")
    assert seen == list(range(9))
    plain, _ = run(olmoe, data, tmp_path / "plain", collect=())
    small.assert_close(
        {
            key: replace(x, gradient_sq_sum=None, effect_sq_sum=None, gradient_count=None)
            for key, x in stats.layers.items()
        },
        plain.layers,
        0,
        exact=True,
    )
    blocks = token_blocks((data,), load_tokenizer(olmoe), seq_len=12, samples=5, seed=0)
    want = layerwise(olmoe, torch.from_numpy(blocks.ids.astype(np.int64)), tmp_path / "work")
    same({key: {n: getattr(x, n) for n in want["0"]} for key, x in stats.layers.items()}, want)
    assert small.beside(tmp_path / "stats") == {"plain", "work"}


def test_calibration_walks_back_through_as_many_as_asked(olmoe: Path, data: str, tmp_path: Path) -> None:
    stats, _ = run(olmoe, data, tmp_path / "stats", gradient_samples=2)
    blocks = token_blocks((data,), load_tokenizer(olmoe), seq_len=12, samples=5, seed=0)
    want = layerwise(olmoe, torch.from_numpy(blocks.ids[:2].astype(np.int64)), tmp_path / "work")
    same({key: {n: getattr(x, n) for n in want["0"]} for key, x in stats.layers.items()}, want)
    assert stats.data["gradient_samples"] == 2
    with pytest.raises(UnderstudyError, match="--gradient-samples has no effect without --collect gradients"):
        run(olmoe, data, tmp_path / "other", collect=(), gradient_samples=2)


@pytest.mark.parametrize("after", [1, 5, 7])
def test_a_killed_calibration_goes_on_to_the_same_bytes(
    after: int, olmoe: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forth, at the head and on the way back: killed when sums are saved and the layer is not committed."""
    run(olmoe, data, tmp_path / "undisturbed")
    own, calls = ActivationStore.commit, iter(range(after))

    def dying(self: ActivationStore, layer: int) -> None:
        if next(calls, None) is None:
            raise Killed
        own(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "commit", dying)
        with pytest.raises(Killed):
            run(olmoe, data, tmp_path / "killed")
    _, seen = run(olmoe, data, tmp_path / "killed")
    assert seen == ([1, 2, 3, 4, 5, 6, 7, 8] if after == 1 else [4, 5, 6, 7, 8] if after == 5 else [4, 7, 8])
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "undisturbed").read_bytes()


def test_a_calibration_that_cannot_take_gradients_says_so_at_once(olmoe: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="calibrate without --collect gradients"):
        run(olmoe, data, tmp_path / "stats", experts="eager")
    assert not list(tmp_path.iterdir())
