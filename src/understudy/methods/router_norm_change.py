"""Router norm change: keep the experts whose router rows grew most in fine-tuning."""

from understudy.methods import Method

ROUTER_NORM_CHANGE = Method(
    name="router_norm_change",
    score="router_norm_change",
    kind="drop",
    scopes=("layer", "model"),
    paper="provable expert pruning by the change of the router's norm, arXiv 2405.16646",
)
