"""Crop + resize + flip of a whole batch as two matrix products, and the affine map before them.

Each output row is a weighted sum of image rows, each output column of image columns, so a crop is `Wy X Wx^T`. The
weights are those of PIL's antialiased bicubic filter (a = -0.5; torchvision's `antialias=True`), zero outside the crop
box; a flip reverses the rows of Wx.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, overwriting its argument; written with truncated powers, hence without branches.

    With u = max(2 - |x|, 0) and v = max(1 - |x|, 0): k(x) = u^2 (u - 1) / 2 + v^2 (1 - 2 v).
    """
    v = distance.abs_().neg_().add_(1)
    u = (v + 1).clamp_min_(0)
    v.clamp_min_(0)
    outer = torch.addcmul(u.square().mul_(-0.5), u.square().mul_(0.5), u)
    return torch.addcmul(outer, v.square(), v.mul(-2).add_(1))


def resize_weights(start: Tensor, length: Tensor, source: int, target: int, flip: Tensor | None = None) -> Tensor:
    """Weights that bring the pixels [start, start + length) of an axis to `target` pixels.

    Args:
        start: First pixel of the box, float [N].
        length: Pixels in the box, float [N].
        source: Pixels on the axis of the image (padding included).
        target: Pixels wanted.
        flip: Where to reverse the result, bool [N].

    Returns:
        float32 [N, target, source], rows summing to 1.
    """
    device = start.device
    scale = length / target  # [N]
    filter_scale = scale.clamp(min=1)
    out = torch.arange(target, device=device, dtype=scale.dtype)
    if flip is not None:
        out = torch.where(flip[:, None], target - 1 - out, out)
    # Positions within the box, in units of the filter: pixel j has its centre at j + 0.5.
    inverse = filter_scale.reciprocal()[:, None]
    centre = (out + 0.5) * (scale[:, None] * inverse)  # [N, target]
    pixel = torch.arange(source, device=device, dtype=scale.dtype) + 0.5 - start[:, None]  # [N, source]
    inside = ((pixel > 0) & (pixel < length[:, None])).float()
    weights = bicubic(((pixel * inverse)[:, None, :] - centre[:, :, None]).float()).mul_(inside[:, None, :])
    return weights.div_(weights.sum(-1, keepdim=True))


def crop_resize(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`Wy X Wx^T` for several crops of each image, clipped to [0, 1] as 8-bit pixels are (the cubic filter overshoots).

    Args:
        images: float32 [B, H, 3, W] in [0, 1] (rows outermost: the first product then needs no copy).
        rows: Wy of every crop, [V, B, s, H].
        columns: Wx of every crop, [V, B, s, W].

    Returns:
        float32 [V, B, 3, s, s].
    """
    num_views, batch, size, height = rows.shape
    width = columns.shape[-1]
    flat = images.reshape(batch, height, 3 * width)
    # One product per image for the rows of all its crops.
    tall = torch.bmm(rows.transpose(0, 1).reshape(batch, num_views * size, height), flat)
    tall = tall.view(batch * num_views, size * 3, width)
    wide = torch.bmm(tall, columns.transpose(0, 1).reshape(batch * num_views, size, width).mT)
    crops = wide.view(batch, num_views, size, 3, size).permute(1, 0, 3, 2, 4)
    return crops.clamp(0, 1).contiguous()


def affine(images: Tensor, sizes: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
    """Rotation and shear about the image centre, bilinear, black outside: torchvision's `F.affine` on float images.

    Args:
        images: float32 [N, 3, H, W], zero in the padding.
        sizes: Height and width of each image within its padding, [N, 2].
        angle: Radians, [N].
        shear: Along x, radians, [N].

    Returns:
        float32 [N, 3, H, W].
    """
    height, width = images.shape[-2:]
    centre_y, centre_x = (sizes.float() * 0.5).unbind(-1)  # [N]
    x = torch.arange(width, device=images.device) + 0.5 - centre_x[:, None]  # [N, W]
    y = torch.arange(height, device=images.device) + 0.5 - centre_y[:, None]  # [N, H]
    cos, sin, slope = angle.cos(), angle.sin(), shear.tan()
    # Inverse map (output pixel -> input pixel) of R(angle) Shear_x, as torchvision's _get_inverse_affine_matrix.
    from_x = torch.stack([(cos - sin * slope)[:, None] * x, -sin[:, None] * x], -1)  # [N, W, 2]
    from_y = torch.stack([(cos * slope + sin)[:, None] * y, cos[:, None] * y], -1)  # [N, H, 2]
    offset = torch.stack([centre_x, centre_y], -1)[:, None]
    # grid_sample counts from -1 to 1 over the padded image.
    unit = images.new_tensor([2.0 / width, 2.0 / height])
    grid = ((from_y + offset) * unit - 1)[:, :, None, :] + (from_x * unit)[:, None, :, :]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def blur_taps(radius: Tensor, taps: int) -> Tensor:
    """Gaussian weights of standard deviation `radius` [N] at -taps // 2 .. taps // 2, summing to 1: [N, taps]."""
    offset = torch.arange(taps, device=radius.device) - taps // 2
    weights = torch.exp(-0.5 * (offset / radius[:, None]).square())
    return weights / weights.sum(-1, keepdim=True)


def reflection(size: int, taps: int) -> Tensor:
    """For each tap the size x size matrix that shifts by its offset with reflection at the border: [taps, size, size]."""
    position = torch.arange(size)[None, :] + torch.arange(taps)[:, None] - taps // 2
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    position = torch.minimum(position, period - position) if size > 1 else torch.zeros_like(position)
    return F.one_hot(position, size).float()


def gaussian_blur(images: Tensor, radius: Tensor, shifts: Tensor) -> Tensor:
    """Separable Gaussian blur with its own radius per image, reflecting at the border.

    Args:
        images: [N, 3, s, s].
        radius: Standard deviations in pixels, [N].
        shifts: `reflection(s, taps)`.
    """
    taps, size = shifts.shape[:2]
    matrix = (blur_taps(radius, taps) @ shifts.view(taps, size * size)).view(-1, size, size)
    # Rows as one product per image over its three channels side by side, columns as one over them stacked.
    stacked = torch.bmm(images.reshape(-1, 3 * size, size), matrix.mT).view(-1, 3, size, size)
    return torch.matmul(matrix[:, None], stacked)

