"""Weights of other code bases: the official FLIP checkpoints, and open_clip models both ways."""
