"""MSAN: keep the experts whose squared outputs are largest on average."""

from understudy.methods import Method

MSAN = Method(
    name="msan",
    score="msan",
    kind="drop",
    scopes=("layer", "model"),
    paper="mean squared expert activation norm (MSAN), arXiv 2606.15716",
)
