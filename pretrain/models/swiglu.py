"""SwiGLU, the gated MLP of DINOv2's largest model (Shazeer, arXiv 2002.05202; DINOv2 appendix B).

    y = W_3 (SiLU(W_1 x) * (W_2 x)),  W_1 and W_2 stored as one matrix

Source: facebookresearch/dinov2@b8931f7 `SwiGLUFFNFused`. Its names `w12` and `w3` are timm's `fc1` and `fc2`.
"""

from __future__ import annotations

from typing import Any

from timm.layers.mlp import GluMlp
from torch import nn


class SwiGLU(GluMlp):
    """Replaces the MLP of a timm Block: about as many parameters as an MLP of `hidden_features`."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: object = None, **kwargs: Any):
        """`act_layer`, which a Block hands on, is that of an MLP: the gate is always SiLU."""
        width = swiglu_width(hidden_features)
        super().__init__(in_features, 2 * width, act_layer=nn.SiLU, gate_last=False, **kwargs)

    def init_weights(self) -> None:
        """The gate starts as every other Linear does in DINOv2; timm would start it nearly constant."""


def swiglu_width(hidden_features: int) -> int:
    """Width of the gate: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (int(hidden_features * 2 / 3) + 7) // 8 * 8
