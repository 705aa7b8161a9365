"""SHAPE: keep the experts that observed sets of experts lean on in particular."""

from understudy.methods import Mass, Method

SHAPE = Method(
    name="shape",
    score="shape",
    kind="drop",
    scopes=("layer", "model", "mass"),
    mass=Mass(alpha=0.0, crossing=False),  # the smallest prefix that covers a share of the layer's mass is kept
    paper="SHAPE, arXiv 2606.09886",
)
