"""AIMER: keep the experts whose weights are least even, without any text."""

from understudy.methods import Method

AIMER = Method(
    name="aimer",
    score="aimer",
    kind="drop",
    scopes=("layer", "model"),
    paper="AIMER: calibration-free expert pruning, arXiv 2603.18492",
)
