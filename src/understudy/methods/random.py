"""Random: the control that every method has to beat."""

from understudy.methods import Method

RANDOM = Method(
    name="random",
    score="random",
    kind="drop",
    scopes=("layer", "model"),
    paper="uniform choice, the control",
)
