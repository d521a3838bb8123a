"""Stochastic depth as DINOv2 has it: one rate for all blocks, and branches that see a part of the batch only.

The usual form draws for each sample whether a branch is added, and still computes all of them. Here n = int(B (1 - p))
samples pass through the branch f and the others are not computed (DINOv2 section 5, "Efficient stochastic depth"):

    x_i <- x_i + B/n f(x_i) for the n samples drawn, x_i for the others;  mean over the draws: x_i + f(x_i)

Source: facebookresearch/dinov2@b8931f7 `drop_add_residual_stochastic_depth`, used there for rates above 0.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

MIN_SUBSET_RATE = 0.1
"""Up to this rate leaving out samples saves too little, as in the official code."""


class SubsetBlock(Block):
    """timm's Block whose branches see a random part of the batch in training. Parameters are the same."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]."""
        if not self.training:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        assert attn_mask is None, "a mask for all samples does not fit a part of them"
        assert isinstance(self.drop_path1, DropPath)
        rate = self.drop_path1.drop_prob
        x = add_to_subset(x, lambda part: self.ls1(self.attn(self.norm1(part), is_causal=is_causal)), rate)
        return add_to_subset(x, lambda part: self.ls2(self.mlp(self.norm2(part))), rate)


def add_to_subset(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    """x [B, ...] plus `branch` of n = max(int(B (1 - rate)), 1) samples drawn at random, scaled by B / n."""
    batch = x.shape[0]
    num = max(int(batch * (1 - rate)), 1)
    index = torch.randperm(batch, device=x.device)[:num]
    return torch.index_add(x, 0, index, branch(x[index]).to(x.dtype), alpha=batch / num)


def set_drop_path(vit: VisionTransformer, rate: float, *, uniform: bool, subset: bool) -> None:
    """Give all blocks one rate instead of timm's linear rise (`uniform`), and let them skip samples (`subset`)."""
    for block in vit.blocks:
        assert isinstance(block, Block)
        if uniform:
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        if subset and isinstance(block.drop_path1, DropPath) and block.drop_path1.drop_prob > MIN_SUBSET_RATE:
            block.__class__ = SubsetBlock
