"""A whole image set as uint8 in memory, of the training device or of the host, from which a batch is one gather.

Images of one size lie in an array [N, C, H, W]. Images of different sizes lie one behind the other in a buffer; a batch
of them is padded with zeros on the right and below, as the decoding workers pad it. Every rank holds the whole set.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.data.images import ImageSet
from pretrain.errors import DinobenchError

MAX_SHARE = 0.5
"""Of the memory that is free before the first step: the rest is for activations."""
_SAMPLE = 32
"""Images whose sizes tell that of the set before all of it is decoded."""
_GIB = 2**30


class PixelCache:
    """All images of a set in the memory of a device.

    Args:
        images: The set; it is decoded here unless it is in memory already.
        device: Where the pixels are wanted.
        workers: Processes that decode (0: this one).

    Raises:
        DinobenchError: the set is larger than the part of the device's memory that it may take.
    """

    def __init__(self, images: ImageSet, device: torch.device, workers: int = 0) -> None:
        self._array, self._sizes = images.array, torch.zeros(0, 2, dtype=torch.int64)
        if self._array is not None:
            if self._array.stride(1) == 0:
                self._array = self._array[:, :1]  # a gray set: one channel is enough
            if self._array.device != device:
                _refuse_larger(images, self._array.numel(), device)
                self._array = self._array.to(device)
            return
        numbers = range(0, len(images), max(1, len(images) // _SAMPLE))
        _refuse_larger(images, sum(images.pixels(n).numel() for n in numbers) * len(images) // len(numbers), device)
        parts, sizes = zip(*_decode(images, workers), strict=True)
        self._sizes = torch.cat(sizes)
        lengths = 3 * self._sizes.prod(1)
        _refuse_larger(images, int(lengths.sum()), device)
        self._buffer = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=device)
        for part, place in zip(parts, self._buffer.split([len(part) for part in parts]), strict=True):
            place.copy_(part)
        self._places = torch.stack([lengths.cumsum(0) - lengths, *self._sizes.unbind(1)]).to(device)

    def batch(self, index: Tensor, on_device: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images int64 [B], given on the host and on the device: uint8 [B, C, H, W] there, and their sizes [B, 2] on
        the host where they differ. Nothing waits for the device.
        """
        if self._array is not None:
            return self._array.index_select(0, on_device), None
        sizes = self._sizes[index]
        height, width = sizes.amax(0).tolist()
        start, own_height, own_width = self._places[:, on_device].view(3, -1, 1, 1, 1)
        channel, row, column = (
            torch.arange(size, device=on_device.device).view(shape)
            for size, shape in ((3, (-1, 1, 1)), (height, (-1, 1)), (width, (-1,)))
        )
        place = start + (channel * own_height + row) * own_width + column  # [B, 3, H, W]
        inside = (row < own_height) & (column < own_width)
        pixels = self._buffer.take(place.where(inside, 0))
        return pixels.masked_fill_(~inside, 0), sizes


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether a set of this size may lie on the device."""
    return num_bytes <= MAX_SHARE * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU; on a CPU, which gives no such figure everywhere, that of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _refuse_larger(images: ImageSet, num_bytes: int, device: torch.device) -> None:
    if not fits(num_bytes, device):
        raise DinobenchError(
            f"data.cache=device: {images.name} {images.split} takes {num_bytes / _GIB:.1f} GiB as pixels, and at most "
            f"{MAX_SHARE:.0%} of the {free_bytes(device) / _GIB:.1f} GiB free on {device} are given to it. Set "
            "data.resize to a smaller side, use a part of the set such as data.split=train[:0.5], or data.cache=auto"
        )


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return self.images.pixels(number)


def _decode(images: ImageSet, workers: int) -> list[tuple[Tensor, Tensor]]:
    """Some images at a time: their pixels one behind the other, and their sizes [n, 2]."""
    loader = DataLoader(
        _Pixels(images),
        batch_size=64,
        num_workers=workers,
        collate_fn=_behind_each_other,
        generator=torch.Generator(),  # its own: a loader takes one number from the global one otherwise
    )
    # Copied: what a worker sends keeps a file descriptor open while it is used.
    return [(pixels.clone(), sizes.clone()) for pixels, sizes in loader]


def _behind_each_other(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([image.flatten() for image in images]), torch.tensor([image.shape[1:] for image in images])
