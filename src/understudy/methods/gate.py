"""Gate: keep the experts that the router leans on most, the expert trimming of many papers."""

from understudy.methods import Method

GATE = Method(
    name="gate",
    score="gate",
    kind="drop",
    scopes=("layer", "model", "mass"),
    paper="expert trimming by the mean gate, arXiv 2406.02500 and others",
)
