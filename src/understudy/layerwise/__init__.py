"""Layers one by one, each toward what the same layer of the teacher puts out: by descent, or solved for."""
