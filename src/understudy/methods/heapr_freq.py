"""HEAPr with scores that count how often an expert is used: our variant, not the paper's."""

from __future__ import annotations

from understudy.channel_scores.heapr_freq import HEAPR_FREQ as SCORE
from understudy.methods import Method
from understudy.methods.heapr import ranked

HEAPR_FREQ = Method(
    name="heapr_freq",
    kind="slim",
    kinds=("slim",),
    choose=lambda problem, ratio: ranked(problem, ratio, "heapr_freq"),
    needs=SCORE.needs,
    paper="a variant of HEAPr (arXiv 2509.22299) that weights an expert's channels by the tokens it saw",
)
