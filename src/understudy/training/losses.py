"""What training minimises: the next token, and the distance to a teacher; sums over positions, in float32.

Float32 copies exist of a few positions at a time only. Backward computes them again and writes the gradient, which is
known in closed form, once and in the dtype of the logits.

Letters: B sequences, S tokens of a sequence, V vocabulary, P positions that are looked at, C of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from understudy.training.lessons import NOT_LEARNT

_CHUNK_BYTES = 128 << 20  # of one float32 copy: enough to fill an accelerator
_CHUNK_BYTES_CPU = 4 << 20  # what stays in the cache of a core
_FAR = -80.0  # nats; e^80 is near the end of float32


def lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over predicted tokens of the cross entropy, in nats.

    Args:
        logits: `[B, S, V]`, any floating-point dtype; those at position i predict the token at i + 1.
        labels: `[B, S]`, token ids; -100 where the loss does not look.

    Returns:
        a scalar in float32 (float64 for logits in float64); to be divided by the number of predicted tokens.
    """
    return _Sum.apply(logits, labels, None, 1.0)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the sum over predicted tokens of T^2 KL(teacher || student), both softened by the temperature T, in nats.

    T^2 keeps the size of the gradient when T changes (Hinton et al., arXiv 1503.02531, section 2.1).

    Args:
        logits: of the student, `[B, S, V]`; those at position i predict the token at i + 1.
        teacher_logits: likewise; no gradient flows into them.
        labels: `[B, S]`; the same positions count as in `lm_loss`.
        temperature: T > 0.

    Returns:
        a scalar in float32 (float64 for logits in float64); to be divided by the number of predicted tokens.
    """
    assert logits.shape == teacher_logits.shape, (logits.shape, teacher_logits.shape)
    return _Sum.apply(logits, labels, teacher_logits.detach(), temperature)


class _Sum(torch.autograd.Function):
    """Sum of a loss over the positions whose next label counts, some of them at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float) -> Tensor:
        assert logits.shape[:2] == labels.shape, (logits.shape, labels.shape)
        ctx.save_for_backward(logits, labels, teacher)
        ctx.temperature = temperature
        total = torch.zeros((), dtype=_precise(logits), device=logits.device)
        for student_CV, target_C, teacher_CV, _ in _chunks(logits, labels, teacher):
            if teacher_CV is None:
                total -= student_CV.log_softmax(-1).gather(-1, target_C[:, None]).sum()
            else:
                total += temperature**2 * _divergence(student_CV, teacher_CV, temperature)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, teacher = ctx.saved_tensors
        gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        rows = gradient.view(-1, logits.shape[-1])
        for student_CV, target_C, teacher_CV, places_C in _chunks(logits, labels, teacher):
            if teacher_CV is None:
                piece_CV = student_CV.softmax(-1)
                piece_CV[torch.arange(len(target_C), device=target_C.device), target_C] -= 1
            else:
                T = ctx.temperature
                piece_CV = (student_CV / T).softmax(-1).sub_((teacher_CV / T).softmax(-1)).mul_(T)
            rows[places_C] = piece_CV.mul_(scale).to(rows.dtype)
        return gradient, None, None, None


def _chunks(
    logits: Tensor, labels: Tensor, teacher: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Logits of student and teacher `[C, V]` in float32, the tokens that come next `[C]`, and where in `[B * S]`."""
    next_BS = torch.full_like(labels, NOT_LEARNT)
    next_BS[:, :-1] = labels[:, 1:]
    next_N = next_BS.reshape(-1)
    places_P = (next_N != NOT_LEARNT).nonzero().squeeze(1)
    V, dtype = logits.shape[-1], _precise(logits)
    size = max(1, (_CHUNK_BYTES_CPU if logits.device.type == "cpu" else _CHUNK_BYTES) // (4 * V))
    student_NV = logits.reshape(-1, V)
    teacher_NV = None if teacher is None else teacher.reshape(-1, V)
    for places_C in places_P.split(size):
        if not len(places_C):  # nothing to look at: split gives one piece that is empty
            return
        theirs = None if teacher_NV is None else teacher_NV[places_C].to(dtype)
        yield student_NV[places_C].to(dtype), next_N[places_C].long(), theirs, places_C


def _divergence(student_CV: Tensor, teacher_CV: Tensor, temperature: float) -> Tensor:
    """Sum of KL(p || q), p the teacher's and q the student's probabilities.

    KL = sum p (d + exp(-d) - 1) with d = log p - log q, since sum q - p = 0: no term is negative, and it is exactly 0
    where both are equal. Where p is nothing beside q (or exactly nothing: some families mask part of their vocabulary
    with -inf), what is left of a term is q.
    """
    logp = (teacher_CV / temperature).log_softmax(-1)
    logq = (student_CV / temperature).log_softmax(-1)
    d, p = logp - logq, logp.exp()
    terms = torch.expm1(-d).add_(d).mul_(p)
    return torch.where((p == 0) | (d < _FAR), logq.exp(), terms).sum()


def _precise(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
