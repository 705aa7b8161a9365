"""Losses against slow references in float64, value and gradient; no large copy in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from understudy.training import losses
from understudy.training.losses import distillation_loss, lm_loss

B, S, V = 3, 11, 23


@pytest.fixture(params=[1, 2, 1000], ids=lambda rows: f"rows-{rows}")
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on one position at a time, on two, on all."""
    monkeypatch.setattr(losses, "_CHUNK_BYTES_CPU", 4 * V * request.param)


def draw(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student, logits of a teacher, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(B, S, V, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, 7:] = -100  # padding
    labels[1, :5] = -100  # a question
    labels[2, [0, 3, 10]] = -100
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def slow_lm(logits: Tensor, labels: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for s in range(S - 1):
            if labels[b, s + 1] != -100:
                total = total - torch.log_softmax(logits[b, s].double(), -1)[labels[b, s + 1]]
    return total


def slow_kd(logits: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for s in range(S - 1):
            if labels[b, s + 1] != -100:
                q, p = (torch.softmax(x[b, s].double() / T, -1) for x in (logits, teacher))
                total = total + T**2 * (p * (p.log() - q.log())).sum()
    return total


def gradient(loss: Tensor, logits: Tensor, scale: float = 1.0) -> Tensor:
    (found,) = torch.autograd.grad(loss * scale, logits)
    return found


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lm_loss_is_the_cross_entropy_of_the_next_token(dtype: torch.dtype) -> None:
    logits, _, labels = draw(dtype=dtype)
    found, expected = lm_loss(logits, labels), slow_lm(logits, labels)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    got, wanted = gradient(found, logits, 0.25), gradient(expected, logits, 0.25)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    assert not got[:, -1].any() and not got[0, 6:].any() and not got[1, :4].any()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_loss_is_the_divergence_from_the_teacher(dtype: torch.dtype, temperature: float) -> None:
    logits, teacher, labels = draw(dtype=dtype)
    found = distillation_loss(logits, teacher, labels, temperature)
    expected = slow_kd(logits, teacher, labels, temperature)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    got, wanted = gradient(found, logits, 0.25), gradient(expected, logits, 0.25)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert not got[:, -1].any() and not got[0, 6:].any() and not got[1, :4].any()


def test_gradients_are_those_of_finite_differences() -> None:
    logits, teacher, labels = draw(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: lm_loss(x, labels), logits)
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher, labels, 1.7), logits)


def test_losses_add_up() -> None:
    logits, teacher, labels = draw()
    both = lm_loss(logits, labels) + 0.5 * distillation_loss(logits, teacher, labels, 2.0)
    expected = slow_lm(logits, labels) + 0.5 * slow_kd(logits, teacher, labels, 2.0)
    torch.testing.assert_close(gradient(both, logits), gradient(expected, logits), rtol=1e-5, atol=1e-6)


def test_a_student_that_equals_its_teacher_is_at_zero_exactly() -> None:
    logits, _, labels = draw(scale=20.0)
    loss = distillation_loss(logits, logits.detach().clone(), labels, 1.3)
    assert loss.item() == 0.0
    assert not gradient(loss, logits).any()


def test_a_small_distance_is_seen() -> None:
    logits, _, labels = draw()
    teacher = (logits.detach().double() + 1e-3 * torch.randn(B, S, V, dtype=torch.float64)).float()
    found, expected = distillation_loss(logits, teacher, labels, 1.0), slow_kd(logits, teacher, labels, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_tokens_that_are_masked_and_teachers_that_are_sure() -> None:
    logits, teacher, labels = draw()
    with torch.no_grad():
        teacher[0, 0, :] = -95.0  # e^95 is past float32, e^-95 is not zero there
        teacher[0, 0, 1] = 0.0
        logits[..., 5] = teacher[..., 5] = -math.inf  # of a vocabulary that is padded
        labels[labels == 5] = 6
    seen = [v for v in range(V) if v != 5]
    found = distillation_loss(logits, teacher, labels, 1.0)
    expected = slow_kd(logits[..., seen], teacher[..., seen], labels, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert gradient(found, logits).isfinite().all()
    assert gradient(lm_loss(logits, labels), logits).isfinite().all()


def test_what_is_not_a_number_shows() -> None:
    logits, teacher, labels = draw()
    broken = teacher.clone()
    broken[2, 4, 3] = math.nan
    assert distillation_loss(logits, broken, labels, 1.0).isnan()
    with torch.no_grad():
        logits[2, 4, 3] = math.nan
    assert distillation_loss(logits, teacher, labels, 1.0).isnan()
    assert lm_loss(logits, labels).isnan()


def test_nothing_to_look_at() -> None:
    logits, teacher, labels = draw()
    labels[:, 1:] = -100  # the first token of a sequence is never predicted
    for loss in (lm_loss(logits, labels), distillation_loss(logits, teacher, labels, 1.0)):
        assert loss.item() == 0.0
        assert not gradient(loss, logits).any()


class _Largest(TorchDispatchMode):
    """The most elements of any float32 tensor that an operation puts out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_float32_copies_are_of_a_few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_BYTES_CPU", 4 * V * 4)
    logits, teacher, labels = draw(dtype=torch.bfloat16)
    with _Largest() as seen:
        gradient(lm_loss(logits, labels), logits)
        gradient(distillation_loss(logits, teacher, labels, 2.0), logits)
    assert V < seen.elements <= 4 * V
