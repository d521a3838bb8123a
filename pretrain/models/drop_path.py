"""Stochastic depth as DINOv2 has it: one rate for all blocks, and branches that see a part of the batch only.

The usual form draws for each sample whether a branch is added, and still computes all of them. Here n = int(B (1 - p))
samples pass through the branch f and the others are not computed (DINOv2 section 5, "Efficient stochastic depth"):

    x_i <- x_i + B/n f(x_i) for the n samples drawn, x_i for the others;  mean over the draws: x_i + f(x_i)

Source: facebookresearch/dinov2@b8931f7 `drop_add_residual_stochastic_depth`, used there for rates above 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

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


class SharedDropPath(DropPath):
    """timm's DropPath with the kept share in a tensor, so that compiled code serves blocks of every rate.

    A rate that is a number is a part of the code: of 12 blocks each would be compiled anew, and torch stops at 8.
    """

    keep: Tensor

    def __init__(self, rate: float, like: Tensor):
        super().__init__(rate)
        self.register_buffer("keep", torch.tensor(1 - rate, dtype=like.dtype, device=like.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] with whole samples set to zero, the others scaled to keep the mean."""
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = torch.rand(shape, dtype=self.keep.dtype, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


def share_rates(blocks: Iterable[nn.Module]) -> None:
    """Make the blocks of a network that drops samples alike, for compilation: their rates are tensors, 0 included."""
    blocks = [block for block in blocks if isinstance(block, Block) and not isinstance(block, SubsetBlock)]
    branches = ("drop_path1", "drop_path2")
    if not any(isinstance(getattr(block, branch), DropPath) for block in blocks for branch in branches):
        return
    for block in blocks:
        for branch in branches:
            rate = getattr(getattr(block, branch), "drop_prob", 0.0)  # nn.Identity where it is 0
            setattr(block, branch, SharedDropPath(rate, next(block.parameters())))


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
