from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.folders import open_folder
from pretrain.data.images import ArraySource, ImageSet, array_fingerprint, decode
from pretrain.errors import DinobenchError

Write = Callable[..., Path]


def in_memory(count: int = 6, channels: int = 3) -> ImageSet:
    pixels = torch.randint(0, 256, (count, channels, 5, 4), dtype=torch.uint8)
    labels = torch.arange(count) % 2
    return ImageSet("x", "train", array_fingerprint(pixels, labels), ArraySource(pixels), labels=labels)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3])
def test_array_pixels_and_images_agree(channels: int) -> None:
    images = in_memory(channels=channels)
    assert images.array.shape == (6, 3, 5, 4)
    for k in range(6):
        assert torch.equal(images.pixels(k), images.array[k])
        np.testing.assert_array_equal(np.array(images.image(k)).transpose(2, 0, 1), images.array[k])


def test_a_subset_keeps_images_and_labels_together_and_has_its_own_fingerprint() -> None:
    images = in_memory()
    part = images.subset([5, 2, 3])
    assert len(part) == 3 and part.labels.tolist() == [1, 0, 1]
    assert torch.equal(part.array, images.array[[5, 2, 3]]) and torch.equal(part.pixels(1), images.pixels(2))
    smaller = part.subset([2])
    assert torch.equal(smaller.pixels(0), images.pixels(3))
    prints = [images.fingerprint, part.fingerprint, smaller.fingerprint, images.subset([2, 5, 3]).fingerprint]
    assert len(set(prints)) == 4


def test_resizing_brings_the_short_side_to_the_size(write_images: Write) -> None:
    assert in_memory().resized(8).array.shape == (6, 3, 10, 8)
    files = open_folder(write_images("data", ["1.png", "2.jpg"], (30, 20)), "train", "x")
    assert files.resized(8).pixels(1).shape == (3, 12, 8)
    assert files.resized(8).fingerprint != files.fingerprint


def test_images_of_one_size_become_an_array_and_others_stay_files(write_images: Write) -> None:
    same = open_folder(write_images("same", ["1.png", "2.png"]), "train", "x")
    assert same.array.shape == (2, 3, 12, 10) and torch.equal(same.array[1], same.pixels(1))
    root = write_images("mixed", ["1.png", "2.png"])
    Image.new("RGB", (7, 7)).save(root / "3.png")
    assert open_folder(root, "train", "x").array is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode.startswith("I"):
        image = Image.fromarray(np.full((6, 6), 32768, np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.new("RGB", (6, 6), (128, 128, 128)).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    found = decode(file.getvalue())
    assert found.mode == "RGB" and found.size == (6, 6)
    if mode not in ("1", "P"):  # few colours
        np.testing.assert_allclose(np.array(found), 128, atol=1)


@pytest.mark.promise("damaged images when a set is opened", "left out up to the limit, named")
def test_unreadable_images_are_left_out_up_to_the_limit(write_images: Write, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images("data", [f"{c}/{k}.png" for c in "ab" for k in range(5)])
    (root / "a/1.png").write_bytes(b"<html>404</html>")
    (root / "b/2.png").write_bytes((root / "b/2.png").read_bytes()[:60])
    images = open_folder(root, "train", "x")
    with caplog.at_level(logging.WARNING):
        kept = images.checked(0.2)
    assert len(kept) == 8 and kept.labels.tolist() == [0] * 4 + [1] * 4
    assert len(kept.skipped) == 2 and "a/1.png" in kept.skipped[0] and "a/1.png" in caplog.text
    with pytest.raises(DinobenchError, match=r"2 of 10 images tried cannot be read(.|\n)*a/1\.png(.|\n)*b/2\.png"):
        images.checked(0.1)


@pytest.mark.promise("an image that breaks during a training", "replaced by the same other one, named once")
def test_an_image_that_breaks_later_is_replaced_by_the_next_of_its_class(
    write_images: Write, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_images("data", ["a/0.png", "a/1.png", "b/2.png", "a/3.png"])
    # In sorted order: a/0, a/1, a/3, b/2.
    images = open_folder(root, "train", "x").checked(0.0)
    (root / "a/3.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        replaced = [images.image(2), images.image(2)]
    assert all(found.tobytes() == images.image(0).tobytes() for found in replaced)
    assert caplog.text.count("a/3.png") == 1
    (root / "b/2.png").unlink()
    with pytest.raises(DinobenchError, match=r"no image like .*b/2\.png"):
        images.image(3)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of_size(side, side))
    with pytest.raises(DinobenchError, match="DecompressionBomb"):
        open_folder(tmp_path, "train", "x").checked(0.01)


def test_a_large_set_is_sampled_and_chance_does_not_refuse_it() -> None:
    from pretrain.data.images import UnreadableImage

    class Mostly(ArraySource):
        pixels = None

        def __init__(self, bad: int) -> None:
            self.bad, self.reads = bad, 0

        def __len__(self) -> int:
            return 2000

        def resized(self, short_side: int) -> Mostly:
            return self

        def read(self, number: int) -> Image.Image:
            self.reads += 1
            if number < 4 * self.bad:  # every fourth image is tried
                raise UnreadableImage(self.path(number))
            return Image.new("RGB", (1, 1))

    source = Mostly(bad=8)
    assert len(ImageSet("x", "train", "0", source).checked(0.01)) == 1992
    assert source.reads == 500
    with pytest.raises(DinobenchError, match="10 of 500"):
        ImageSet("x", "train", "0", Mostly(bad=10)).checked(0.01)
