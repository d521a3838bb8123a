"""Colour operations on batches of float images in [0, 1], one set of parameters per image.

Images have C = 3 channels, or C = 1 standing for three equal ones. Formulas are torchvision's for float tensors.
Brightness, contrast and saturation are one operation with three weights, x <- clip(gain x + by_gray gray(x) + by_mean
mean(gray(x))), so a chain of them in a different order for each image is a chain of the same operation with different
weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain.data.device import copy_to
from pretrain.data.resample import to_device

_GRAY = (0.2989, 0.587, 0.114)
"""torchvision's rgb_to_grayscale."""


def where_chosen(
    chosen: np.ndarray, operation: Callable[..., Tensor], images: Tensor, parameters: np.ndarray | None = None
) -> Tensor:
    """`operation(images[, parameters])` for the chosen images, the others unchanged.

    On the CPU only the chosen images are computed; on other devices all are, so that every step launches the same work.

    Args:
        chosen: bool [N].
        operation: Takes images and parameters of some number of images, returns images.
        images: [N, C, s, s]; may be overwritten.
        parameters: [N] or [N, ...].
    """
    if not chosen.any():
        return images
    if images.device.type != "cpu":
        mask = copy_to(torch.from_numpy(chosen), images.device)[:, None, None, None]
        extra = () if parameters is None else (to_device(parameters, images.device),)
        return torch.where(mask, operation(images, *extra), images)
    extra = () if parameters is None else (to_device(parameters[chosen], images.device),)
    if chosen.all():
        return operation(images, *extra).contiguous()  # gray images repeat one channel: nothing could be written there
    number = torch.from_numpy(chosen.nonzero()[0])
    return images.index_copy_(0, number, operation(images.index_select(0, number), *extra))


def gray(images: Tensor) -> Tensor:
    """[N, C, s, s] -> [N, s, s]."""
    if images.shape[1] == 1:
        return images[:, 0] * sum(_GRAY)
    red, green, blue = images.unbind(1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def to_gray(images: Tensor) -> Tensor:
    """[N, C, s, s] -> the same shape without colour."""
    return gray(images)[:, None].expand_as(images)


def linear_step(images: Tensor, weights: Tensor, *, use_gray: bool, use_mean: bool) -> Tensor:
    """clip(gain x + by_gray gray(x) + by_mean mean(gray(x))).

    Args:
        images: [N, C, s, s]; overwritten.
        weights: gain, by_gray and by_mean of each image, [3, N].
        use_gray: Whether any by_gray may differ from 0.
        use_mean: Whether any by_mean may differ from 0.
    """
    gain, by_gray, by_mean = weights[:, :, None, None, None]  # each [N, 1, 1, 1]
    if not use_gray:
        if not use_mean:
            return images.mul_(gain).clamp_(0, 1)
        # The mean of the gray image is the gray of the mean colour.
        return torch.addcmul(by_mean * gray(images.mean((2, 3), keepdim=True))[:, None], images, gain).clamp_(0, 1)
    level = gray(images)[:, None]  # [N, 1, s, s]
    shift = by_gray * level
    if use_mean:
        shift = shift.addcmul_(by_mean, level.mean((2, 3), keepdim=True))
    return torch.addcmul(shift, images, gain).clamp_(0, 1)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotates the hue of [N, C, s, s] by `turns` [N] (1 = the whole circle): RGB -> HSV -> RGB in closed form.

    With V = max, C = max - min and h = 6 x hue, channel n of (5, 3, 1) is V - C clip(min(k, 4 - k), 0, 1),
    k = (n + h) mod 6.
    """
    if images.shape[1] == 1:
        return images
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
