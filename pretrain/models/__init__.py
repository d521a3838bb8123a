"""Backbones, prototypes, the vMF normaliser, heads, and the checkpoint files that hold them."""
