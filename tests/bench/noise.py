"""Images with the spectrum of photographs (amplitude 1/f), made on the spot: they compress and resize like those."""

from __future__ import annotations

import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pretrain.data.images import ArraySource, ImageSet, array_fingerprint

QUALITY = 90
CONTRAST = 55.0
"""Standard deviation of the pixel values, about that of ImageNet (0.22 of 255)."""
NUM_ORIGINALS = 32
FINE_GRAIN = 7.0
"""Standard deviation of white noise beside it: with it a file of 500 x 375 pixels has about 100 kB, as in ImageNet."""


def noise_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    images = []
    for _ in range(count):
        white = torch.randn(3, height, width, generator=generator)
        smooth = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(height, width))
        # Channels of photographs go together: mostly a common image, a little of their own.
        smooth = 0.9 * smooth[:1] + 0.3 * smooth
        smooth = (smooth - smooth.mean()) / smooth.std()
        grain = torch.randn(1, height, width, generator=generator)
        images.append((127 + CONTRAST * smooth + FINE_GRAIN * grain).clamp(0, 255).to(torch.uint8))
    return torch.stack(images)


def noise_set(count: int, side: int) -> ImageSet:
    """A set of square images in memory."""
    originals = noise_images(min(count, NUM_ORIGINALS), side, side)
    pixels = torch.stack([_shifted(originals, number) for number in range(count)])
    return ImageSet("noise", "train", array_fingerprint(pixels, None), ArraySource(pixels))


def write_jpegs(folder: Path, count: int, long_side: int = 500) -> list[Path]:
    """Files of 4 : 3, every other one upright: no two neighbours have one size, as in most sets of photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    originals = noise_images(min(count, NUM_ORIGINALS), long_side * 3 // 4, long_side)

    def write(number: int) -> Path:
        pixels = _shifted(originals, number).permute(1, 2, 0)
        path = folder / f"{number:05}.jpg"
        upright = pixels.transpose(0, 1) if number % 2 else pixels
        Image.fromarray(upright.contiguous().numpy()).save(path, quality=QUALITY)
        return path

    with ThreadPool(os.cpu_count()) as pool:
        return pool.map(write, range(count))


def _shifted(originals: Tensor, number: int) -> Tensor:
    """One of the images, moved around its edges, which meet: cheaper than new noise, and no two are alike."""
    _, _, height, width = originals.shape
    return originals[number % len(originals)].roll((7919 * number % height, 104729 * number % width), (1, 2))
