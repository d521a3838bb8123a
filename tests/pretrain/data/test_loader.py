from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.loader import Batch, Loader
from pretrain.data.masks import MaskConfig, Masks
from pretrain.data.views import ViewsConfig
from pretrain.errors import UsageError

BACKENDS = ("batched", "pil")
MASKS = {
    "block": MaskConfig(kind="block"),
    "random": MaskConfig(kind="random"),
    "dinov2": MaskConfig(kind="dinov2", ratio=(0.1, 0.5)),
    "fixed": MaskConfig(kind="fixed", ratio=(0.15,), views=(1,)),
}
GRID = (8, 8)


def views(backend: str) -> ViewsConfig:
    return ViewsConfig(backend=backend, global_size=16, local=1, local_size=8, noise=0.05, rotation=5)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_dataset("digits").subset(range(50))


@pytest.fixture
def files(tmp_path: Path) -> ImageSet:
    """Eleven images of different sizes."""
    for k in range(11):
        pixels = torch.randint(
            0, 256, (20 + k, 30 - k, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k)
        )
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{k:02}.png")
    return open_dataset(f"folder:{tmp_path}")


def take(loader: Loader, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(loader.batches(start), count))


def same(a: Batch, b: Batch) -> None:
    assert a.epoch == b.epoch and torch.equal(a.index, b.index)
    for x, y in zip(a.views, b.views, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=5e-5)  # the padding of a batch changes the rounding
    same_masks(a.masks, b.masks)


def same_masks(a: Masks | None, b: Masks | None) -> None:
    if a is None or b is None:
        assert a is b
        return
    for name in ("mask", "index", "weight", "counts"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def images_of(request: pytest.FixtureRequest, kind: str) -> ImageSet:
    return request.getfixturevalue(kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["digits", "files"])
def test_batches_have_the_configured_shapes(request: pytest.FixtureRequest, kind: str, backend: str) -> None:
    loader = Loader(images_of(request, kind), views(backend), batch_size=4, seed=0)
    batch = next(loader.batches())
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 16, 16), (4, 3, 16, 16), (4, 3, 8, 8)]
    assert batch.index.shape == (4,) and batch.epoch == 0
    assert all(view.dtype == torch.float32 and view.isfinite().all() for view in batch.views)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["digits", "files"])
def test_the_number_of_workers_changes_nothing(request: pytest.FixtureRequest, kind: str, backend: str) -> None:
    images = images_of(request, kind)
    alone = take(Loader(images, views(backend), batch_size=5, seed=1), 5)
    for batch, other in zip(
        alone, take(Loader(images, views(backend), batch_size=5, seed=1, workers=2), 5), strict=True
    ):
        same(batch, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["digits", "files"])
def test_two_ranks_see_what_one_sees(request: pytest.FixtureRequest, kind: str, backend: str) -> None:
    images = images_of(request, kind)
    one = take(Loader(images, views(backend), batch_size=6, seed=2), 3)
    ranks = [take(Loader(images, views(backend), batch_size=6, seed=2, rank=r, world_size=2), 3) for r in (0, 1)]
    for whole, *parts in zip(one, *ranks, strict=True):
        joined = [torch.cat(view) for view in zip(*(part.views for part in parts), strict=True)]
        same(whole, Batch(joined, torch.cat([part.index for part in parts]), parts[0].epoch))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["digits", "files"])
def test_resuming_at_any_step_equals_not_stopping(request: pytest.FixtureRequest, kind: str, backend: str) -> None:
    loader = Loader(images_of(request, kind).subset(range(11)), views(backend), batch_size=4, seed=3)
    whole = take(loader, 7)
    for start in (1, loader.steps_per_epoch, 5):
        for expected, batch in zip(whole[start:], take(loader, 7 - start, start), strict=True):
            same(expected, batch)
    assert len({batch.epoch for batch in whole}) > 1


def test_two_ranks_of_images_in_memory_see_the_same_bits(digits: ImageSet) -> None:
    config = views("batched")
    one = next(Loader(digits, config, batch_size=8, seed=2).batches())
    ranks = [next(Loader(digits, config, batch_size=8, seed=2, rank=r, world_size=2).batches()) for r in (0, 1)]
    for whole, *parts in zip(one.views, *(rank.views for rank in ranks), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_an_epoch_shows_each_image_once_and_the_next_in_another_order(digits: ImageSet) -> None:
    loader = Loader(digits, views("batched"), batch_size=12, seed=0)
    assert loader.steps_per_epoch == 4
    batches = take(loader, 8)
    first, second = (torch.cat([b.index for b in batches[k : k + 4]]) for k in (0, 4))
    assert [b.epoch for b in batches] == [0] * 4 + [1] * 4
    assert len(first.unique()) == len(second.unique()) == 48 and not torch.equal(first, second)
    other = torch.cat([b.index for b in take(Loader(digits, views("batched"), batch_size=12, seed=1), 4)])
    assert not torch.equal(first, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_feeding_leaves_the_global_generator_as_it_was(files: ImageSet, backend: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(Loader(files, views(backend), batch_size=4, seed=0), 2)
    assert torch.equal(torch.rand(1), expected)


def test_a_batch_larger_than_the_set_is_refused_with_both_numbers(digits: ImageSet) -> None:
    with pytest.raises(UsageError, match="has 50 images, fewer than the batch of 64"):
        Loader(digits, views("batched"), batch_size=64, seed=0)


def test_a_batch_that_cannot_be_shared_is_refused(digits: ImageSet) -> None:
    with pytest.raises(UsageError, match="a batch of 5 images cannot be shared by 2 processes"):
        Loader(digits, views("batched"), batch_size=5, seed=0, world_size=2)


def test_images_that_break_during_training_do_not_stop_it(
    files: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = Loader(files, views("batched"), batch_size=11, seed=0)
    (tmp_path / "04.png").write_bytes(b"")
    batches = take(loader, 2)
    assert all(view.isfinite().all() for batch in batches for view in batch.views)
    assert caplog.text.count("04.png") == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["digits", "files"])
def test_batches_carry_the_masks_of_their_images(request: pytest.FixtureRequest, kind: str, backend: str) -> None:
    def loader(**more: object) -> Loader:
        return Loader(images_of(request, kind).subset(range(11)), views(backend), batch_size=4, seed=0, **more)

    batches = take(loader(masks=MASKS["block"], grid=GRID), 5)
    found = [batch.masks.mask for batch in batches if batch.masks is not None]
    assert [tuple(mask.shape) for mask in found] == [(2, 4, 64)] * 5 and torch.stack(found).any()
    for none in (loader(), loader(masks=MaskConfig(), grid=GRID)):
        plain = next(none.batches())
        assert plain.masks is None and all(map(torch.equal, plain.views, batches[0].views))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", MASKS)
def test_workers_and_resuming_do_not_change_the_masks(files: ImageSet, rule: str, backend: str) -> None:
    def loader(workers: int = 0) -> Loader:
        return Loader(files, views(backend), batch_size=4, seed=1, workers=workers, masks=MASKS[rule], grid=GRID)

    whole = take(loader(), 5)
    for start, workers in ((0, 1), (3, 0)):
        for expected, batch in zip(whole[start:], take(loader(workers), 5 - start, start), strict=True):
            same(expected, batch)


@pytest.mark.parametrize("rule", MASKS)
def test_two_ranks_see_the_masks_that_one_sees(digits: ImageSet, rule: str) -> None:
    def masks(rank: int = 0, world_size: int = 1) -> list[Masks]:
        loader = Loader(
            digits, views("batched"), batch_size=8, seed=2, rank=rank, world_size=world_size,
            masks=MASKS[rule], grid=GRID,
        )  # fmt: skip
        return [batch.masks for batch in take(loader, 8) if batch.masks is not None]

    for whole, *parts in zip(masks(), masks(0, 2), masks(1, 2), strict=True):
        same_masks(whole, Masks.of(torch.cat([part.mask for part in parts], 1)))


def test_micro_batches_carry_the_views_and_masks_of_their_images(digits: ImageSet) -> None:
    loader = Loader(digits, views("batched"), batch_size=6, seed=0, masks=MASKS["dinov2"], grid=GRID)
    batch = next(loader.batches())
    for part, rows in zip(batch.split(3), torch.arange(6).split(2), strict=True):
        assert batch.masks is not None
        expected = [view[rows] for view in batch.views]
        same(part, Batch(expected, batch.index[rows], batch.epoch, Masks.of(batch.masks.mask[:, rows])))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_lie_on_the_device(files: ImageSet, digits: ImageSet, backend: str) -> None:
    for images in (files, digits):
        masks = MaskConfig(kind="block", start_epoch=1)
        here = take(Loader(images, views(backend), batch_size=11, seed=0, masks=masks, grid=GRID), 6)
        there = take(Loader(images, views(backend), batch_size=11, seed=0, device="cuda", masks=masks, grid=GRID), 6)
        for a, b in zip(here, there, strict=True):
            assert a.masks is not None and b.masks is not None
            on_host = Masks(b.masks.mask.cpu(), b.masks.index.cpu(), b.masks.weight.cpu(), b.masks.counts)
            same_masks(a.masks, on_host)
            assert b.masks.mask.is_cuda and b.masks.index.is_cuda and b.masks.weight.is_cuda
            assert all(view.is_cuda for view in b.views) and torch.equal(a.index, b.index.cpu())
            assert all((x - y.cpu()).abs().median() < 1e-3 for x, y in zip(a.views, b.views, strict=True))
