"""The random parameters of the batched views, drawn for all views and images at once.

Distributions are those of torchvision's `get_params` (RandomResizedCrop, ColorJitter, RandomAffine, RandomErasing) and of
the official DINO blur and solarize. Shape legend: V views, B images, T = 10 tries of torchvision's rejection loop.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pretrain.data.random_bits import uniforms
from pretrain.data.views import View, ViewsConfig

_TRIES = 10
"""torchvision's RandomResizedCrop and RandomErasing give up after as many boxes that do not fit."""
_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)

# First slot of each parameter. Every parameter keeps its slots whether it is in use or not, so that switching one
# operation on does not change the draws of another.
_SLOTS = {
    "area": 0,
    "ratio": 10,
    "top": 20,
    "left": 21,
    "flip": 22,
    "jitter": 23,
    "brightness": 24,
    "contrast": 25,
    "saturation": 26,
    "hue": 27,
    "order": 28,
    "hue_place": 29,
    "gray": 30,
    "blur": 31,
    "radius": 32,
    "solarize": 33,
    "rotation": 34,
    "shear": 35,
    "erase": 36,
    "erase_top": 37,
    "erase_left": 38,
    "erase_area": 40,
    "erase_ratio": 50,
}
_WIDE = {"area": _TRIES, "ratio": _TRIES, "erase_area": _TRIES, "erase_ratio": _TRIES}
_SLOTS_PER_VIEW = 64
"""Counters of view v start at 64 v; the noise of all views starts at 2^20, far above."""
NOISE_COUNTER = 1 << 20


class Draw:
    """Uniform numbers by parameter name for some views of a batch: `draw["flip"]` is float64 [V, B] ([T, V, B] if wide)."""

    def __init__(self, config: ViewsConfig, views: tuple[View, ...], streams: Tensor) -> None:
        self.config, self.views = config, views
        names = _used(config, views)
        slots = [(name, _SLOTS[name] + k) for name in names for k in range(_WIDE.get(name, 1))]
        counters = torch.tensor(
            [[_SLOTS_PER_VIEW * view.number + slot for view in views] for _, slot in slots], dtype=torch.int64
        ).to(streams.device, non_blocking=True)
        numbers = uniforms(streams, counters.flatten()).view(len(slots), len(views), -1)
        self._numbers: dict[str, Tensor] = {}
        start = 0
        for name in names:
            width = _WIDE.get(name, 1)
            self._numbers[name] = numbers[start : start + width] if name in _WIDE else numbers[start]
            start += width

    def __getitem__(self, name: str) -> Tensor:
        return self._numbers[name]

    def between(self, name: str, low: float, high: float) -> Tensor:
        """Uniform on [low, high): float32 [V, B]."""
        return self[name].mul(high - low).add_(low).float()


def _used(config: ViewsConfig, views: tuple[View, ...]) -> list[str]:
    """The parameters that the configured operations need."""
    names = ["area", "ratio", "top", "left"]
    names += ["flip"] * (config.flip > 0)
    if config.jitters:
        names += ["jitter", "order", "hue_place"]
        names += [name for name in ("brightness", "contrast", "saturation", "hue") if getattr(config, name) > 0]
    names += ["gray"] * (config.gray > 0)
    names += ["blur", "radius"] * any(view.blur > 0 for view in views)
    names += ["solarize"] * any(view.solarize > 0 for view in views)
    names += ["rotation"] * (config.rotation > 0) + ["shear"] * (config.shear > 0)
    if config.erase > 0:
        names += ["erase", "erase_top", "erase_left", "erase_area", "erase_ratio"]
    return names


def _first_fitting(
    width: Tensor, height: Tensor, fits: Tensor, other_width: Tensor, other_height: Tensor
) -> tuple[Tensor, Tensor]:
    """Of T boxes [T, V, B], the first that fits, else the other one [V, B]."""
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    found = fits.any(0)
    return (
        torch.where(found, width.gather(0, first)[0], other_width),
        torch.where(found, height.gather(0, first)[0], other_height),
    )


def crop_boxes(draw: Draw, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchvision's RandomResizedCrop.get_params for every view and image.

    Args:
        draw: The uniform numbers.
        sizes: Height and width of each image, [B, 2].

    Returns:
        top, left, height, width: whole numbers as float64 [V, B].
    """
    image_height, image_width = sizes[:, 0].double(), sizes[:, 1].double()  # [B]
    low = _column([view.scale[0] for view in draw.views], sizes.device)
    high = _column([view.scale[1] for view in draw.views], sizes.device)
    log_low, log_high = (math.log(r) for r in draw.config.ratio)
    area = (draw["area"] * (high - low) + low) * (image_height * image_width)
    ratio = (draw["ratio"] * (log_high - log_low) + log_low).exp_()
    width, height = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
    # The fallback is the central box of the whole image, cut where its ratio is outside the allowed range.
    ratio_low, ratio_high = draw.config.ratio
    whole_width = torch.minimum(image_width, (image_height * ratio_high).round_())
    whole_height = torch.minimum(image_height, (image_width / ratio_low).round_())
    found = fits.any(0)
    width, height = _first_fitting(width, height, fits, whole_width, whole_height)
    room_y, room_x = image_height - height, image_width - width
    top = torch.where(found, (draw["top"] * (room_y + 1)).floor_(), (room_y / 2).floor_())
    left = torch.where(found, (draw["left"] * (room_x + 1)).floor_(), (room_x / 2).floor_())
    return top, left, height, width


def erase_boxes(draw: Draw, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchvision's RandomErasing.get_params on size x size views; height 0 where nothing is erased. Each [V, B]."""
    area = (draw["erase_area"] * (_ERASE_SCALE[1] - _ERASE_SCALE[0]) + _ERASE_SCALE[0]) * (size * size)
    log_low, log_high = (math.log(r) for r in _ERASE_RATIO)
    ratio = (draw["erase_ratio"] * (log_high - log_low) + log_low).exp_()
    height, width = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    nothing = torch.zeros_like(draw["erase"])
    width, height = _first_fitting(width, height, (height < size) & (width < size), nothing, nothing)
    height = torch.where(draw["erase"] < draw.config.erase, height, nothing)
    top = (draw["erase_top"] * (size - height + 1)).floor_()
    left = (draw["erase_left"] * (size - width + 1)).floor_()
    return top, left, height, width


def affine_parameters(draw: Draw) -> tuple[Tensor, Tensor]:
    """Angle and shear along x in radians, float32 [V, B] (torchvision's RandomAffine)."""
    rotation, shear = math.radians(draw.config.rotation), math.radians(draw.config.shear)
    zeros = torch.zeros(len(draw.views), draw["area"].shape[-1], device=draw["area"].device)
    angle = draw.between("rotation", -rotation, rotation) if rotation else zeros
    return angle, draw.between("shear", -shear, shear) if shear else zeros


def jitter_parameters(draw: Draw) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Colour jitter as a chain of linear operations with the hue shift somewhere between them (see colour.py).

    A uniform order of n + 1 operations is a uniform order of n of them and a uniform place for the last.

    Returns:
        coefficients: float32 [S, 3, V, B], for each of the S linear steps the weights of pixel, gray and mean gray; the
            identity (1, 0, 0) where the image is not jittered.
        hue: shift in turns, float32 [V, B], or None.
        hue_place: the hue shift comes before the linear step of this number, int64 [V, B]; -1 where not jittered.
    """
    config = draw.config
    applied = draw["jitter"] < config.jitter
    names = [name for name in ("brightness", "contrast", "saturation") if getattr(config, name) > 0]
    steps = _linear_steps(draw, names, applied)
    if config.hue == 0:
        return steps, None, None
    place = (draw["hue_place"] * (len(names) + 1)).long()
    return steps, draw.between("hue", -config.hue, config.hue), torch.where(applied, place, -1)


def _linear_steps(draw: Draw, names: list[str], applied: Tensor) -> Tensor:
    """The weights [S, 3, V, B] of the S named operations in the order drawn for each view."""
    device = applied.device
    if not names:
        return torch.empty(0, 3, *applied.shape, device=device)
    # gain, gray, mean gray: x f; x f + mean (1 - f); x f + gray (1 - f) (torchvision's _blend)
    rows = []
    for name in names:
        strength = getattr(draw.config, name)
        factor = torch.where(applied, draw.between(name, max(0.0, 1 - strength), 1 + strength), 1.0)
        zero = torch.zeros_like(factor)
        rest = 1 - factor
        rows.append(torch.stack([factor, rest if name == "saturation" else zero, rest if name == "contrast" else zero]))
    if len(names) == 1:
        return rows[0][None]
    orders = torch.tensor(list(itertools.permutations(range(len(names))))).to(device, non_blocking=True)  # [n!, n]
    order = orders[(draw["order"] * len(orders)).long()].movedim(-1, 0)  # [S, V, B]
    return torch.stack(rows).gather(0, order[:, None].expand(-1, 3, -1, -1))


def chosen(draw: Draw, name: str, probabilities: list[float]) -> Tensor:
    """Whether an operation with one probability per view is applied: bool [V, B]."""
    return draw[name] < _column(probabilities, draw[name].device)


def _column(values: list[float], device: torch.device) -> Tensor:
    """float64 [V, 1], one value per view."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)[:, None]
