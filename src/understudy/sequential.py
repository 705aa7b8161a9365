"""Calibrate the way CAMERA and REAM do: each layer's statistics come from the layers before it as they will be.

A layer is watched on what the compressed layers before it put out, its stand-ins are decided and made at once, and what
goes on to the next layer comes from them. Statistics taken this way lead to the same decisions when a plan is made of
them with the same method and ratio, and belong to no other.
"""

from __future__ import annotations

from typing import Any

from understudy.errors import PlanError
from understudy.facts import ModelFacts
from understudy.kinds import get_kind, stand_ins_of
from understudy.methods import Choice, Problem, get_method
from understudy.moe import MoELayer
from understudy.plans import Plan, PlanModel
from understudy.ranking import choose_lowest, planning_needs
from understudy.recipe import Calibration, Selection
from understudy.scores import get_score, score_layers
from understudy.stats import EXTRA, Stats
from understudy.sums import ExpertStats, groups_for
from understudy.virtual import made


def with_needs(settings: Calibration) -> Calibration:
    """Return settings that collect what their sequential method reads.

    Raises:
        PlanError: there is no such method, or it cannot go on without gradients through layers that come later.
    """
    if settings.sequential is None:
        if settings.sequential_ratio is not None:
            raise PlanError("--sequential-ratio has no effect without --sequential; leave it out")
        return settings
    method = get_method(settings.sequential)
    needs = planning_needs(method, Selection(method=method.name, ratio=0.5)) | set(get_kind(method.kind).needs)
    groups = {*settings.collect, *groups_for(needs)} & set(EXTRA)
    if "gradients" in groups:
        raise PlanError(f"--sequential {method.name}: gradients are of the whole model; use ream or camera")
    return settings.model_copy(update={"collect": tuple(sorted(groups))})


def as_planned(settings: Calibration, method: str, ratio: float | None) -> Calibration:
    """Return settings that calibrate for one method at one ratio; unchanged where nothing is replaced anyway.

    Raises:
        PlanError: the ratio is not known.
    """
    if ratio is None:
        raise PlanError(f"{method} is calibrated for one ratio; give --ratio instead of --size")
    if not 0 < ratio < 1:
        return settings
    return settings.model_copy(update={"sequential": method, "sequential_ratio": ratio})


class Sequential:
    """Decides on a layer as soon as its statistics are there, and makes the experts that it will have.

    Raises:
        PlanError: a method that cannot decide on one layer alone, or whose stand-ins need the model rebuilt.
    """

    def __init__(self, facts: ModelFacts, settings: Calibration) -> None:
        assert settings.sequential is not None
        self.facts, self.method = facts, get_method(settings.sequential)
        self.kind = get_kind(self.method.kind)
        self.ratio = settings.sequential_ratio
        if self.ratio is None or not 0 < self.ratio < 1:
            raise PlanError("--sequential needs --sequential-ratio, more than 0 and less than 1")
        if not self.kind.substitutes or "layer" not in self.method.scopes:
            raise PlanError(f"--sequential {self.method.name}: it cannot be made layer by layer; use ream or camera")
        self.settings = Selection(method=self.method.name, ratio=self.ratio, scope="layer")

    def __call__(self, layer: MoELayer, stats: ExpertStats, experts: Any) -> Any | None:
        """Return the layer's new experts, made of its live ones, which stay as they are; None where all stay."""
        plan = self._plan(layer.key, stats)
        stand_ins = stand_ins_of(plan, layer.key, self.facts.layers[layer.key])
        if not stand_ins:
            return None
        return made(layer, stand_ins, plan.layers[layer.key], plan.how, stats, experts)

    def _plan(self, key: str, stats: ExpertStats) -> Plan:
        mine = {key: self.facts.layers[key]}
        alone = Stats(self.facts.model_copy(update={"layers": mine}), {}, {key: stats})
        scores = score_layers(get_score(self.method.score), alone, self.settings) if self.method.score else None
        problem = Problem(alone, mine, self.settings, self.kind, scores)
        choice: Choice = (
            self.method.choose(problem, self.ratio or 0.0)
            if self.method.choose
            else choose_lowest(problem, self.method.mass)
        )
        return Plan(method=self.method.name, model=PlanModel.of(alone.model), how=choice.how, layers=choice.layers)
