"""Models as training needs them: whole in memory, and beside them the originals they were made from."""

from __future__ import annotations

from typing import Any

from understudy.errors import PlanError
from understudy.plans import Plan
from understudy.runtime import quiet_transformers
from understudy.skeleton import Skeleton


def load_whole(skeleton: Skeleton) -> Any:
    """Load all of a model as transformers does, in the dtype of its skeleton."""
    with quiet_transformers():
        model = type(skeleton.model).from_pretrained(skeleton.checkpoint.folder, dtype=skeleton.dtype)
    return model.train()


def keep_originals(model: Any, student: Skeleton, teacher: Skeleton) -> None:
    """Give experts that share bases the experts that they replace, read layer by layer, to fade them out."""
    for layer in student.layers:
        bases = getattr(model.get_submodule(layer.name), "bases", None)
        if bases is None or not bases.dominants:
            continue
        theirs = next(other for other in teacher.layers if other.key == layer.key)
        with teacher.resident(theirs.index):
            bases.keep_originals(teacher.model.get_submodule(theirs.name))


def check_original(teacher: Skeleton, student: Skeleton, plan: Plan | None, *, fewer: bool = False) -> None:
    """Refuse a teacher whose layers are not those that the student's were made from; `fewer` experts may be left.

    Raises:
        PlanError: it is another model than the plan was made for, or its layers have other sizes.
    """
    mine, found = student.checkpoint.folder, teacher.checkpoint.fingerprint
    if plan is not None and plan.model.fingerprint != found:
        raise PlanError(
            f"--teacher {teacher.checkpoint.folder} is another model ({found}) than the {plan.model.source} "
            f"({plan.model.fingerprint}) that {mine} was made from"
        )
    sizes: list[dict[str, tuple[int, ...]]]
    sizes = [{layer.key: (layer.num_experts, layer.hidden_size) for layer in s.layers} for s in (student, teacher)]
    depths = [len(s.decoder_layers) for s in (student, teacher)]
    if fewer:
        sizes = [{key: size[1:] for key, size in layers.items()} for layers in sizes]
    if not sizes[0].items() <= sizes[1].items() or depths[0] != depths[1]:
        raise PlanError(
            f"--teacher {teacher.checkpoint.folder} has other MoE layers than {mine}; give the original model"
        )
