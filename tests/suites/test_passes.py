from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.data.datasets import open_dataset
from pretrain.data.images import FileSource, ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError
from pretrain.models.checkpoint import LoadedModel
from suites.cache import FeatureCache
from suites.features import extract
from suites.passes import allowed_unreadable, default_workers

TRANSFORM = EvalTransform(resize=16, crop=16)
NUMBER = 200


def picture(number: int, mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (24, 20, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 JPEG files of two classes, among them a gray and a CMYK one."""
    for number in range(NUMBER):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, {0: "L", 1: "CMYK"}.get(number, "RGB")).save(path)
    return tmp_path / "images"


def opened(folder: Path) -> ImageSet:
    """The set as it looks when its unreadable files were not among those tried when it was opened."""
    images = open_dataset(f"folder:{folder}")
    return ImageSet(
        images.name, "train", images.fingerprint, images.source, labels=images.labels, classes=images.classes
    )


def damage(folder: Path, number: int, how: str = "truncated") -> None:
    path = folder / f"class{number % 2}" / f"{number:03}.jpg"
    content = path.read_bytes()
    truncated = content[:-150]
    assert Image.open(io.BytesIO(truncated)).size == (20, 24)  # its header is whole
    path.write_bytes({"truncated": truncated, "empty": b"", "page": b"<html>404</html>"}[how])


@pytest.mark.promise("a damaged image at the evaluation", "left out, listed by path")
@pytest.mark.parametrize("how", ["truncated", "empty", "page"])
@pytest.mark.parametrize("cached", [False, True])
def test_an_unreadable_image_has_neither_features_nor_a_label_and_is_listed(
    model: LoadedModel, folder: Path, tmp_path: Path, how: str, cached: bool
) -> None:
    cache = FeatureCache(tmp_path / "cache") if cached else None
    images = opened(folder)
    whole = extract(model, images, TRANSFORM, batch_size=32)
    damage(folder, 7, how)
    for again in range(2):
        found = extract(model, images, TRANSFORM, batch_size=32, cache=cache)
        bad = int((torch.arange(NUMBER)[:, None] == found.index).any(1).logical_not().nonzero())
        assert images.path(bad).endswith("class1/007.jpg")
        kept = [i for i in range(NUMBER) if i != bad]
        assert found.index.tolist() == kept
        torch.testing.assert_close(found.cls, whole.cls[kept], rtol=1e-5, atol=2e-6)
        assert images.labels is not None
        assert torch.equal(found.labels, images.labels[kept])
        assert found.path is not None
        assert [found.path(row) for row in range(NUMBER - 1)] == [images.path(i) for i in kept]
        (reason,) = found.unreadable
        assert re.search(r"class1/007\.jpg: \w+Error", reason)
        assert found.list_unreadable(images) == [reason]
        assert found.from_cache == (cached and again == 1)


@pytest.mark.promise("many damaged images at the evaluation", "refused, the first ones named; exit 3")
def test_more_unreadable_images_than_allowed_are_refused_with_the_first_ones(
    model: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    images, cache = opened(folder), FeatureCache(tmp_path / "cache")
    assert allowed_unreadable(images) == 2
    for number in (7, 100, 9):
        damage(folder, number)
    for place in (None, cache):
        with pytest.raises(DinobenchError, match=r"at least 3 of 200 images cannot be read, more than 1% of them") as e:
            extract(model, images, TRANSFORM, cache=place)
        assert [name in str(e.value) for name in ("007.jpg", "009.jpg", "100.jpg")] == [True] * 3
    assert cache.size() == 0


def test_images_left_out_when_the_set_was_opened_count_too(folder: Path) -> None:
    for number in (7, 100):
        damage(folder, number)
    images = open_dataset(f"folder:{folder}")
    assert (len(images), len(images.skipped), allowed_unreadable(images)) == (198, 2, 0)


def test_gray_and_cmyk_files_have_the_features_of_their_rgb_conversion(model: LoadedModel, folder: Path) -> None:
    images = open_dataset(f"folder:{folder}")
    assert isinstance(images.source, FileSource)
    found = extract(model, images, TRANSFORM).cls
    for name in ("class0/000.jpg", "class1/001.jpg"):
        row = next(i for i in range(NUMBER) if images.path(i).endswith(name))
        with Image.open(folder / name) as file:
            assert file.mode in ("L", "CMYK")
            x = TRANSFORM(file.convert("RGB"))[None]
        with torch.no_grad():
            torch.testing.assert_close(found[row : row + 1], model.backbone(x), rtol=1e-5, atol=2e-6)


def test_images_in_memory_have_no_path(model: LoadedModel, make_images: Callable[..., ImageSet]) -> None:
    assert extract(model, make_images(), TRANSFORM).split().path is None


def test_small_sets_are_decoded_without_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert default_workers(100) == 0
    assert default_workers(50_000) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert default_workers(50_000) == 0
