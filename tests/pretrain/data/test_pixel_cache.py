"""A set in the memory of the device: the batches that decoding workers make, or a message that says why not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.data import pixel_cache
from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.loader import Batch, Loader
from pretrain.data.views import ViewsConfig
from pretrain.errors import DinobenchError, UsageError

VIEWS = ViewsConfig(backend="batched", global_size=16, local=1, local_size=8, noise=0.05, rotation=5)


def _write(folder: Path, sizes: list[tuple[int, int]]) -> ImageSet:
    for k, size in enumerate(sizes):
        pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
        Image.fromarray(pixels.numpy()).save(folder / f"{k:02}.png")
    return open_dataset(f"folder:{folder}")


@pytest.fixture
def files(tmp_path: Path) -> ImageSet:
    """Eleven images of different sizes."""
    return _write(tmp_path, [(20 + k, 30 - k) for k in range(11)])


def _batches(images: ImageSet, *, start: int = 0, batch_size: int = 4, **options: object) -> list[Batch]:
    loader = Loader(images, VIEWS, batch_size=batch_size, seed=3, **options)  # type: ignore[arg-type]
    return list(itertools.islice(loader.batches(start), 5))


def _assert_same(a: list[Batch], b: list[Batch], **tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.epoch == y.epoch and torch.equal(x.index, y.index)
        for view, other in zip(x.views, y.views, strict=True):
            torch.testing.assert_close(view, other, **tolerance)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_different_sizes_give_the_batches_of_the_workers(files: ImageSet, workers: int, start: int) -> None:
    decoded = _batches(files, start=start, cache="none")
    _assert_same(decoded, _batches(files, start=start, workers=workers, cache="device"), rtol=0, atol=0)


def test_each_rank_has_its_part_of_the_batch(files: ImageSet) -> None:
    for rank in range(2):
        decoded, cached = (_batches(files, rank=rank, world_size=2, cache=cache) for cache in ("none", "device"))
        _assert_same(decoded, cached, rtol=0, atol=0)


def test_images_of_one_size_give_the_same_batches_from_device_and_host() -> None:
    digits = open_dataset("digits").subset(range(50))
    host, device, auto = (_batches(digits, cache=cache) for cache in ("none", "device", "auto"))
    _assert_same(host, device, rtol=0, atol=0)
    _assert_same(host, auto, rtol=0, atol=0)


def test_files_of_one_size_that_are_too_many_for_an_array_are_cached_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.images.MAX_ARRAY_BYTES", 1)
    images = _write(tmp_path, [(20, 24)] * 9)
    decoded, cached = (_batches(images, cache=cache) for cache in ("auto", "device"))
    _assert_same(decoded, cached, rtol=0, atol=0)


def test_a_cached_set_is_decoded_once(files: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Loader(files, VIEWS, batch_size=4, seed=0, cache="device").batches()
    next(batches)
    monkeypatch.setattr(ImageSet, "pixels", None)
    assert len(list(itertools.islice(batches, 9))) == 9


def test_a_set_that_does_not_fit_is_refused_with_both_sizes(files: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(3 * (20 + k) * (30 - k) for k in range(11))
    monkeypatch.setattr(pixel_cache, "free_bytes", lambda device: 2 * size)
    _batches(files, cache="device")  # half of it may be used
    monkeypatch.setattr(pixel_cache, "free_bytes", lambda device: 2 * size - 1)
    with pytest.raises(DinobenchError, match=r"takes 0\.0 GiB .* at most 50% of .* Set data\.resize to a smaller side"):
        _batches(files, cache="device")


@pytest.mark.parametrize(
    ("cache", "free", "place"), [("auto", 1 << 30, "meta"), ("auto", 0, "cpu"), ("none", 0, "cpu")]
)
def test_without_being_asked_a_set_that_does_not_fit_stays_on_the_host(
    cache: str, free: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(images: ImageSet, device: torch.device, workers: int) -> None:
        raise LookupError(device.type)

    monkeypatch.setattr(pixel_cache, "free_bytes", lambda device: free)
    monkeypatch.setattr("pretrain.data.loader.PixelCache", load)
    with pytest.raises(LookupError, match=place):
        _batches(open_dataset("digits"), device="meta", cache=cache)


def test_views_made_on_the_host_are_refused(files: ImageSet) -> None:
    with pytest.raises(UsageError, match=r"views\.backend=batched"):
        Loader(files, ViewsConfig(backend="pil"), batch_size=4, seed=0, cache="device")


@pytest.mark.gpu
def test_on_a_gpu_the_pixels_lie_there_and_a_batch_waits_for_nothing(files: ImageSet) -> None:
    here = _batches(files, cache="device")
    batches = Loader(files, VIEWS, batch_size=4, seed=3, device="cuda", cache="device").batches()
    there = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        there += itertools.islice(batches, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(here, there, strict=True):
        assert all((x - y.cpu()).abs().median() < 1e-3 for x, y in zip(a.views, b.views, strict=True))
