"""Colour operations on batches of float images in [0, 1], one set of parameters per image.

Formulas are torchvision's for float tensors. Brightness, contrast and saturation are one operation with three weights,
x <- clip(gain x + by_gray gray(x) + by_mean mean(gray(x))), so a chain of them in a different order for each image is a
chain of the same operation with different weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_GRAY = (0.2989, 0.587, 0.114)
"""torchvision's rgb_to_grayscale."""


def where_chosen(chosen: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """`operation(images, *parameters)` for the chosen images, the others unchanged.

    On the CPU only the chosen images are computed. On other devices all are: picking them would need their number on
    the host, and waiting for it would stall the device.

    Args:
        chosen: bool [N].
        operation: Takes images and parameters of some number of images, returns images.
        images: [N, 3, s, s]; may be overwritten.
        parameters: Each [N].
    """
    if images.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], operation(images, *parameters), images)
    number = chosen.nonzero()[:, 0]
    if len(number) == 0:
        return images
    picked = operation(images.index_select(0, number), *(p.index_select(0, number) for p in parameters))
    return images.index_copy_(0, number, picked)


def gray(images: Tensor) -> Tensor:
    """[N, 3, s, s] -> [N, s, s]."""
    red, green, blue = images.unbind(1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def to_gray(images: Tensor) -> Tensor:
    """[N, 3, s, s] -> the same shape without colour."""
    return gray(images)[:, None].expand_as(images)


def linear_step(images: Tensor, weights: Tensor, *, use_gray: bool, use_mean: bool) -> Tensor:
    """clip(gain x + by_gray gray(x) + by_mean mean(gray(x))).

    Args:
        images: [N, 3, s, s]; overwritten.
        weights: gain, by_gray and by_mean of each image, [3, N].
        use_gray: Whether any by_gray may differ from 0.
        use_mean: Whether any by_mean may differ from 0.
    """
    gain, by_gray, by_mean = weights[:, :, None, None]  # each [N, 1, 1]
    if not (use_gray or use_mean):
        return images.mul_(gain[:, None]).clamp_(0, 1)
    level = gray(images)  # [N, s, s]
    shift = by_mean * level.mean((1, 2), keepdim=True) if use_mean else 0.0
    if use_gray:
        shift = level.mul_(by_gray).add_(shift)
    assert isinstance(shift, Tensor)
    return torch.addcmul(shift[:, None], images, gain[:, None]).clamp_(0, 1)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotates the hue of [N, 3, s, s] by `turns` [N] (1 = the whole circle): RGB -> HSV -> RGB in closed form.

    With V = max, C = max - min and h = 6 x hue, channel n of (5, 3, 1) is V - C clip(min(k, 4 - k), 0, 1),
    k = (n + h) mod 6.
    """
    red, green, blue = images.unbind(1)
    value, lowest = images.amax(1), images.amin(1)
    chroma = value - lowest
    inverse = torch.where(chroma == 0, 1.0, chroma).reciprocal_()
    # Where two channels share the maximum, the first one decides, as in torchvision.
    h = torch.where(value == green, (blue - red) * inverse + 2, (red - green) * inverse + 4)
    h = torch.where(value == red, (green - blue) * inverse, h).add_(6 * turns[:, None, None])
    out = torch.empty_like(images)
    for channel, n in enumerate((5, 3, 1)):
        k = (h + n).remainder_(6)
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, chroma, k, value=-1, out=out[:, channel])
    return out


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Inverts the values from the threshold on."""
    return torch.where(images < threshold, images, 1 - images)
