"""Augmented training images for protocols that train on them: order, randomness, and the views themselves.

What is drawn for a view is a function of (seed, epoch, image, repeat), so that neither batch nor worker changes it.

    CropViews      RandomResizedCrop and horizontal flip (DINO's eval_linear.py). Files are cropped and resized by PIL
                   in worker processes; sets in memory are cropped as whole batches on the device, from the same boxes
                   and with the same filter, but without PIL's rounding to 8 bits.
    RecipeViews    crop, flip, RandAugment or colour jitter, normalisation, random erasing as timm does them (DeiT)

Shapes: B batch, H x W pixels of an image, s side of a view.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.data import parameters, resample
from pretrain.data.images import ImageSet, to_tensor
from pretrain.data.loader import permutation
from pretrain.data.random_bits import image_streams, mix_words
from pretrain.data.views import IMAGENET_MEAN, IMAGENET_STD, Range, Triple, ViewsConfig

Key = tuple[int, int, int]
"""Epoch, number of the image, repeat: what a view depends on."""
PART = 128
"""Crops that a worker hands over at a time: 19 MB of 224 x 224 px."""


@dataclass(frozen=True)
class Order:
    """Which images make which batch: a permutation per epoch, cut into batches."""

    num_images: int
    batch_size: int
    epochs: int
    seed: int
    repeats: int = 1
    """Views of an image next to each other, of as many fewer images per epoch (DeiT's repeated augmentation: 3)."""
    drop_last: bool = False
    """Whether the incomplete batch at the end of an epoch is left out."""

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def batches(self) -> Iterator[list[Key]]:
        """The keys of every batch of every epoch."""
        for epoch in range(self.epochs):
            numbers = permutation(self.num_images, self.seed, epoch)
            for step in range(self.steps_per_epoch):
                places = range(step * self.batch_size, min((step + 1) * self.batch_size, self.num_images))
                yield [(epoch, int(numbers[place // self.repeats]), place % self.repeats) for place in places]


class RandomCrop(BaseModel):
    """RandomResizedCrop and flip; the defaults are torchvision's, which eval_linear.py leaves as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(default=224, ge=1)
    """Side of the view, pixels."""
    scale: Range = (0.08, 1.0)
    """Share of the image area in the crop, drawn uniformly."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width / height of the crop, drawn log-uniformly."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class CropViews:
    """Views by RandomResizedCrop and flip."""

    def __init__(self, config: RandomCrop, mean: Triple, std: Triple, seed: int):
        self.config, self.mean, self.std, self.seed = config, mean, std, seed
        drawn = {"global_size": config.size, "global_scale": config.scale, "ratio": config.ratio, "flip": config.flip}
        none = (0.0, 0.0, 0.0)
        # The numbers of the multi-crop views are drawn; only the first view is cut.
        self._drawn = ViewsConfig.model_validate(
            {**drawn, "local": 0, "jitter": 0, "gray": 0, "blur": none, "solarize": none}
        )

    def one(self, image: Image.Image, key: Key) -> Tensor:
        """PIL RGB -> uint8 [3, s, s]."""
        epoch, number, _ = key
        (top,), (left,), (height,), (width,), (flip,) = self._boxes(
            np.array([[image.height, image.width]]), np.array([number]), epoch
        )
        view = image.crop((int(left), int(top), int(left + width), int(top + height)))
        side = self.config.size
        view = view.resize((side, side), Image.Resampling[self.config.interpolation.upper()])
        return to_tensor(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)

    @torch.no_grad()
    def batch(self, pixels: Tensor, number: Tensor, epoch: int) -> Tensor:
        """uint8 [B, C, H, W] of the images `number` [B] -> normalised float32 [B, 3, s, s] on the device of `pixels`.

        C = 1 stands for three equal channels.
        """
        batch, _, height, width = pixels.shape
        sizes = np.tile([[height, width]], (batch, 1))
        top, left, box_height, box_width, flip = self._boxes(sizes, number.numpy(force=True), epoch)
        side, device = self.config.size, pixels.device
        weights = resample.resize_weights if self.config.interpolation == "bicubic" else _triangle_weights
        rows = weights(top, box_height, height, side, device)
        columns = weights(left, box_width, width, side, device, flip)
        images = pixels.permute(0, 2, 1, 3).float()
        views = resample.crop_resize(images, rows[:, None], columns[:, None])[:, 0].transpose(1, 2)
        return self.normalise(views.clamp(0, 255))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Values from 0 to 255 [B, C, s, s] -> float32 [B, 3, s, s]."""
        mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _boxes(self, sizes: np.ndarray, number: np.ndarray, epoch: int) -> tuple[np.ndarray, ...]:
        """top, left, height, width and whether to flip, each [B], in images of sizes [B, 2]."""
        draw = parameters.Draw(self._drawn, image_streams(self.seed, epoch, number))
        flip = draw["flip"][0] < self.config.flip if self.config.flip else np.zeros(len(number), bool)
        return (*(values[0] for values in parameters.crop_boxes(draw, sizes)), flip)


def _triangle_weights(
    start: np.ndarray,
    length: np.ndarray,
    source: int,
    target: int,
    device: torch.device,
    flip: np.ndarray | None = None,
) -> Tensor:
    """PIL's antialiased bilinear filter; arguments and result as of pretrain.data.resample.resize_weights."""
    table = resample.to_device(np.stack([start, length, length / target]), device)[..., None]
    pixel = torch.arange(source, device=device) - table[0] + 0.5  # [B, source], from the edge of the box
    centre = (torch.arange(target, device=device) + 0.5) * table[2]  # [B, target]
    distance = (pixel[:, None, :] - centre[:, :, None]).abs() / table[2].clamp_min(1)[:, None]
    inside = (pixel > 0) & (pixel < table[1])
    weights = (1 - distance).clamp_min(0) * inside[:, None, :]
    if flip is not None:
        turned = torch.from_numpy(flip).to(device)[:, None, None]
        weights = torch.where(turned, weights.flip(1), weights)
    return weights / weights.sum(-1, keepdim=True)


class TrainingAugmentation(BaseModel):
    """Augmentation of one image, as timm does it; the defaults are DeiT's (arXiv 2012.12877, Table 9)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(default=224, ge=1)
    """Side of the view, pixels."""
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    auto_augment: str | None = Field(default="rand-m9-mstd0.5-inc1", pattern=r"^rand")
    """RandAugment in timm's notation; null = colour jitter instead."""
    color_jitter: float = Field(default=0.4, ge=0)
    """Of brightness, contrast and saturation; used without RandAugment only (as in timm)."""
    erase: float = Field(default=0.25, ge=0, le=1)
    """Probability that a random box is filled with noise (random erasing, mode pixel)."""
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


class RecipeViews:
    """Views by timm's training transform."""

    def __init__(self, config: TrainingAugmentation, seed: int):
        self.config, self.seed = config, seed

    def one(self, image: Image.Image, key: Key) -> Tensor:
        """PIL RGB -> normalised float32 [3, s, s]."""
        with seeded(self.seed, *key):
            return self._transform(image)

    @cached_property
    def _transform(self) -> Any:
        # Imported here: timm takes seconds to import and reading a suite does not need it.
        from timm.data.transforms_factory import transforms_imagenet_train

        config = self.config
        transform: Any = transforms_imagenet_train(
            config.size,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.flip,
            color_jitter=config.color_jitter or None,  # pyright: ignore[reportArgumentType]
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            re_prob=config.erase,
            re_mode="pixel",
        )
        for step in transform.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper `bits` of 8; none of them, as at full strength, is black, which newer versions of PIL refuse."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits) if bits < 8 else image


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch (CPU) from these words; afterwards they are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    word = mix_words(*words)
    random.seed(word)
    np.random.seed(word % 2**32)
    torch.default_generator.manual_seed(word >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass
class ViewBatch:
    """One batch of training images."""

    epoch: int
    number: Tensor
    """int64 [B] on the CPU: the images in their set."""
    views: Tensor
    """float32 [B, 3, s, s] on the device, normalised."""


def crop_batches(images: ImageSet, views: CropViews, order: Order, device: str, workers: int) -> Iterator[ViewBatch]:
    """All batches of a training on crops; cut on the device where the set is in memory."""
    if images.array is None:
        yield from _decoded_crops(images, views, order, device, workers)
        return
    array = images.array
    array = (array[:, :1] if array.stride(1) == 0 else array).to(device)  # gray: one channel is enough
    for keys in order.batches():
        epoch, number = keys[0][0], torch.tensor([key[1] for key in keys])
        yield ViewBatch(epoch, number, views.batch(array[number.to(device)], number, epoch))


def _decoded_crops(images: ImageSet, views: CropViews, order: Order, device: str, workers: int) -> Iterator[ViewBatch]:
    """Batches put together from parts, because what a worker hands over lies in shared memory, which is small."""
    parts = (keys[i : i + PART] for keys in order.batches() for i in range(0, len(keys), PART))
    made = decoded_batches(images, views.one, parts, device, workers)
    for keys in order.batches():
        found = [next(made) for _ in range(0, len(keys), PART)]
        number, pixels = torch.cat([part.number for part in found]), torch.cat([part.views for part in found])
        yield ViewBatch(keys[0][0], number, views.normalise(pixels))


def decoded_batches(
    images: ImageSet, view: Callable[[Image.Image, Key], Tensor], keys: Iterator[list[Key]], device: str, workers: int
) -> Iterator[ViewBatch]:
    """A batch for each list of keys, its views made image by image in `workers` processes (0: this one)."""
    loader = DataLoader(
        _Views(images, view),
        batch_sampler=keys,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
        # Its own generator: a loader takes one number from the global one otherwise.
        generator=torch.Generator(),
    )
    for epoch, number, made in loader:
        yield ViewBatch(int(epoch[0]), number, made.to(device, non_blocking=True))


class _Views(Dataset[tuple[int, int, Tensor]]):
    """Key -> epoch, number and view."""

    def __init__(self, images: ImageSet, view: Callable[[Image.Image, Key], Tensor]):
        self.images, self.view = images, view

    def __getitem__(self, key: Key) -> tuple[int, int, Tensor]:
        epoch, number, _ = key
        return epoch, number, self.view(self.images.image(number), key)
