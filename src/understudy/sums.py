"""Sums over the routes of one MoE layer: what calibration adds up, and how two parts of a sample are merged.

Letters: E experts, H hidden size, I expert width, K top-k, S distinct sets; g the gate (the weight that the router
gives a route at the seam, renormalised where the family does so), y the output of an expert before its gate, h its
activations (what enters `down_proj`), d the gradient of the loss with respect to h, r the router's logits, N tokens,
`FEW` at most; W the matrix of `down_proj`, u the gradient of the loss with respect to what the routed experts put out
together for a token; for Compressed Experts a the share of an expert in the gates of a token's auxiliary experts, V
numbers of an expert's vectors (H, or what enters gate, up and down together); x what enters an expert, R = `RANKS`, or
H where that is less.

Groups other than the first are there when they were collected and the family allows it; else their fields are None.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from understudy.errors import StatsError

FEW = 64  # tokens of which every expert's activations are kept
RANKS = 32  # up to which affine maps are fitted
_VECTORS = (
    "mean",
    "weighted_mean",
    "dense_sum",
    "modulation_sum",
    "affine_mean",
)  # as long as experts times the hidden size: stored in float32
# longer still, up to as large as the weights: float32 in memory too
_SERIES = ("dense_activations", "activation_gram", "down_gram", "gradient_down_gram", "affine_in", "affine_out")
# of those, what is read from its file when it is looked at, not before
MAPPED = ("activation_gram", "down_gram", "gradient_down_gram", "affine_in", "affine_out")


def optional(group: str, merge: str = "sum") -> Any:
    """Declare a field that is collected with a group, and how two samples of it are merged."""
    return field(default=None, metadata={"group": group, "merge": merge})


@dataclass(frozen=True)
class ExpertStats:
    """Sums of one MoE layer, merged with `+`; float64 (see `exact_in`), any array type with NumPy's arithmetic."""

    tokens: Any  # [] tokens that entered the layer
    count: Any  # [E] routes
    gate_sum: Any  # [E] sum g
    gate_sq_sum: Any  # [E] sum g^2
    norm_sum: Any  # [E] sum |y|
    gated_norm_sum: Any  # [E] sum g |y|
    mean: Any  # [E, H] mean y
    scatter: Any  # [E] sum |y - mean|^2
    weighted_mean: Any  # [E, H] mean y, weighted by g^2
    weighted_scatter: Any  # [E] sum g^2 |y - weighted_mean|^2
    norm_sq_sum: Any = optional("outputs")  # [E] sum |y|^2
    output_max: Any = optional("outputs", "max")  # [E] largest absolute element of any y

    weight_abs_sum: Any = optional("weights", "same")  # [E] sum |w| over the matrices of the expert
    weight_sq_sum: Any = optional("weights", "same")  # [E] sum w^2
    weight_numel: Any = optional("weights", "same")  # [] weights of one expert that went into these
    router_norm: Any = optional("weights", "same")  # [E] norm of the router's row
    base_router_norm: Any = optional("base", "same")  # [E] the same in the checkpoint given as --base

    sequences: Any = optional("router")  # [] blocks of text
    logit_norm_sum: Any = optional("router")  # [] sum over tokens of |r|
    logit_gram: Any = optional("router")  # [E, E] sum over tokens of r_i r_j
    logit_cos_sum: Any = optional("router")  # [E, E] sum over blocks of the cosine of two logits' series in the block

    moe_cos_sum: Any = optional("stream")  # [] sum over tokens of cos(x, x + MoE(x)), shared experts included
    block_cos_sum: Any = optional("stream")  # [] sum over tokens of cos(input, output) of the decoder layer
    shift_norm_sum: Any = optional("stream")  # [E] sum s g |y|, s = max(0, 1 - cos(x, x + routed experts(x)))

    topk_sets: Any = optional("sets", "sets")  # [S, K] sets of experts that a token chose, ids ascending
    topk_counts: Any = optional("sets", "sets")  # [S] tokens that chose the set

    dense_tokens: Any = optional("dense")  # [] tokens that were sent through every expert
    dense_sum: Any = optional("dense")  # [E, H] sum y over those
    dense_cos_sum: Any = optional("dense")  # [E, E] sum over those of the cosine of two experts' y
    dense_hsic: Any = optional("dense")  # [E, E] sum over batches of |Yc_i^T Yc_j|_F^2, outputs centred in the batch
    dense_activations: Any = optional("dense", "first")  # [E, I, N] h on a few of those; merged: the first of both

    candidate_gram: Any = optional("candidates")  # [E, E] sum over tokens sent through every expert of y_i y_j
    candidate_dot: Any = optional("candidates")  # [E] sum over those of y r, r what the routed experts put out together
    candidate_sq: Any = optional("candidates")  # [] sum over those of |r|^2
    candidate_scale: Any = optional("candidates")  # [] sum over those of |h|^2, h the stream behind in units of r

    subset_loss: Any = optional("subsets")  # [2^E] sum over blocks of |F(x) - F_subset(x)|, bit e set: e stays; NAEE

    activation_sum: Any = optional("channels")  # [E, I] sum h
    activation_sq_sum: Any = optional("channels")  # [E, I] sum h^2
    gated_activation_sum: Any = optional("channels")  # [E, I] sum g^2 h
    gated_activation_sq_sum: Any = optional("channels")  # [E, I] sum g^2 h^2
    gated_activation_sq_max: Any = optional("channels", "max")  # [E, I] max g^2 h^2
    projection_sum: Any = optional("channels")  # [E, I] sum <h_k w_k, y> / |y|, w_k a column of down_proj
    up_sq_sum: Any = optional("channels")  # [E, I] sum of squares of what the activation function multiplies
    preactivation_sq_sum: Any = optional("channels")  # [E, I] sum of squares of what enters it; 0 where ungated
    down_sq_norm: Any = optional("channels", "same")  # [E, I] |w_k|^2
    attribution_sum: Any = optional("channels")  # [E] MoE-Slimming's first-order effect of the expert, clipped
    local_loss_sum: Any = optional("channels")  # [] sum over tokens of MoE-Slimming's local loss
    towards_sum: Any = optional("channels")  # [E] sum g |y| (1 - cos(x, y)), TENP

    gradient_sq_sum: Any = optional("gradients")  # [E, I] sum d^2
    effect_sq_sum: Any = optional("gradients")  # [E, I] sum (h d)^2
    gradient_count: Any = optional("gradients")  # [E] routes that d was seen of

    activation_gram: Any = optional("grams")  # [E, I, I] sum g^2 h h^T
    down_gram: Any = optional("grams", "same")  # [E, I, I] W^T W
    # with grams only
    gradient_tokens: Any = optional("gradients")  # [] tokens that u was seen of
    gradient_down_gram: Any = optional("gradients")  # [E, I, I] sum over all tokens of (W^T u) (W^T u)^T

    # vectors minus one that were fitted to each part of the sample, times sum a there: merged they are averages
    modulation_sum: Any = optional("modulation")  # [E, V]
    modulation_weight: Any = optional("modulation")  # [E] sum a over the tokens of the fit
    modulation_square: Any = optional("modulation")  # [] sum over tokens held out of |r|^2, r of all routed experts
    modulation_plain: Any = optional("modulation")  # [] sum over those of |r - r'|^2, r' with vectors of ones
    modulation_fitted: Any = optional("modulation")  # [] the same with the vectors
    modulation_main_k: Any = optional("modulation", "equal")  # [] for how many experts that run
    modulation_vectors: Any = optional("modulation", "equal")  # [] 1 or 3
    modulation_renormalise: Any = optional("modulation", "equal")  # [] 1: gates were scaled up, 0: they were not

    # y = weighted_mean + (x - affine_mean) A B, fitted to each part of the sample; merged: that of the larger part
    affine_in: Any = optional("low_rank", "affine")  # [E, H, R] A, the columns that matter most first
    affine_out: Any = optional("low_rank", "affine")  # [E, R, H] B
    affine_mean: Any = optional("low_rank", "affine")  # [E, H] mean x, weighted by g^2
    affine_gain: Any = optional("low_rank", "affine")  # [E, R] error that each further rank removes, by held-out routes
    affine_error: Any = optional("low_rank", "affine")  # [E] sum g^2 |y - weighted_mean|^2, the error of rank 0

    def __add__(self, other: ExpertStats) -> ExpertStats:
        """Merge two disjoint samples; the second moments by Chan's pairwise rule (Chan, Golub, LeVeque 1983).

        What one of the two lacks, the result lacks. Affine maps do not add: each expert keeps the one that was fitted
        where the sum of g^2 is larger, with its errors counted up to both, while means and constants are of both.

        Raises:
            StatsError: their vectors were fitted for different settings.
        """
        merged = {f.name: _merge(f, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        for mean, scatter, weight in (
            ("mean", "scatter", "count"),
            ("weighted_mean", "weighted_scatter", "gate_sq_sum"),
        ):
            a, b = ((getattr(x, weight), getattr(x, mean), getattr(x, scatter)) for x in (self, other))
            merged[mean], merged[scatter] = _chan(*a, *b)
        if merged["affine_in"] is not None:
            merged |= _affine(self, other)
        if merged["topk_sets"] is not None:
            merged["topk_sets"], merged["topk_counts"] = _union(self, other)
        return ExpertStats(**merged)

    def arrays(self) -> dict[str, np.ndarray]:
        """All sums that are there by name, as they are stored."""
        return {f.name: np.asarray(x) for f in fields(self) if (x := getattr(self, f.name)) is not None}


def required_fields() -> list[str]:
    """Return the fields that all statistics have."""
    return [f.name for f in fields(ExpertStats) if not f.metadata]


def group_of(name: str) -> str | None:
    """Return the group that a field is collected with; None for those that are always there."""
    found = next(f for f in fields(ExpertStats) if f.name == name)
    return found.metadata.get("group")


def groups_for(needs: Collection[str]) -> list[str]:
    """Return the groups that hold the given fields, sorted."""
    return sorted({group for name in needs if (group := group_of(name)) is not None})


def is_vector(name: str) -> bool:
    """Whether a field is stored in float32, being large."""
    return name in (*_VECTORS, *_SERIES)


def exact_in(name: str) -> type:
    """Return the type that a field has in memory."""
    return np.float32 if name in _SERIES else np.float64


def _merge(f: Any, a: Any, b: Any) -> Any:
    rule = f.metadata.get("merge", "sum")
    if a is None or b is None:
        return None
    if rule in ("same", "sets", "affine"):
        return a
    if rule == "equal":
        if a != b:
            what = f.name.removeprefix(f"{f.metadata['group']}_").replace("_", "-")
            raise StatsError(
                f"vectors fitted with --{what} {a:g} and {b:g} cannot be merged; calibrate with one of them"
            )
        return a
    if rule == "first":
        return a if a.shape[-1] >= FEW else np.concatenate((a, b[..., : FEW - a.shape[-1]]), axis=-1)
    return np.maximum(a, b) if rule == "max" else a + b


def _chan(weight_a: Any, mean_a: Any, m2_a: Any, weight_b: Any, mean_b: Any, m2_b: Any) -> tuple[Any, Any]:
    total = weight_a + weight_b
    share_b = weight_b / (total + (total == 0))  # where neither side saw a route, 0 and not 0/0
    delta = mean_b - mean_a
    return mean_a + delta * share_b[:, None], m2_a + m2_b + (delta * delta).sum(-1) * weight_a * share_b


def _affine(a: ExpertStats, b: ExpertStats) -> dict[str, np.ndarray]:
    """Return the maps fitted to the part that weighs more, by expert, for the mean of both."""
    weight_a, weight_b = np.asarray(a.gate_sq_sum), np.asarray(b.gate_sq_sum)
    larger, total = np.maximum(weight_a, weight_b), weight_a + weight_b
    more = np.where(larger > 0, total / np.where(larger > 0, larger, 1), 1)
    found = {}
    for name in ("affine_in", "affine_out", "affine_gain", "affine_error"):
        one, other = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        each = (-1, *[1] * (one.ndim - 1))
        found[name] = np.where((weight_b > weight_a).reshape(each), other, one)
        if name in ("affine_gain", "affine_error"):
            found[name] = found[name] * more.reshape(each)
    share_b = weight_b / np.where(total > 0, total, 1)
    found["affine_mean"] = a.affine_mean + (b.affine_mean - a.affine_mean) * share_b[:, None]
    return found


def _union(a: ExpertStats, b: ExpertStats) -> tuple[np.ndarray, np.ndarray]:
    """Join two lists of sets, adding the counts of those in both; sorted."""
    rows, where = np.unique(np.concatenate((a.topk_sets, b.topk_sets)), axis=0, return_inverse=True)
    counts = np.concatenate((a.topk_counts, b.topk_counts))
    return rows, np.bincount(where.ravel(), weights=counts, minlength=len(rows))
