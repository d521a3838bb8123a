"""A set of images with labels and a content fingerprint, in memory or decoded when asked for.

Unreadable images: `ImageSet.checked` decodes a sample before anything is trained and leaves out what it finds bad. An
image that turns out to be unreadable later is replaced by the next readable one of the same class, always the same
one, and reported once by path. A run stops for it only when they become too many, as when a disk is no longer there.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.data.stores import MAX_FILE_BYTES, Store
from pretrain.errors import DinobenchError

log = logging.getLogger(__name__)

MAX_ARRAY_BYTES = 2 << 30
"""Sets of decoded files larger than this stay files."""
FEW = 10
"""So many images may become unreadable whatever the limit."""
MAX_ASPECT = 200
"""Longer side over shorter side, of an image that is read."""
_CHECKED = 500
"""`ImageSet.checked` decodes so many images, evenly spaced; all of a smaller set."""


class UnreadableImage(Exception):
    """An image that could not be decoded: its path and the reason."""


class Source(Protocol):
    """Where an image set's pixels come from."""

    @property
    def pixels(self) -> Tensor | None:
        """uint8 [N, C, H, W], C in (1, 3), where all images are in memory."""
        ...

    def __len__(self) -> int: ...

    def path(self, number: int) -> str: ...

    def read(self, number: int) -> Image.Image: ...

    def resized(self, short_side: int) -> Source: ...


class ArraySource:
    """Images in memory; gray ones are stored once."""

    def __init__(self, pixels: Tensor) -> None:
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] in (1, 3), pixels.shape
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def path(self, number: int) -> str:
        return f"image {number}"

    def read(self, number: int) -> Image.Image:
        return Image.fromarray(self.pixels[number].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())

    def resized(self, short_side: int) -> ArraySource:
        height, width = resized_size(self.pixels.shape[-2], self.pixels.shape[-1], short_side)
        # In parts, for the memory of the intermediate steps.
        parts = self.pixels.split(4096)
        scaled = [F.interpolate(p, (height, width), mode="bilinear", antialias=True) for p in parts]
        return ArraySource(torch.cat(scaled))


class FileSource:
    """Image files of a store, decoded when read."""

    pixels = None

    def __init__(self, store: Store, names: Sequence[str], where: str, short_side: int | None = None) -> None:
        self.store, self.names, self.where, self.short_side = store, names, where, short_side

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> str:
        return f"{self.where}/{self.names[number]}"

    def read(self, number: int) -> Image.Image:
        name = self.names[number]
        try:
            if self.store.sizes[name] > MAX_FILE_BYTES:
                raise ValueError(f"{self.store.sizes[name]} bytes")
            return decode(self.store.read(name), self.short_side)
        # Damaged files make the decoders raise errors of every kind.
        except Exception as error:
            raise UnreadableImage(f"{self.path(number)}: {type(error).__name__}: {error}") from error

    def resized(self, short_side: int) -> FileSource:
        return FileSource(self.store, self.names, self.where, short_side)


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after the short side is brought to `short_side` (torchvision's rounding)."""
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def decode(content: bytes, short_side: int | None = None) -> Image.Image:
    """An RGB image out of an encoded file; orientation tags are ignored, as in torchvision.

    With `short_side`, JPEG files are decoded at the smallest of libjpeg's scales above it, then resized (bilinear).
    Images of more pixels than PIL's limit against decompression bombs are refused, and strips: with its short side at
    256, an image of 1 x 65,535 has four billion pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content)) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels: a side is over {MAX_ASPECT} times the other")
            if short_side is not None:
                image.draft("RGB", (short_side, short_side))
            image.load()
            rgb = _to_rgb(image)
    if short_side is not None and min(rgb.size) != short_side:
        height, width = resized_size(rgb.height, rgb.width, short_side)
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; 16-bit gray is scaled, where PIL's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def array_fingerprint(pixels: Tensor, labels: Tensor | None) -> str:
    """Content hash of images in memory."""
    digest = hashlib.sha256(f"{tuple(pixels.shape)}".encode())
    digest.update(pixels.contiguous().numpy().data)
    if labels is not None:
        digest.update(labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


class ImageSet:
    """Images, labels and what identifies them."""

    def __init__(
        self,
        name: str,
        split: str,
        fingerprint: str,
        source: Source,
        *,
        labels: Tensor | None = None,
        classes: tuple[str, ...] = (),
        rows: Tensor | None = None,
        skipped: tuple[str, ...] = (),
    ) -> None:
        """Args: see the attributes; `rows` int64 [N] are the numbers of the images in the source, None for all."""
        self.name = name
        self.split = split
        self.fingerprint = fingerprint
        """Hash of the content: the same on every machine, another one for every part or size of the set."""
        self.classes = classes
        self.labels = labels
        """int64 [N], or None."""
        self.skipped = skipped
        """Images left out as unreadable: path and reason."""
        self.source = source
        self.limit = 1.0
        """Share of images that may become unreadable before `image` gives up; set by `checked`."""
        self._rows = rows
        self._length = len(source if rows is None else rows)
        self._array: Tensor | None = None
        self._array_tried = False
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None, "_array_tried": False}

    def _row(self, number: int) -> int:
        return number if self._rows is None else int(self._rows[number])

    def path(self, number: int) -> str:
        """Where image `number` lies, for messages."""
        return self.source.path(self._row(number))

    def read(self, number: int) -> Image.Image:
        """Image `number` as PIL RGB.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return self.source.read(self._row(number))

    def image(self, number: int) -> Image.Image:
        """Image `number` as PIL RGB; if unreadable, the next readable one of its class.

        Raises:
            DinobenchError: there is none, or too many were unreadable until now.
        """
        for candidate in self._candidates(number):
            try:
                return self.read(candidate)
            except UnreadableImage as error:
                if candidate not in self._reported:
                    self._report(candidate, error)
        raise DinobenchError(f"{self.name} {self.split}: no image like {self.path(number)} can be read")

    def _report(self, number: int, error: UnreadableImage) -> None:
        self._reported.add(number)
        allowed = self.limit * len(self)
        if len(self._reported) > max(FEW, allowed + 2 * math.sqrt(allowed)):  # as `checked` allows a sample
            raise DinobenchError(
                f"{self.name} {self.split}: {len(self._reported)} of {len(self)} images have become unreadable, more "
                f"than data.max_bad_images={self.limit} allows: is a disk not mounted any more, is the folder being "
                f"changed? The last: {error}"
            )
        log.warning("unreadable image, replaced by another of its class: %s", error)

    def _candidates(self, number: int) -> Iterator[int]:
        """`number`, then those after it (around the end) that have its label."""
        yield number
        for step in range(1, len(self)):
            other = (number + step) % len(self)
            if self.labels is None or self.labels[other] == self.labels[number]:
                yield other

    def pixels(self, number: int) -> Tensor:
        """Image `number` as uint8 [3, H, W]."""
        if self.source.pixels is not None:
            return self.source.pixels[self._row(number)].expand(3, -1, -1).contiguous()
        return to_tensor(self.image(number))

    @property
    def array(self) -> Tensor | None:
        """All images as uint8 [N, 3, H, W], if they have one size and fit in memory, else None; made on first use."""
        if not self._array_tried:
            self._array_tried = True
            self._array = self._load_array()
        return self._array

    def _load_array(self) -> Tensor | None:
        if self.source.pixels is not None:
            pixels = self.source.pixels if self._rows is None else self.source.pixels[self._rows]
            return pixels.expand(-1, 3, -1, -1)
        if len(self) == 0:
            return None
        # Cheap first: a few images tell most sets of mixed sizes.
        width, height = self.image(0).size
        if len(self) * 3 * height * width > MAX_ARRAY_BYTES:
            return None
        if any(self.image(i).size != (width, height) for i in _spread(len(self), 32)):
            return None
        array = torch.empty(len(self), 3, height, width, dtype=torch.uint8)
        for number in range(len(self)):
            pixels = to_tensor(self.image(number))
            if pixels.shape != array.shape[1:]:
                return None
            array[number] = pixels
        return array

    def subset(self, indices: Tensor | Sequence[int], split: str | None = None) -> ImageSet:
        """The set of the images at `indices`, in that order."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        digest = hashlib.sha256(f"{self.fingerprint} subset ".encode() + indices.numpy().astype("<i8").tobytes())
        part = ImageSet(
            self.name,
            split or self.split,
            digest.hexdigest(),
            self.source,
            labels=None if self.labels is None else self.labels[indices],
            classes=self.classes,
            rows=indices if self._rows is None else self._rows[indices],
            skipped=self.skipped,
        )
        part.limit = self.limit
        return part

    def resized(self, short_side: int) -> ImageSet:
        """The set with every image brought to this short side (bilinear, antialiased)."""
        digest = hashlib.sha256(f"{self.fingerprint} resized {short_side} bilinear".encode())
        scaled = ImageSet(
            self.name,
            self.split,
            digest.hexdigest(),
            self.source.resized(short_side),
            labels=self.labels,
            classes=self.classes,
            rows=self._rows,
            skipped=self.skipped,
        )
        scaled.limit = self.limit
        return scaled

    def checked(self, max_bad_images: float) -> ImageSet:
        """The set without the unreadable images among up to 500 evenly spaced ones.

        Raises:
            DinobenchError: More than the share `max_bad_images` is unreadable; of a sample, more than that by two
                standard deviations, so that chance does not refuse a set within the limit.
        """
        self.limit = max_bad_images
        if self.source.pixels is not None:
            return self
        numbers = _spread(len(self), _CHECKED)
        probe = self.source.resized(32)  # JPEG files decode several times faster at a small scale
        bad: dict[int, str] = {}
        for number in numbers:
            try:
                probe.read(self._row(number))
            except UnreadableImage as error:
                bad[number] = str(error)
        allowed = max_bad_images * len(numbers)
        if len(numbers) < len(self):
            allowed += 2 * math.sqrt(allowed)
        if len(bad) > allowed:
            shown = "\n  ".join(list(bad.values())[:5])
            raise DinobenchError(
                f"{self.name} {self.split}: {len(bad)} of {len(numbers)} images tried cannot be read, "
                f"more than data.max_bad_images={max_bad_images} allows. Mend or remove them, or raise the limit:\n  "
                f"{shown}"
            )
        if not bad:
            return self
        for reason in bad.values():
            log.warning("unreadable image, left out: %s", reason)
        kept = self.subset([number for number in range(len(self)) if number not in bad])
        kept.skipped = (*self.skipped, *bad.values())
        return kept


def _spread(total: int, wanted: int) -> list[int]:
    """Up to `wanted` numbers below `total`, evenly spaced."""
    if total <= wanted:
        return list(range(total))
    return [k * total // wanted for k in range(wanted)]
