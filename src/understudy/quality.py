"""What a model makes of text, and how far it is from another: perplexity, KL divergence, top-1 agreement.

Both models are walked layer by layer, one after the other; only their embeddings and heads are resident together.

Letters: B blocks of a batch, S tokens of a block, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from understudy.data import Blocks
from understudy.errors import NumericError, UnsupportedModelError
from understudy.skeleton import Skeleton
from understudy.walk import Observe, Walk

Progress = Callable[[str, int, int], None]

ALL = "all"
_CHUNK_BYTES = 64 << 20  # of one model's log-probabilities in float64
_TOKENS, _NLL, _ORIGINAL_NLL, _KL, _AGREE = range(5)


@dataclass(frozen=True)
class Quality:
    """Figures by source of text; those under "all" are over every predicted token of all sources."""

    perplexity: dict[str, float]
    original_perplexity: dict[str, float] | None
    kl: dict[str, float] | None  # KL(original || model), nats a token
    top1: dict[str, float] | None  # share of positions where both find the same token most likely


def vocabulary(skeleton: Skeleton) -> int:
    """How many tokens the model chooses among: the rows of its head.

    Raises:
        UnsupportedModelError: the model predicts something else than tokens.
    """
    # a model for several modalities may leave the question to the language model inside it
    inside = (module for module in skeleton.model.modules() if isinstance(module, PreTrainedModel))
    head = next((head for module in inside if (head := module.get_output_embeddings()) is not None), None)
    if head is None:
        raise UnsupportedModelError(
            f"{skeleton.checkpoint.folder}: {type(skeleton.model).__name__} has no language head; only models that "
            "predict the next token can be evaluated"
        )
    return int(head.weight.shape[0])


def measure(walks: Sequence[tuple[Walk, Observe]], blocks: Blocks, report: Progress) -> Quality:
    """Walk a model, and the original behind it if given, over the same blocks, and compare what they predict.

    Args:
        walks: of the model, then of the original, over `blocks.ids` in batches of the same size and over the same
            vocabulary; with each what surrounds the run of its layers, as in `Walk.through_layers`.
        blocks: where the tokens come from.
        report: called with (what is going on, done, all).

    Raises:
        NumericError: NaN or infinity in a layer's output or in what is predicted.
    """
    for (walk, observe), what in zip(walks, ("walk model", "walk original"), strict=False):
        with walk.ready():
            walk.through_layers(observe, done=partial(_layer_done, report, what, walk.depth))
    both = [walk for walk, _ in walks]
    sums = np.zeros((len(blocks.names), 5))
    start, total = 0, len(both[0].batches)
    with ExitStack() as stack:
        for walk in both:
            stack.enter_context(walk.ready())
        for number, batch in enumerate(both[0].batches):
            np.add.at(sums, blocks.source[start : start + len(batch)], _batch_sums(both, number, batch))
            start += len(batch)
            report("predict", number + 1, total)
    return _figures(blocks.names, sums, compared=len(both) == 2)


def _layer_done(report: Progress, what: str, total: int, index: int) -> None:
    report(what, index + 1, total)


@torch.no_grad()
def _batch_sums(walks: list[Walk], number: int, batch: np.ndarray) -> np.ndarray:
    """Sums over the predicted positions of each block of a batch, `[B, 5]` in float64.

    The vocabulary is wide and the divergence of a good stand-in small: few positions at a time, and in float64.
    """
    B, S = batch.shape
    size = max(1, _CHUNK_BYTES // (8 * B * vocabulary(walks[0].skeleton)))
    ids_BS = torch.from_numpy(np.ascontiguousarray(batch)).long()
    sums_B5 = torch.zeros(B, 5, dtype=torch.float64)
    sums_B5[:, _TOKENS] = S - 1
    start = 1
    for logits in zip(*(walk.logit_chunks(number, size) for walk in walks), strict=True):
        logp_BCV = [_log_probabilities(x) for x in logits]
        target_BC1 = ids_BS[:, start : start + logp_BCV[0].shape[1], None].to(logp_BCV[0].device)
        start += logp_BCV[0].shape[1]
        for column, logp in zip((_NLL, _ORIGINAL_NLL), logp_BCV, strict=False):
            sums_B5[:, column] -= logp.gather(-1, target_BC1).sum((1, 2)).cpu()
        if len(walks) == 2:
            model_BCV, original_BCV = logp_BCV
            sums_B5[:, _AGREE] += (model_BCV.argmax(-1) == original_BCV.argmax(-1)).sum(1).cpu()
            sums_B5[:, _KL] += _divergence(original_BCV, model_BCV).cpu()
    for walk, column in zip(walks, (_NLL, _ORIGINAL_NLL), strict=False):
        _check(walk, sums_B5[:, column])
    _check(walks[0], sums_B5[:, _KL])
    return sums_B5.numpy()


def _log_probabilities(logits_BCV: torch.Tensor) -> torch.Tensor:
    if logits_BCV.device.type == "mps":  # has no float64
        logits_BCV = logits_BCV.cpu()
    return torch.log_softmax(logits_BCV.double(), dim=-1)


def _divergence(p_BCV: torch.Tensor, q_BCV: torch.Tensor) -> torch.Tensor:
    """Sum of KL(p || q) over the positions of each block, `[B]`, from log-probabilities."""
    difference = p_BCV - q_BCV
    # Some families mask parts of their vocabulary with -inf; what p never says adds nothing, not 0 x NaN.
    difference.masked_fill_(p_BCV == -math.inf, 0)
    return difference.mul_(p_BCV.exp()).sum((1, 2))


def _check(walk: Walk, sums_B: torch.Tensor) -> None:
    if not bool(torch.isfinite(sums_B).all()):
        folder, dtype = walk.skeleton.checkpoint.folder, str(walk.skeleton.dtype).removeprefix("torch.")
        raise NumericError(
            f"{folder}: what it predicts is NaN or infinite in {dtype}; try --dtype float32, or check the checkpoint"
        )


def _figures(names: tuple[str, ...], sums: np.ndarray, compared: bool) -> Quality:
    rows = [*zip(names, sums, strict=True), (ALL, sums.sum(0))]

    def means(column: int) -> dict[str, float]:
        return {name: float(row[column] / row[_TOKENS]) for name, row in rows if row[_TOKENS]}

    def perplexity(column: int) -> dict[str, float]:
        # 700 nats a token is past anything but a broken model, and near the end of floating point
        return {name: math.exp(min(nats, 700.0)) for name, nats in means(column).items()}

    if not compared:
        return Quality(perplexity(_NLL), None, None, None)
    return Quality(perplexity(_NLL), perplexity(_ORIGINAL_NLL), means(_KL), means(_AGREE))
