"""Replacing without a base: a baseline of LightMoE's paper, in which low-rank parts alone stand for an expert."""

from understudy.methods.lightmoe import direct

REPLACE_ADAPTERS = direct(
    "replace_adapters",
    bases=0,
    paper="replacing with low-rank parts alone, the baseline `Replace w/o shared` of LightMoE, arXiv 2603.12645",
)
