"""Batches of views and masks, endless, resumable at any step, the same for any number of ranks and workers.

The order of the images is a permutation drawn from (seed, epoch); step s of an epoch takes the s-th slice of it, and
each rank its part of that slice. The last, incomplete batch of an epoch is dropped, as in the official code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.data.device import SideStream, copy_to, one_ahead
from pretrain.data.images import ImageSet
from pretrain.data.masks import MaskConfig, Masks, MaskSampler
from pretrain.data.pixel_cache import PixelCache, fits
from pretrain.data.random_bits import mix_words
from pretrain.data.views import ViewsConfig
from pretrain.data.views_batched import BatchedViews
from pretrain.data.views_pil import PilViews
from pretrain.errors import UsageError

T = TypeVar("T")
Cache = Literal["auto", "device", "none"]
Key = tuple[int, int]
"""Epoch and number of an image: what its views depend on."""


@dataclass
class Batch:
    """One step's views of this rank's images."""

    views: list[Tensor]
    """[g1, g2, l1, ...], each float32 [B, 3, s, s], normalised."""
    index: Tensor
    """Numbers of the images in the set, int64 [B]."""
    epoch: int
    masks: Masks | None = None
    """Masked patches of the global views; None where nothing is ever masked."""

    def split(self, parts: int) -> list[Batch]:
        """Micro-batches of equal size: the images in order, all views of each."""
        if parts == 1:
            return [self]
        size = len(self.index) // parts
        pieces = zip(*(view.split(size) for view in self.views), strict=True)
        indices = self.index.split(size)
        masks = self.masks.split(parts) if self.masks else itertools.repeat(None, len(indices))
        return [
            Batch(list(views), index, self.epoch, mask)
            for views, index, mask in zip(pieces, indices, masks, strict=True)
        ]


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch, int64 [length]."""
    generator = torch.Generator().manual_seed(mix_words(seed, epoch) >> 1)
    return torch.randperm(length, generator=generator)


class Loader:
    """Feeds one rank.

    Args:
        images: The set.
        views: The views to make.
        batch_size: Images per step over all ranks.
        seed: Decides order, views and masks.
        rank: This process among `world_size`.
        world_size: Number of processes.
        workers: Processes that decode (0: this one). Sets in memory with batched views need none.
        device: Where the views are wanted, and where batched views are computed.
        masks: How patches of the global views are masked.
        grid: Rows and columns of patches of a global view; needed with masks.
        cache: Which images lie on the device, see `DataConfig`.
    """

    def __init__(
        self,
        images: ImageSet,
        views: ViewsConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        masks: MaskConfig | None = None,
        grid: tuple[int, int] | None = None,
        cache: Cache = "auto",
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UsageError(f"a batch of {batch_size} images cannot be shared by {world_size} processes")
        if len(images) < batch_size:
            raise UsageError(
                f"the dataset {images.name} {images.split} has {len(images)} images, "
                f"fewer than the batch of {batch_size}: lower the batch size or use more images"
            )
        if cache == "device" and views.backend != "batched":
            raise UsageError(
                f"data.cache=device needs views that are made on the device, found views.backend={views.backend}: set "
                "views.backend=batched or data.cache=auto"
            )
        self.images, self.views, self.seed, self.cache = images, views, seed, cache
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.workers, self.device = workers, torch.device(device)
        self.steps_per_epoch = len(images) // batch_size
        self.decode_seconds = 0.0
        """How long the host has waited so far for images to be decoded."""
        self._order: tuple[int, Tensor] | None = None
        self._sampler: MaskSampler | None = None
        if masks is not None and masks.kind != "none":
            assert grid is not None, "masks need the grid of patches of a global view"
            self._sampler = MaskSampler(masks, grid, seed)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from this step (counted from the start of training) on, without end.

        On a GPU the next one is made there while the step runs. On a CPU nothing runs beside the step but the workers.
        """
        batches = self._from_memory(start_step) if self.in_memory else self._from_workers(start_step)
        return one_ahead(batches, SideStream(self.device)) if self.device.type == "cuda" else batches

    @property
    def in_memory(self) -> bool:
        """Whether the pixels of all images are kept decoded."""
        return self.views.backend == "batched" and (self.cache == "device" or self.images.array is not None)

    def index(self, step: int) -> tuple[int, Tensor]:
        """Epoch and this rank's images of a step, int64 [B]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.images), self.seed, epoch))
        share = self.batch_size // self.world_size
        start = position * self.batch_size + self.rank * share
        return epoch, self._order[1][start : start + share]

    def _to_device(self, tensor: Tensor) -> Tensor:
        return copy_to(tensor, self.device)

    def _masks(self, index: Tensor, epoch: int, step: int) -> Masks | None:
        """The masks of this rank's images. They are drawn on the host, so their number is known without waiting."""
        if self._sampler is None:
            return None
        first = self.rank * len(index)
        masks = self._sampler(index, epoch, step=step, first=first, batch_size=self.batch_size)
        mask, places, weight = (self._to_device(tensor) for tensor in (masks.mask, masks.index, masks.weight))
        return Masks(mask, places, weight, masks.counts)

    def _from_memory(self, step: int) -> Iterator[Batch]:
        """The whole set lies in memory, of the device where it is wanted there; a batch is a gather and the views."""
        array, place = self.images.array, self.device
        if self.cache == "none" or (self.cache == "auto" and array is not None and not fits(array.numel(), place)):
            place = torch.device("cpu")
        cache, make = PixelCache(self.images, place, self.workers), BatchedViews(self.views, self.seed)
        while True:
            epoch, index = self.index(step)
            on_device = self._to_device(index)
            pixels, sizes = cache.batch(index, on_device if place == self.device else index)
            views = make(self._to_device(pixels), sizes, index, epoch)
            yield Batch(views, on_device, epoch, self._masks(index, epoch, step))
            step += 1

    def _from_workers(self, step: int) -> Iterator[Batch]:
        """Images are decoded (`pil`: and viewed) in the workers, batched views made on the device."""
        pil = PilViews(self.views, self.seed) if self.views.backend == "pil" else None
        make = BatchedViews(self.views, self.seed)
        loader = DataLoader(
            _Decoded(self.images, pil),
            batch_sampler=_Keys(self, step),
            num_workers=self.workers,
            collate_fn=_stack if pil else _pad,
            pin_memory=self.device.type == "cuda",
            # Its own generator: a loader takes one number from the global one otherwise.
            generator=torch.Generator(),
        )
        for now, ((epoch, index), content) in zip(itertools.count(step), self._decoded(loader), strict=False):
            if pil:
                views = [self._to_device(view) for view in content]
            else:
                pixels, sizes = content
                views = make(self._to_device(pixels), sizes, index, epoch)
            yield Batch(views, self._to_device(index), epoch, self._masks(index, epoch, now))

    def _decoded(self, loader: Iterable[T]) -> Iterator[T]:
        """What the loader gives; the host's time until it does is counted."""
        asked = monotonic()
        for content in loader:
            self.decode_seconds += monotonic() - asked
            yield content
            asked = monotonic()


class _Keys:
    """Sampler of the images of each step from `step` on."""

    def __init__(self, loader: Loader, step: int) -> None:
        self.loader, self.step = loader, step

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.step
        while True:
            epoch, index = self.loader.index(step)
            yield [(epoch, number) for number in index.tolist()]
            step += 1


class _Decoded(Dataset[tuple[Key, list[Tensor]]]):
    """(epoch, number) -> pixels of the image, or its views where they are made with PIL."""

    def __init__(self, images: ImageSet, pil: PilViews | None) -> None:
        self.images, self.pil = images, pil

    def __getitem__(self, key: Key) -> tuple[Key, list[Tensor]]:
        epoch, number = key
        if self.pil is None:
            return key, [self.images.pixels(number)]
        return key, self.pil(self.images.image(number), number, epoch)


def _keys(samples: list[tuple[Key, list[Tensor]]]) -> tuple[int, Tensor]:
    return samples[0][0][0], torch.tensor([key[1] for key, _ in samples])


def _stack(samples: list[tuple[Key, list[Tensor]]]) -> tuple[tuple[int, Tensor], list[Tensor]]:
    """Views of each image -> one tensor per view."""
    return _keys(samples), [torch.stack(view) for view in zip(*(views for _, views in samples), strict=True)]


def _pad(samples: list[tuple[Key, list[Tensor]]]) -> tuple[tuple[int, Tensor], list[Tensor]]:
    """Images of different sizes -> uint8 [B, 3, H, W], zero outside each, and their sizes [B, 2]."""
    images = [pixels for _, (pixels,) in samples]
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.amax(0).tolist()
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return _keys(samples), [batch, sizes]
