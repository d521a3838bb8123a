"""Floating point operations of a training image, and the share of the machine that a training uses (MFU).

A multiply-add counts as 2. Counted are the products of the backbone and of the head: of every crop forward and
backward through the student (three times its forward pass) and of the global crops forward through the teacher.
Padding, recomputation and what an implementation saves (the last block is computed for its CLS token alone here) change
nothing: the figure belongs to the model, so that implementations of equal images per second have equal MFU.

Multiply-adds, with N tokens of width D, an MLP of width M, patches of P x P pixels, a bottleneck of Z, K prototypes:

    block               N (4 D^2 + 2 D M) weights, 2 N^2 D attention
    patch embedding     3 P^2 D per patch
    head                its MLP and Z K per crop
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.backbones import create_backbone
from pretrain.models.heads import HeadConfig
from pretrain.models.positions import PositionalViT
from pretrain.training.recipe import Recipe

NUM_TEACHER_VIEWS = 2


def per_image(recipe: Recipe) -> float:
    """FLOPs of an image of a DINO training with a ViT."""
    with torch.device("meta"):
        vit = create_backbone(recipe.model)
    assert isinstance(vit, PositionalViT), "FLOPs are counted for plain ViTs"
    head = head_flops(vit.embed_dim, recipe.head)
    views = [vit_flops(vit, view.size) + head for view in recipe.views.views]
    return 3 * sum(views) + sum(views[:NUM_TEACHER_VIEWS])


def vit_flops(vit: PositionalViT, side: int) -> float:
    """FLOPs of the forward pass of one square image, its side in pixels."""
    rows, columns = vit.grid(side, side)
    patches, patch = rows * columns, vit.patch_embed.patch_size
    tokens, width = patches + vit.num_prefix_tokens, vit.embed_dim
    total = 2 * patches * vit.patch_embed.proj.in_channels * patch[0] * patch[1] * width
    for block in vit.blocks:
        weights = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
        total += 2 * tokens * weights + 4 * tokens**2 * width
    return float(total)


def head_flops(width: int, config: HeadConfig) -> float:
    """FLOPs of the forward pass of one crop through the head: MLP and prototypes."""
    sizes = [width, *[config.hidden] * (config.layers - 1), config.bottleneck, config.num_prototypes]
    return 2.0 * sum(before * after for before, after in itertools.pairwise(sizes))


def counted(work: Callable[[], object]) -> float:
    """FLOPs of what `work()` computes in fact, as torch counts them; compiled blocks run uncompiled for it."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def mfu(images_per_second: float, flops_per_image: float, ceiling: float) -> float:
    """Useful FLOPs as a share of the ceiling (FLOP per second)."""
    return images_per_second * flops_per_image / ceiling
