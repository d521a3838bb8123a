"""The random parameters of the batched views, drawn on the host for all views of a batch at once.

Distributions are those of torchvision's `get_params` (RandomResizedCrop, ColorJitter, RandomAffine, RandomErasing)
and of the official DINO blur and solarize. They are drawn with numpy in double precision, so that a training on the
GPU cuts the same boxes as one on the CPU, and no kernel is launched for a few hundred numbers.

Shape legend: V views, B images, T = 10 tries of torchvision's rejection loops, S linear colour steps.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from pretrain.data.random_bits import Words, uniforms
from pretrain.data.views import View, ViewsConfig

Array = np.ndarray

_TRIES = 10
"""torchvision's RandomResizedCrop and RandomErasing give up after as many boxes that do not fit."""
_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)

# First slot of each parameter. A parameter keeps its slots whether it is in use or not, so that switching one
# operation on does not change the draws of another.
_SLOTS = {
    "area": 0, "ratio": 10, "top": 20, "left": 21, "flip": 22, "jitter": 23, "brightness": 24, "contrast": 25,
    "saturation": 26, "hue": 27, "order": 28, "hue_place": 29, "gray": 30, "blur": 31, "radius": 32, "solarize": 33,
    "rotation": 34, "shear": 35, "erase": 36, "erase_top": 37, "erase_left": 38, "erase_area": 40, "erase_ratio": 50,
}  # fmt: skip
_WIDE = ("area", "ratio", "erase_area", "erase_ratio")
"""Parameters with one number per try."""
_SLOTS_PER_VIEW = 64
"""Counters of view v start at 64 v."""
NOISE_COUNTERS_PER_VIEW = 1 << 32
"""Counters of its noise start at 2^32 (v + 1), far above."""


class Draw:
    """The uniform numbers by parameter name: `draw["flip"]` is float64 [V, B], `draw["area"]` [T, V, B]."""

    def __init__(self, config: ViewsConfig, streams: Words) -> None:
        self.config = config
        self.views = config.views
        self.shape = (len(self.views), len(streams))
        names = _used(config, self.views)
        slots = np.concatenate([np.arange(_SLOTS[n], _SLOTS[n] + _width(n)) for n in names])
        first = _SLOTS_PER_VIEW * np.arange(len(self.views))
        numbers = uniforms(streams, (slots[:, None] + first).ravel()).reshape(len(slots), *self.shape)
        ends = itertools.accumulate(_width(n) for n in names)
        self._numbers = {n: numbers[end - _width(n) : end] for n, end in zip(names, ends, strict=True)}

    def __getitem__(self, name: str) -> Array:
        numbers = self._numbers[name]
        return numbers if name in _WIDE else numbers[0]

    def between(self, name: str, low: float, high: float) -> Array:
        """Uniform on [low, high): [V, B]."""
        return self[name] * (high - low) + low

    def per_view(self, field: str) -> Array:
        """A number of each view's kind: [V, 1]."""
        return np.array([getattr(view, field) for view in self.views])[:, None]


def _width(name: str) -> int:
    return _TRIES if name in _WIDE else 1


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


def _boxes(area: Array, ratio: Array, log_ratio: tuple[float, float]) -> tuple[Array, Array]:
    """Sides sqrt(a r) and sqrt(a / r) in whole pixels, r log-uniform: areas and uniform numbers [T, V, B]."""
    low, high = log_ratio
    root = np.exp(0.5 * (ratio * (high - low) + low))
    side = np.sqrt(area)
    return np.rint(side * root), np.rint(side / root)


def _first_fitting(fits: Array, *tried: Array) -> tuple[Array, ...]:
    """Of T tries [T, V, B] the first that fits, else the first of all [V, B]."""
    first, shape = fits.argmax(0).ravel(), fits.shape[1:]
    cell = np.arange(first.size)
    return tuple(values.reshape(len(values), -1)[first, cell].reshape(shape) for values in tried)


def crop_boxes(draw: Draw, sizes: Array) -> tuple[Array, Array, Array, Array]:
    """torchvision's RandomResizedCrop.get_params for every view and image.

    Args:
        draw: The uniform numbers.
        sizes: Height and width of each image, [B, 2].

    Returns:
        top, left, height, width: whole numbers as float64 [V, B].
    """
    image_height, image_width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)  # [B]
    scale = draw.per_view("scale")  # [V, 1, 2]
    low, high = scale[..., 0], scale[..., 1]
    ratio_low, ratio_high = draw.config.ratio
    area = (draw["area"] * (high - low) + low) * (image_height * image_width)
    width, height = _boxes(area, draw["ratio"], (math.log(ratio_low), math.log(ratio_high)))
    fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
    width, height = _first_fitting(fits, width, height)
    # The fallback is the central box of the whole image, cut where its ratio is outside the allowed range.
    found = fits.any(0)
    width = np.where(found, width, np.minimum(image_width, np.rint(image_height * ratio_high)))
    height = np.where(found, height, np.minimum(image_height, np.rint(image_width / ratio_low)))
    room_y, room_x = image_height - height, image_width - width
    top = np.where(found, np.floor(draw["top"] * (room_y + 1)), room_y // 2)
    left = np.where(found, np.floor(draw["left"] * (room_x + 1)), room_x // 2)
    return top, left, height, width


def affine_matrices(draw: Draw, sizes: Array, padded: tuple[int, int]) -> Array:
    """The maps from output to input positions of torchvision's RandomAffine, for `affine_grid`.

    Args:
        draw: The uniform numbers.
        sizes: Height and width of each image, [B, 2]; the map turns about the centre.
        padded: Height and width of the batch, to which the grid's -1 to 1 refer.

    Returns:
        float64 [V, B, 2, 3].
    """
    zeros = np.zeros(draw.shape)
    rotation, shear = math.radians(draw.config.rotation), math.radians(draw.config.shear)
    angle = draw.between("rotation", -rotation, rotation) if rotation else zeros
    slope = np.tan(draw.between("shear", -shear, shear)) if shear else zeros
    cos, sin = np.cos(angle), np.sin(angle)
    # Inverse of R(angle) Shear_x in pixels (torchvision's _get_inverse_affine_matrix).
    inverse = np.stack([cos - sin * slope, cos * slope + sin, -sin, cos], -1).reshape(*draw.shape, 2, 2)
    # Pixel position p and grid position g: p = half (g + 1), half the padded sides; x comes first.
    half = np.array([padded[1], padded[0]]) / 2
    centre = sizes[:, ::-1] / 2  # [B, 2]
    linear = inverse * half / half[:, None]
    offset = centre + np.einsum("vbij,bj->vbi", inverse, half - centre)
    return np.concatenate([linear, (offset / half - 1)[..., None]], -1)


def erase_boxes(draw: Draw, size: int) -> tuple[Array, Array, Array, Array]:
    """torchvision's RandomErasing.get_params on size x size views; height 0 where nothing is erased. Each [V, B]."""
    area = (draw["erase_area"] * (_ERASE_SCALE[1] - _ERASE_SCALE[0]) + _ERASE_SCALE[0]) * (size * size)
    height, width = _boxes(area, draw["erase_ratio"], (math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])))
    fits = (height < size) & (width < size)
    width, height = _first_fitting(fits, width, height)
    height = np.where(fits.any(0) & (draw["erase"] < draw.config.erase), height, 0.0)
    top = np.floor(draw["erase_top"] * (size - height + 1))
    left = np.floor(draw["erase_left"] * (size - width + 1))
    return top, left, height, width


def jitter_steps(draw: Draw) -> Array:
    """Brightness, contrast and saturation in a random order of each image, as weights (see colour.py).

    Returns:
        float64 [S, 3, V, B]: for each of the S steps the weights of the pixel, of its gray value and of the image's
        mean gray value; (1, 0, 0) where the image is not jittered.
    """
    config = draw.config
    names = [name for name in ("brightness", "contrast", "saturation") if getattr(config, name) > 0]
    weights = np.zeros((len(names), 3, *draw.shape))
    if not names:
        return weights
    applied = draw["jitter"] < config.jitter
    for row, name in zip(weights, names, strict=True):
        strength = getattr(config, name)
        factor = np.where(applied, draw.between(name, max(0.0, 1 - strength), 1 + strength), 1.0)
        # torchvision's _blend: x f + gray (1 - f) for saturation, x f + mean gray (1 - f) for contrast, x f.
        row[0] = factor
        if name != "brightness":
            row[1 if name == "saturation" else 2] = 1 - factor
    orders = np.array(list(itertools.permutations(range(len(names))))).T  # [S, S!]
    order = orders[:, (draw["order"].ravel() * orders.shape[1]).astype(np.int64)]  # [S, V B]
    ordered = weights.reshape(len(names), 3, -1)[order, :, np.arange(order.shape[1])]  # [S, V B, 3]
    return np.moveaxis(ordered, -1, 1).reshape(weights.shape)


def hue_places(draw: Draw, num_steps: int) -> Array:
    """Before which of the linear steps (num_steps: after all) the hue is shifted, int64 [V, B]; -1 where it is not.

    A uniform order of S + 1 operations is a uniform order of S of them and a uniform place for the last.
    """
    place = (draw["hue_place"] * (num_steps + 1)).astype(np.int64)
    return np.where(draw["jitter"] < draw.config.jitter, place, -1)
