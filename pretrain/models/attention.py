"""Which attention kernel a ViT runs, as a switch: the fused one, or plain softmax attention.

`auto` is fused but for bfloat16 on a CPU, where the fused kernel's backward is 2.5 times slower than plain.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Kernel = Literal["auto", "fused", "math"]


def set_attention(backbone: nn.Module, kernel: Kernel) -> None:
    """Fix the kernel, or let a hook of the backbone choose it before every forward pass."""
    if kernel == "auto":
        backbone.register_forward_pre_hook(_choose)
    else:
        _set_fused(backbone, kernel == "fused")


def prepare_attention(backbone: nn.Module, x: Tensor) -> None:
    """Run the hook of `auto` for callers that go through the blocks themselves."""
    for hook in backbone._forward_pre_hooks.values():
        if hook is _choose:
            hook(backbone, (x,))


def _choose(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0]
    if x.device.type != "cpu":
        return
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    fused = low != torch.bfloat16
    if backbone.__dict__.get("_fused", True) != fused:
        _set_fused(backbone, fused)
        backbone.__dict__["_fused"] = fused


def _set_fused(backbone: nn.Module, fused: bool) -> None:
    for module in backbone.modules():
        if "fused_attn" in module.__dict__:
            module.__dict__["fused_attn"] = fused
