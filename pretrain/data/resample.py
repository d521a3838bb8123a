"""Crop + resize + flip of a whole batch as two matrix products, and blur as two more.

Each output row is a weighted sum of image rows, each output column of image columns, so a crop is `Wy X Wx^T`. The
weights are those of PIL's antialiased bicubic filter (a = -0.5; torchvision's `antialias=True`), zero outside the crop
box; a flip reverses the rows of Wx.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.device import copy_to

_FAR = 1e4
"""A distance at which the filter is 0."""


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A small host array as a float32 tensor; the copy does not wait for the device."""
    return copy_to(torch.from_numpy(np.ascontiguousarray(array, np.float32)), device)


def bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, overwriting its argument.

    Written with truncated powers, hence without branches.

    With u = max(2 - |x|, 0) and v = max(1 - |x|, 0): k(x) = u^2 (u - 1) / 2 + v^2 (1 - 2 v).
    """
    u = distance.abs_().neg_().add_(2).clamp_min_(0)
    v = (u - 1).clamp_min_(0)
    outer = (u - 1).mul_(0.5).mul_(u).mul_(u)
    return outer.addcmul_(v.square(), v.mul_(-2).add_(1))


def resize_weights(
    start: np.ndarray,
    length: np.ndarray,
    source: int,
    target: int,
    device: torch.device,
    flip: np.ndarray | None = None,
) -> Tensor:
    """Weights that bring the pixels [start, start + length) of an axis to `target` pixels.

    Args:
        start: First pixel of the box, [N].
        length: Pixels in the box, [N].
        source: Pixels on the axis of the image (padding included).
        target: Pixels wanted.
        device: Where the weights are wanted.
        flip: Where to reverse the result, bool [N].

    Returns:
        float32 [N, target, source], rows summing to 1.
    """
    scale = length / target
    # In units of the filter's half width, which is as wide as an output pixel where the image shrinks.
    unit = 1 / np.maximum(scale, 1)
    step, first = scale * unit, 0.5 * scale * unit
    if flip is not None:
        first, step = np.where(flip, first + (target - 1) * step, first), np.where(flip, -step, step)
    table = to_device(np.stack([start, length, unit, 0.5 * unit, step, first]), device)[..., None]
    # Whole numbers, exact in float32; the centre of a pixel is half a pixel on.
    within = torch.arange(source, device=device, dtype=torch.float32) - table[0]  # [N, source]
    outside = (within < 0) | (within >= table[1])
    pixel = torch.addcmul(table[3], table[2], within).masked_fill_(outside, _FAR)
    centre = torch.addcmul(table[5], table[4], torch.arange(target, device=device))  # [N, target]
    weights = bicubic(pixel[:, None, :] - centre[:, :, None])
    return weights.div_(weights.sum(-1, keepdim=True))


def crop_resize(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`Wy X Wx^T` for several crops of each image.

    Args:
        images: float32 [B, H, C, W] (rows outermost: the first product then needs no copy).
        rows: Wy of every crop, [B, V, s, H].
        columns: Wx of every crop, [B, V, s, W].

    Returns:
        float32 [B, V, s, C, s].
    """
    batch, num_views, size, height = rows.shape
    channels, width = images.shape[2:]
    # One product per image for the rows of all its crops.
    tall = torch.bmm(rows.reshape(batch, num_views * size, height), images.reshape(batch, height, channels * width))
    wide = torch.bmm(tall.view(batch * num_views, size * channels, width), columns.flatten(0, 1).mT)
    return wide.view(batch, num_views, size, channels, size)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Several affine maps of each image, bilinear, black outside.

    Args:
        images: float32 [B, C, H, W], zero in the padding.
        matrices: From output to input positions, both from -1 to 1 over H and W, [B, V, 2, 3].

    Returns:
        float32 [B, C, V, H, W].
    """
    channels, height, width = images.shape[1:]
    batch, num_views = matrices.shape[:2]
    y, x = (((torch.arange(n, device=images.device) * 2 + 1) / n - 1)[:, None] for n in (height, width))
    by_x, by_y, constant = matrices[:, :, None].unbind(-1)  # each [B, V, 1, 2]
    grid = (by_y * y + constant)[:, :, :, None] + (by_x * x)[:, :, None]  # [B, V, H, W, 2]
    # The maps of one image share it: one tall output each.
    grid = grid.view(batch, num_views * height, width, 2)
    turned = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return turned.view(batch, channels, num_views, height, width)


def blur_taps(radius: np.ndarray, taps: int) -> np.ndarray:
    """Gaussian weights of standard deviation `radius` [N] at -taps // 2 .. taps // 2, summing to 1: [N, taps]."""
    offset = np.arange(taps) - taps // 2
    weights = np.exp(-0.5 * np.square(offset / radius[:, None]))
    return weights / weights.sum(-1, keepdims=True)


def reflection(size: int, taps: int) -> Tensor:
    """For each tap the matrix that shifts by its offset, reflecting at the border: [taps, size, size]."""
    position = torch.arange(size) + torch.arange(taps)[:, None] - taps // 2
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    return F.one_hot(torch.minimum(position, period - position), max(size, 2))[..., :size].float()


def gaussian_blur(images: Tensor, taps: Tensor, shifts: Tensor) -> Tensor:
    """Separable blur with its own weights per image, reflecting at the border.

    Args:
        images: [N, C, s, s].
        taps: `blur_taps` of each image, [N, taps].
        shifts: `reflection(s, taps)`.
    """
    num_taps, size = shifts.shape[:2]
    matrix = (taps @ shifts.view(num_taps, size * size)).view(-1, size, size)
    channels = images.shape[1]
    # The rows of the channels stacked are one product per image.
    blurred = torch.bmm(images.reshape(-1, channels * size, size), matrix.mT).view(-1, channels, size, size)
    return torch.matmul(matrix[:, None], blurred)
