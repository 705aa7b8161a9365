"""REAP: router-weighted expert activation pruning."""

from understudy.methods import Method

REAP = Method(
    name="reap",
    score="reap",
    kind="drop",
    scopes=("layer", "model"),
    paper="REAP: router-weighted expert activation pruning, arXiv 2510.13999",
)
