"""One vector per image for retrieval, from images of any shape.

    multi_scale   mean of the pooled features over several sizes of the image, at unit length (eval_image_retrieval.py)
    cls_and_gem   CLS, then the patch tokens' generalised mean (mean of x^p)^(1/p), tokens clamped to >= 1e-6
                  (eval_copy_detection.py; Radenovic et al., arXiv 1711.02512)

Sources: facebookresearch/dino. Shapes: B images, D features, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import UsageError
from pretrain.models.backbones import last_tokens

GEM_SMALLEST = 1e-6


class Patches(NamedTuple):
    """Patch tokens of the last block after the final norm."""

    tokens: Tensor
    """[B, rows * columns, D]."""
    grid: tuple[int, int]
    """Rows and columns."""
    size: tuple[int, int]
    """Height and width of a patch, pixels."""


def multi_scale(backbone: nn.Module, images: Tensor, scales: Sequence[float]) -> Tensor:
    """Images [B, 3, H, W] -> [B, D] at unit length.

    The official code divides a batch by its norm as a whole, and takes batches of one.
    """
    total = images.new_zeros(())
    for scale in scales:
        scaled = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        total = total + backbone(whole_patches(backbone, scaled))
    return F.normalize(total / len(scales), dim=1)


def cls_and_gem(backbone: nn.Module, images: Tensor, power: float) -> Tensor:
    """Images [B, 3, H, W] -> [B, 2 D]; [B, D] pooled features for a backbone without patch tokens."""
    cls, patches = last_tokens(backbone, whole_patches(backbone, images))[0]
    if patches is None:
        return cls
    return torch.cat([cls, patches.clamp(min=GEM_SMALLEST).pow(power).mean(1).pow(1 / power)], dim=1)


def patch_tokens(backbone: nn.Module, images: Tensor) -> Patches:
    """The patch tokens of images [B, 3, H, W].

    Raises:
        UsageError: the backbone has no patch tokens.
    """
    from pretrain.models.positions import PositionalViT

    if not isinstance(backbone, PositionalViT):
        raise UsageError(f"patch tokens need a plain ViT, found {type(backbone).__name__}: this suite does not apply")
    images = whole_patches(backbone, images)
    tokens = last_tokens(backbone, images)[0][1]
    assert tokens is not None
    height, width = backbone.patch_embed.patch_size
    return Patches(tokens, backbone.grid(*images.shape[-2:]), (height, width))


def whole_patches(backbone: nn.Module, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] without the rows and columns at the end that fill no patch, where a ViT would refuse them.

    The official ViTs, and ours under model.pos_interpolation=dino, drop them by themselves.
    """
    from pretrain.models.positions import PositionalViT

    if not isinstance(backbone, PositionalViT) or backbone.pos_interpolation == "dino":
        return images
    height, width = backbone.patch_embed.patch_size
    rows, columns = images.shape[-2] // height, images.shape[-1] // width
    return images[..., : max(rows, 1) * height, : max(columns, 1) * width]


def thumbnail(image: Image.Image, longer_side: int) -> Image.Image:
    """The image with its longer side brought down to `longer_side` pixels (Lanczos); a smaller image stays as it is."""
    small = image.copy()
    small.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
    return small
