"""Batches made beside the step are the same batches, handed over when they are whole."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.data.datasets import open_dataset
from pretrain.data.device import SideStream, one_ahead
from pretrain.data.images import ImageSet
from pretrain.data.loader import Batch, Loader
from pretrain.data.masks import MaskConfig
from pretrain.data.views import ViewsConfig

VIEWS = {
    backend: ViewsConfig(backend=backend, global_size=16, local=2, local_size=8, noise=0.05, rotation=5)
    for backend in ("batched", "pil")
}
MASKS = MaskConfig(kind="block", start_epoch=1)


class Steps:
    """Stands for a stream: writes down what happens when."""

    def __init__(self) -> None:
        self.done: list[str] = []

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        self.done.append("make")
        yield
        self.done.append("made")

    def hand_over(self) -> None:
        self.done.append("hand over")


@pytest.fixture
def files(tmp_path: Path) -> ImageSet:
    """Eleven images of different sizes."""
    for k in range(11):
        pixels = torch.randint(
            0, 256, (20 + k, 30 - k, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k)
        )
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{k:02}.png")
    return open_dataset(f"folder:{tmp_path}")


def _loader(images: ImageSet, backend: str = "batched", **options: object) -> Loader:
    return Loader(images, VIEWS[backend], batch_size=4, seed=3, masks=MASKS, grid=(8, 8), **options)  # type: ignore[arg-type]


def _take(batches: Iterator[Batch], number: int = 6) -> list[Batch]:
    return list(itertools.islice(batches, number))


def _assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.epoch == b.epoch and torch.equal(a.index, b.index)
        assert all(map(torch.equal, a.views, b.views))
        assert a.masks is not None and b.masks is not None and torch.equal(a.masks.mask, b.masks.mask)


@pytest.mark.parametrize("backend", VIEWS)
@pytest.mark.parametrize(("start", "workers"), [(0, 0), (3, 0), (3, 2)])
def test_batches_made_ahead_are_the_same(files: ImageSet, backend: str, start: int, workers: int) -> None:
    loader = _loader(files, backend, workers=workers)
    _assert_same(_take(one_ahead(loader.batches(start), Steps())), _take(_loader(files, backend).batches(start)))


def test_a_batch_is_whole_when_it_is_handed_over_and_the_next_is_made_before_its_step() -> None:
    side = Steps()
    for number in one_ahead(iter(range(3)), side):
        side.done.append(f"step {number}")
    assert " ".join(side.done) == (
        "make made "
        "hand over make made step 0 "
        "hand over make made step 1 "
        "hand over make made step 2"
    )  # fmt: skip


def test_a_batch_is_let_go_before_the_one_after_the_next_is_made() -> None:
    class Item:
        pass

    alive: list[weakref.ref[Item]] = []

    def items() -> Iterator[Item]:
        for number in range(5):
            assert sum(reference() is not None for reference in alive) == min(number, 1)
            item = Item()
            alive.append(weakref.ref(item))
            yield item
            del item

    batches = one_ahead(items(), Steps())
    for _ in range(5):
        assert isinstance(next(batches), Item)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["none", "device"])
def test_on_a_gpu_steps_and_views_do_not_disturb_each_other(files: ImageSet, cache: str) -> None:
    def batches(loader: Loader) -> Iterator[Batch]:
        return loader._from_memory(0) if loader.in_memory else loader._from_workers(0)

    loader = _loader(files, device="cuda", cache=cache)
    found = []
    for batch in itertools.islice(loader.batches(), 12):
        torch.cuda._sleep(20_000_000)  # some 10 ms: the host is far ahead when the views are read and overwritten
        found.append(Batch([view.clone() for view in batch.views], batch.index.clone(), batch.epoch, batch.masks))
        torch._foreach_zero_(batch.views)
        del batch
    _assert_same(found, _take(batches(_loader(files, device="cuda", cache=cache)), 12))


@pytest.mark.gpu
def test_on_a_gpu_views_are_made_while_the_step_runs(files: ImageSet) -> None:
    device = torch.device("cuda")
    side = SideStream(device)
    batches = one_ahead(_loader(files, device=device, cache="device")._from_memory(0), side)
    next(batches)
    torch.cuda.synchronize()
    next(batches)  # the views of the third batch are asked for
    torch.cuda._sleep(2_000_000_000)  # the step of the second: about a second
    step = torch.cuda.current_stream().record_event()
    side._stream.synchronize()
    assert not step.query()
    next(batches)  # those of the fourth may take memory that this step gave back: they wait for its end
    side._stream.synchronize()
    assert step.query()
