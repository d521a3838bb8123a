"""Small image sets on disk."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def encoded(seed: int, suffix: str = "png", size: tuple[int, int] = (12, 10), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    picture(seed, size, mode).save(file, "JPEG" if suffix == "jpg" else suffix.upper())
    return file.getvalue()


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes images of the given names under a folder: `write_images("data", ["train/a/1.png", ...])`."""

    def write(folder: str, names: list[str], size: tuple[int, int] = (12, 10)) -> Path:
        root = tmp_path / folder
        for seed, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(seed, path.suffix[1:], size))
        return root

    return write
