"""Frequency: keep the experts that are chosen most, the plain baseline of the field."""

from understudy.methods import Method

FREQUENCY = Method(
    name="frequency",
    score="frequency",
    kind="drop",
    scopes=("layer", "model", "mass"),
    paper="expert frequency, the baseline in arXiv 2510.13999 and others",
)
