"""EASY-EP: keep the experts that turn the hidden states most."""

from understudy.methods import Method

EASY_EP = Method(
    name="easy_ep",
    score="easy_ep",
    kind="drop",
    scopes=("layer", "model", "mass"),
    paper="EASY-EP: domain-specific pruning with a few demonstrations, arXiv 2504.06792",
)
