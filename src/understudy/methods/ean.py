"""EAN: keep the experts whose outputs are largest, summed as in MC-Suite or averaged as in MAN."""

from understudy.methods import Method

EAN = Method(
    name="ean",
    score="ean",
    kind="drop",
    scopes=("layer", "model"),
    paper="expert activation norm, MC-Suite, arXiv 2504.05586",
)
EAN_MEAN = Method(
    name="ean_mean",
    score="ean_mean",
    kind="drop",
    scopes=("layer", "model"),
    paper="mean expert activation norm (MAN), arXiv 2606.15716",
)
