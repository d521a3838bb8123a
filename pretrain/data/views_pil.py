"""The reference views: torchvision on PIL images, one image at a time, on the CPU.

Order of operations, probabilities and use of the random generators are those of facebookresearch/dino 7c446df
`DataAugmentationDINO`: crop, flip, jitter and gray draw from torch's global generator, blur and solarize from Python's.
With `blur_kind: gaussian` they are those of facebookresearch/dinov2 b8931f7, whose blur and solarize draw from torch's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pretrain.data.random_bits import mix_words
from pretrain.data.views import SOLARIZE_THRESHOLD, View, ViewsConfig
from pretrain.data.views_batched import BLUR_TAPS


class _Blur:
    """PIL's GaussianBlur (three box filters) with probability `p`; the official test is `random() <= p`."""

    def __init__(self, p: float, radius: tuple[float, float]) -> None:
        self.p, self.radius = p, radius

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.radius)))


class _Solarize:
    """Inverts the values from 128 on with probability `p`; the official test is `random() < p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, SOLARIZE_THRESHOLD) if random.random() < self.p else image


class _Noise:
    """Adds N(0, std^2) to every value of a tensor image."""

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, image: Tensor) -> Tensor:
        return image + self.std * torch.randn_like(image)


def view_transform(config: ViewsConfig, view: View) -> Callable[[Image.Image], Tensor]:
    """The transform of one view: PIL RGB -> float32 [3, size, size]."""
    steps: list[Any] = []
    if config.rotation or config.shear:
        bilinear = InterpolationMode.BILINEAR
        steps.append(transforms.RandomAffine(config.rotation, shear=config.shear or None, interpolation=bilinear))
    steps.append(
        transforms.RandomResizedCrop(
            view.size, scale=view.scale, ratio=config.ratio, interpolation=InterpolationMode.BICUBIC
        )
    )
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip(config.flip))
    if config.jitters:
        jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        steps.append(transforms.RandomApply([jitter], config.jitter))
    if config.gray:
        steps.append(transforms.RandomGrayscale(config.gray))
    steps.extend(_blur_and_solarize(config, view))
    steps.append(transforms.ToTensor())
    if config.noise:
        steps.append(_Noise(config.noise))
    steps.append(transforms.Normalize(config.mean, config.std))
    if config.erase:
        steps.append(transforms.RandomErasing(config.erase))
    return transforms.Compose(steps)


def _blur_and_solarize(config: ViewsConfig, view: View) -> list[Any]:
    """The two operations as DINO (`box`) or DINOv2 (`gaussian`) does them."""
    if config.blur_kind == "box":
        blur: list[Any] = [_Blur(view.blur, config.blur_radius)] if view.blur else []
        solarize: list[Any] = [_Solarize(view.solarize)] if view.solarize else []
        return blur + solarize
    # At probability 0 DINOv2 draws a number too: it blurs no first view, and the second one's draws come after.
    blur = [transforms.RandomApply([transforms.GaussianBlur(BLUR_TAPS, config.blur_radius)], view.blur)]
    solarize = [transforms.RandomSolarize(SOLARIZE_THRESHOLD, view.solarize)] if view.solarize else []
    return blur + solarize


class PilViews:
    """All views of one image.

    `draw` uses the global generators as they are, as the official code does. Calling the object seeds them for each
    view from (seed, epoch, image, view) and puts them back afterwards.
    """

    def __init__(self, config: ViewsConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._transforms = [view_transform(config, view) for view in config.views]

    def draw(self, image: Image.Image) -> list[Tensor]:
        """PIL RGB -> [g1, g2, l1, ...], each float32 [3, s, s]."""
        return [transform(image) for transform in self._transforms]

    def __call__(self, image: Image.Image, index: int, epoch: int) -> list[Tensor]:
        """PIL RGB -> [g1, g2, l1, ...], each float32 [3, s, s]; the same for the same (seed, epoch, index)."""
        python_state, torch_state = random.getstate(), torch.get_rng_state()
        try:
            views = []
            for number, transform in enumerate(self._transforms):
                word = mix_words(self.seed, epoch, index, number)
                random.seed(word)
                # The CPU generator only: torch.manual_seed would reseed the GPUs of the training process too.
                torch.default_generator.manual_seed(word >> 1)
                views.append(transform(image))
            return views
        finally:
            random.setstate(python_state)
            torch.set_rng_state(torch_state)
