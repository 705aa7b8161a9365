"""MoNE: Mixture of Novices and Experts."""

from understudy.methods import Method

MONE = Method(
    name="mone",
    score="mone",
    kind="constant",
    scopes=("layer", "model"),
    paper="MoNE: replacing redundant experts with lightweight novices, arXiv 2507.00390",
)
