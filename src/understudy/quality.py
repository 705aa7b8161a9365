"""What a model makes of text, and how far it is from another: perplexity, KL divergence, top-1 agreement.

Both models are walked layer by layer, one after the other; only their embeddings and heads are resident together. The
original's walk serves any number of models.

Letters: N blocks, B blocks of a batch, S tokens of a block, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from understudy.data import Blocks
from understudy.errors import NumericError, UnsupportedModelError
from understudy.skeleton import Skeleton
from understudy.walk import Observe, Walk

Progress = Callable[[str, int, int], None]

ALL = "all"
TOKENS, NLL, ORIGINAL_NLL, KL, AGREE = range(5)  # columns of the sums of a block
_FAR = -80.0  # log p - log q: in float32 exp(88) is about the end
_CHUNK_BYTES = 64 << 20  # of one model's logits
_PIECE_BYTES = 1 << 20  # of these that are worked on at a time: what stays in the cache of a core


@dataclass(frozen=True)
class Quality:
    """Figures by source of text; those under "all" are over every predicted token of all sources."""

    perplexity: dict[str, float]
    original_perplexity: dict[str, float] | None
    kl: dict[str, float] | None  # KL(original || model), nats a token
    top1: dict[str, float] | None  # share of positions where both find the same token most likely
    kl_by_block: np.ndarray | None = None  # float64 [N], mean of each block, in the order of the blocks


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
        run(walk, observe, what, report)
    both = [walk for walk, _ in walks]
    sums_N5 = predict(both, report)
    rows = {name: sums_5 for name, sums_5 in by_source(blocks, sums_N5).items() if sums_5[TOKENS]}

    def means(column: int) -> dict[str, float]:
        return {name: float(sums_5[column] / sums_5[TOKENS]) for name, sums_5 in rows.items()}

    def perplexity(column: int) -> dict[str, float]:
        # 700 nats a token is past anything but a broken model, and near the end of floating point
        return {name: math.exp(min(nats, 700.0)) for name, nats in means(column).items()}

    if len(both) == 1:
        return Quality(perplexity(NLL), None, None, None)
    kl_N = sums_N5[:, KL] / sums_N5[:, TOKENS]
    return Quality(perplexity(NLL), perplexity(ORIGINAL_NLL), means(KL), means(AGREE), kl_N)


def run(walk: Walk, observe: Observe, what: str, report: Progress) -> None:
    """Take the blocks of a walk through all layers; their outputs are in its store afterwards."""
    with walk.ready():
        walk.through_layers(observe, done=lambda index: report(what, index + 1, walk.depth))


def predict(walks: Sequence[Walk], report: Progress) -> np.ndarray:
    """Compare what models predict whose walks are through: of each block the sums over its positions.

    Args:
        walks: of the model, then of the original if given, as in `measure`.
        report: called with ("predict", done, all).

    Returns:
        `[N, 5]` in float64: predicted tokens, negative log-likelihood of the model and of the original, KL(original ||
        model) in nats, positions of the same most likely token; zero where there is no original.

    Raises:
        NumericError: NaN or infinity in what is predicted.
    """
    batches = walks[0].batches
    sums = []
    with ExitStack() as stack:
        for walk in walks:
            stack.enter_context(walk.ready())
        for number, batch in enumerate(batches):
            sums.append(_batch_sums(walks, number, batch))
            report("predict", number + 1, len(batches))
    return np.concatenate(sums)


@torch.no_grad()
def overlap(model: Walk, original: Walk) -> float:
    """Return the mean over predicted tokens of the probability that two models share, sum_v min(p, q), 0 to 1.

    It is the expected rate at which one would accept the other's tokens (EvoESAP, arXiv 2603.06003). Both walks are
    through, over the same batches.
    """
    shared, tokens = 0.0, 0
    with model.ready(), original.ready():
        for number, batch in enumerate(model.batches):
            row = 4 * len(batch) * vocabulary(model.skeleton)
            size = max(1, _CHUNK_BYTES // row)
            for logits in zip(model.logit_chunks(number, size), original.logit_chunks(number, size), strict=True):
                p_BCV, q_BCV = (x.float().softmax(-1) for x in logits)
                shared += float(torch.minimum(p_BCV, q_BCV).sum(dtype=torch.float64))
                tokens += p_BCV.shape[0] * p_BCV.shape[1]
    return shared / tokens


def by_source(blocks: Blocks, sums_N5: np.ndarray) -> dict[str, np.ndarray]:
    """Add up the sums of blocks, float64 `[5]` by source of text; those of all are under "all", last."""
    sums = np.zeros((len(blocks.names), 5))
    np.add.at(sums, blocks.source, sums_N5)
    return dict(zip((*blocks.names, ALL), (*sums, sums.sum(0)), strict=True))


@torch.no_grad()
def _batch_sums(walks: Sequence[Walk], number: int, batch: np.ndarray) -> np.ndarray:
    """Sums over the predicted positions of each block of a batch, `[B, 5]` in float64."""
    B, S = batch.shape
    row = 4 * B * vocabulary(walks[0].skeleton)
    ids_BS = torch.from_numpy(np.ascontiguousarray(batch)).long()
    sums_B5 = torch.zeros(B, 5, dtype=torch.float64)
    sums_B5[:, TOKENS] = S - 1
    start = 1
    for logits in zip(*(walk.logit_chunks(number, max(1, _CHUNK_BYTES // row)) for walk in walks), strict=True):
        # a chunk makes one large product with the head; an accelerator then takes it whole
        C = logits[0].shape[1]
        size = max(1, _PIECE_BYTES // row) if logits[0].device.type == "cpu" else C
        for pieces in zip(*(x.split(size, dim=1) for x in logits), strict=True):
            target_BC = ids_BS[:, start : start + pieces[0].shape[1]].to(pieces[0].device)
            start += pieces[0].shape[1]
            for column, sum_B in _piece_sums(pieces, target_BC).items():
                sums_B5[:, column] += sum_B.cpu().double()
    for walk, column in zip(walks, (NLL, ORIGINAL_NLL), strict=False):
        _check(walk, sums_B5[:, column])
    _check(walks[0], sums_B5[:, KL])
    return sums_B5.numpy()


def _piece_sums(logits: Sequence[torch.Tensor], target_BC: torch.Tensor) -> dict[int, torch.Tensor]:
    """Sums over a few positions, `[B]` by column, from the logits `[B, C, V]` of the model and of the original."""
    logp = [torch.log_softmax(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in logits]
    sums = {
        column: -logp_BCV.gather(-1, target_BC[..., None]).sum((1, 2))
        for column, logp_BCV in zip((NLL, ORIGINAL_NLL), logp, strict=False)
    }
    if len(logp) == 2:
        model_BCV, original_BCV = logp
        sums[AGREE] = (model_BCV.argmax(-1) == original_BCV.argmax(-1)).sum(1)
        sums[KL] = _divergence(original_BCV, model_BCV)
    return sums


def _divergence(p_BCV: torch.Tensor, q_BCV: torch.Tensor) -> torch.Tensor:
    """Sum of KL(p || q) over the positions of each block, `[B]`, from log-probabilities.

    KL = sum p (d + exp(-d) - 1) with d = log p - log q, since sum q - p = 0. No term is negative and an error in d, of
    the normalisation above all, counts in the second order only: float32 gives what float64 gives to some 1e-7, and to
    1e-5 where models are only 5e-8 nats apart.
    """
    difference = p_BCV - q_BCV
    terms = torch.expm1(-difference).add_(difference).mul_(p_BCV.exp())
    # Some families mask parts of their vocabulary with -inf; there a term is what is left of it, q. So it is, to all
    # digits, where p is next to nothing beside q and exp(-d) would overflow.
    if bool((never := (p_BCV == -math.inf) | (difference < _FAR)).any()):
        terms = torch.where(never, q_BCV.exp(), terms)
    return terms.sum((1, 2))


def _check(walk: Walk, sums_B: torch.Tensor) -> None:
    if not bool(torch.isfinite(sums_B).all()):
        folder, dtype = walk.skeleton.checkpoint.folder, str(walk.skeleton.dtype).removeprefix("torch.")
        raise NumericError(
            f"{folder}: what it predicts is NaN or infinite in {dtype}; try --dtype float32, or check the checkpoint"
        )
