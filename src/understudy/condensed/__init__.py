"""Condensed layers (CD-MoE, arXiv 2412.00069): choose experts and layers, search for them, run and cut them."""
