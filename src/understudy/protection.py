"""Experts that no plan may touch: whole layers by name, and super experts by what their outputs reach.

Letter: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from understudy.entries import Entry, ids_of
from understudy.errors import PlanError
from understudy.stats import ExpertStats

SUPER_NEEDS = ("output_max",)
_PERCENTILE, _OF_LARGEST = 99.5, 0.1  # both are to be exceeded


def layers_named(text: str, known: Collection[str]) -> list[str]:
    """Read `0,3,12-15` as keys of layers, in the order of `known`.

    Raises:
        PlanError: not a list of layers, or a layer that the model has not.
    """
    named: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        ends = re.fullmatch(r"([0-9]{1,6})\s*-\s*([0-9]{1,6})", part)
        if not part or (ends and int(ends[1]) > int(ends[2])):
            raise PlanError(f"--keep-layers {text}: {part!r} names no layer; write layers and ranges like 0,3,12-15")
        named += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part]
    if unknown := [key for key in named if key not in known]:
        raise PlanError(
            f"--keep-layers {text}: the model has no MoE layer {unknown[0]}; those that it has are {_listed(known)}"
        )
    return [key for key in known if key in named]


def super_experts(layers: Mapping[str, ExpertStats]) -> dict[str, frozenset[int]]:
    """Return the ids of super experts by layer, in which there are some (arXiv 2507.23279).

    Those are experts whose largest absolute output exceeds the 99.5th percentile over all experts of the model, and a
    tenth of the largest of all: a few experts early in a model drive its massive activations, and it does not survive
    their loss.
    """
    everything = np.concatenate([np.asarray(layer.output_max) for layer in layers.values()])
    bound = max(np.percentile(everything, _PERCENTILE), _OF_LARGEST * everything.max())
    found = {key: np.flatnonzero(np.asarray(layer.output_max) > bound) for key, layer in layers.items()}
    return {key: frozenset(ids.tolist()) for key, ids in found.items() if len(ids)}


def super_note(experts: Mapping[str, Collection[int]]) -> str:
    """Say how many super experts there are and where."""
    where = "; ".join(f"layer {key}: {', '.join(map(str, sorted(ids)))}" for key, ids in experts.items())
    number = sum(map(len, experts.values()))
    return f"super experts that stay as they are: {number} ({where})" if number else "no expert is a super expert"


def refuse_touched(
    chosen: Mapping[str, Mapping[str, Entry]], may: Collection[str], protected: Mapping[str, Collection[int]], who: str
) -> None:
    """Make sure that a choice leaves alone what is protected.

    Raises:
        PlanError: it names a layer outside of `may`, or an expert in `protected`.
    """
    for key, kinds in chosen.items():
        if key not in may:
            raise PlanError(
                f"layer {key}: {who} would change this layer, which is to stay as it is; use another method"
            )
        touched = {i for entry in kinds.values() for i in ids_of(entry)} & set(protected.get(key, ()))
        if touched:
            raise PlanError(
                f"layer {key}: {who} would change expert {min(touched)}, a super expert; leave out --keep-super, or "
                "use a method that replaces single experts by their score"
            )


def _listed(keys: Collection[str]) -> str:
    """Join runs of numbers, `0-15`: sixty numbers are hard to read."""
    runs: list[list[str]] = []
    for key in keys:
        follows = runs and key.isdecimal() and runs[-1][-1].isdecimal() and int(key) == int(runs[-1][-1]) + 1
        runs[-1].append(key) if follows else runs.append([key])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
