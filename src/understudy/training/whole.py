"""Models whole in memory, as training needs them."""

from __future__ import annotations

from typing import Any

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
