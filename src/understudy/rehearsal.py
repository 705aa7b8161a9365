"""Made-up statistics: to see, before any text is read, whether a plan could be made at all.

Letters: E experts, H hidden size, I expert width, K top-k, N tokens, P subsets of experts, S distinct sets.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from understudy.facts import LayerFacts, ModelFacts
from understudy.stats import Stats
from understudy.sums import FEW, RANKS, ExpertStats, group_of, required_fields

# Fields that are not [E] by their letters; of the channels group, those that are not [E, I].
_SHAPES = {
    "tokens": "",
    "weight_numel": "",
    "sequences": "",
    "logit_norm_sum": "",
    "moe_cos_sum": "",
    "block_cos_sum": "",
    "dense_tokens": "",
    "local_loss_sum": "",
    "mean": "EH",
    "weighted_mean": "EH",
    "dense_sum": "EH",
    "candidate_gram": "EE",
    "candidate_sq": "",
    "candidate_scale": "",
    "logit_gram": "EE",
    "logit_cos_sum": "EE",
    "dense_cos_sum": "EE",
    "dense_hsic": "EE",
    "dense_activations": "EIN",
    "topk_sets": "SK",
    "topk_counts": "S",
    "subset_loss": "P",
    "activation_gram": "EII",
    "down_gram": "EII",
    "affine_in": "EHR",
    "affine_out": "ERH",
    "affine_mean": "EH",
    "affine_gain": "ER",
    "gradient_count": "E",
    "gradient_tokens": "",
    "gradient_down_gram": "EII",
    "attribution_sum": "E",
    "towards_sum": "E",
    "modulation_sum": "EH",  # of one vector
    "modulation_square": "",
    "modulation_plain": "",
    "modulation_fitted": "",
    "modulation_main_k": "",
    "modulation_vectors": "",
    "modulation_renormalise": "",
}
SUBSETS_OF = 10  # experts at most, of which every subset is tried


def letters_of(name: str) -> str:
    """Return the shape of a field in letters: `EI` for experts times width, nothing for a number."""
    return _SHAPES.get(name, "EI" if group_of(name) in ("channels", "gradients") else "E")


def made_up(facts: ModelFacts, needs: Collection[str], weights_only: bool = False) -> Stats | None:
    """Return statistics of a model in which everything is 1, or None where the width of experts is needed and unknown.

    They hold what all statistics hold, and `needs`; arrays have the right shape and take no memory. Their data say that
    they are made up.
    """
    names = {*required_fields(), *needs}
    wide = any("I" in letters_of(name) for name in names)
    if wide and any(layer.width is None for layer in facts.layers.values()):
        return None
    layers = {key: _layer(layer, names) for key, layer in facts.layers.items()}
    return Stats(facts, {"weights_only": weights_only, "made_up": True}, layers)


def _layer(layer: LayerFacts, names: Collection[str]) -> ExpertStats:
    lengths = {"E": layer.experts, "H": layer.hidden, "I": layer.width or 0, "K": layer.top_k, "N": FEW, "S": 1}
    lengths["R"] = min(RANKS, layer.hidden)
    lengths["P"] = 1 << layer.experts if layer.experts <= SUBSETS_OF else 0
    ones = {name: np.broadcast_to(np.float64(1), [lengths[x] for x in letters_of(name)]) for name in names}
    if "topk_sets" in ones:
        ones["topk_sets"] = np.arange(layer.top_k, dtype=np.float64)[None]
    return ExpertStats(**ones)
