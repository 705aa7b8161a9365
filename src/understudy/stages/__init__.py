"""The stages: each reads files and writes only its own; they never import each other, except `compress`."""
