"""MAN: keep the experts whose outputs are largest on average."""

from understudy.methods import Method

MAN = Method(
    name="man",
    score="man",
    kind="drop",
    scopes=("layer", "model"),
    paper="mean expert activation norm (MAN), arXiv 2606.15716",
)
