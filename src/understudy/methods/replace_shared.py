"""Replacing with one shared base a layer: a baseline of LightMoE's paper, which trains it without fading out."""

from understudy.methods.lightmoe import direct

REPLACE_SHARED = direct(
    "replace_shared",
    bases=1,
    paper="replacing with one shared base a layer, the baseline `Replace w. shared` of LightMoE, arXiv 2603.12645",
)
