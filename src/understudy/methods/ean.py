"""EAN: keep the experts whose outputs are largest, summed over the tokens."""

from understudy.methods import Method

EAN = Method(
    name="ean",
    score="ean",
    kind="drop",
    scopes=("layer", "model", "mass"),
    paper="expert activation norm, MC-Suite, arXiv 2504.05586",
)
