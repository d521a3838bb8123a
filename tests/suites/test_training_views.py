from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ArraySource, ImageSet, to_tensor
from suites.training_views import (
    CropViews,
    Order,
    RandomCrop,
    RecipeViews,
    TrainingAugmentation,
    crop_batches,
    decoded_batches,
    seeded,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with detail, as PIL RGB; neither black nor white, where PIL's two passes would each be clipped."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    smooth = 0.3 + 0.35 * F.interpolate(coarse, (height, width), mode="bilinear")[0]
    noisy = smooth + 0.05 * torch.rand(3, height, width, generator=generator)
    return Image.fromarray((noisy.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(40, 53, 16), (16, 16, 16), (12, 9, 24)])
def test_batched_crops_equal_those_of_pil_up_to_its_rounding(
    height: int, width: int, size: int, interpolation: str
) -> None:
    views = CropViews(RandomCrop(size=size, interpolation=interpolation), MEAN, STD, seed=3)
    images = [photo(height, width, seed) for seed in range(12)]
    number = torch.arange(12) + 100
    batched = views.batch(torch.stack([to_tensor(image) for image in images]), number, epoch=2)
    alone = torch.stack([views.one(image, (2, int(i), 0)) for image, i in zip(images, number, strict=True)])
    apart = (batched - views.normalise(alone)).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert apart.max() < 1.5  # rows and columns are each rounded to 8 bits in PIL
    assert apart.mean() < 0.5


def test_a_bilinear_crop_is_the_antialiased_resize_of_its_box() -> None:
    views = CropViews(RandomCrop(size=8, flip=1.0), MEAN, STD, seed=0)
    pixels = torch.randint(0, 256, (6, 3, 30, 22), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    number = torch.arange(6)
    made = views.batch(pixels, number, epoch=0)
    boxes = np.stack(views._boxes(np.tile([[30, 22]], (6, 1)), number.numpy(), 0), axis=1).astype(int)
    for image, view, (top, left, height, width, flip) in zip(pixels, made, boxes, strict=True):
        assert flip
        box = image[None, :, top : top + height, left : left + width].double()
        expected = F.interpolate(box, (8, 8), mode="bilinear", antialias=True)[0].flip(-1)
        torch.testing.assert_close(view.double(), views.normalise(expected).double(), rtol=0, atol=1e-5)


def test_flips_and_crops_are_drawn_as_often_and_as_large_as_configured() -> None:
    views = CropViews(RandomCrop(scale=(0.2, 0.6), flip=0.3), MEAN, STD, seed=5)
    _, _, height, width, flip = views._boxes(np.tile([[200, 200]], (4000, 1)), np.arange(4000), 1)
    area = height * width / 200**2
    assert flip.mean() == pytest.approx(0.3, abs=0.03)
    assert area.mean() == pytest.approx(0.4, abs=0.01)
    assert area.min() > 0.19 and area.max() < 0.61


def test_every_image_is_seen_once_an_epoch_in_another_order() -> None:
    order = Order(num_images=10, batch_size=4, epochs=2, seed=0)
    batches = list(order.batches())
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert len(batches) == 2 * order.steps_per_epoch
    first, second = ([key for batch in part for key in batch] for part in (batches[:3], batches[3:]))
    for epoch, keys in ((0, first), (1, second)):
        assert sorted(keys) == [(epoch, number, 0) for number in range(10)]
    assert [key[1] for key in first] != [key[1] for key in second]


def test_incomplete_batches_can_be_left_out() -> None:
    order = Order(num_images=10, batch_size=4, epochs=1, seed=0, drop_last=True)
    assert [len(batch) for batch in order.batches()] == [4, 4] and order.steps_per_epoch == 2


def test_repeats_show_fewer_images_more_often_in_an_epoch_of_the_same_length() -> None:
    order = Order(num_images=9, batch_size=3, epochs=1, seed=0, repeats=3)
    keys = [key for batch in order.batches() for key in batch]
    assert len(keys) == len(set(keys)) == 9
    assert len({number for _, number, _ in keys}) == 3


def test_gray_sets_in_memory_give_the_views_of_three_equal_channels(make_images: Callable[..., ImageSet]) -> None:
    gray = make_images(12)
    colour = ImageSet("c", "train", "f", ArraySource(gray.source.pixels.expand(-1, 3, -1, -1).contiguous()))
    views, order = CropViews(RandomCrop(size=8), MEAN, STD, seed=0), Order(12, 5, 2, 0)
    pairs = list(zip(*(crop_batches(images, views, order, "cpu", 0) for images in (gray, colour)), strict=True))
    assert len(pairs) == 6
    for one, three in pairs:
        assert torch.equal(one.number, three.number)
        torch.testing.assert_close(one.views, three.views)


def test_files_of_mixed_sizes_give_the_same_views_in_any_number_of_workers(tmp_path: Path) -> None:
    for number in range(7):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(20 + number, 30 - number, number).save(folder / f"{number}.png")
    (tmp_path / "val/class0").mkdir(parents=True)
    photo(20, 20).save(tmp_path / "val/class0/x.png")
    images = open_dataset(f"imagenet:{tmp_path}", "train")
    assert images.array is None
    views, order = CropViews(RandomCrop(size=8), MEAN, STD, seed=0), Order(7, 3, 2, 0)
    found = [list(crop_batches(images, views, order, "cpu", workers)) for workers in (0, 2)]
    assert [len(batch.number) for batch in found[0]] == [3, 3, 1, 3, 3, 1]
    for alone, helped in zip(*found, strict=True):
        assert alone.epoch == helped.epoch
        assert torch.equal(alone.number, helped.number)
        assert torch.equal(alone.views, helped.views)
        assert alone.views.shape[1:] == (3, 8, 8)
    number = int(found[0][4].number[1])
    alone = views.normalise(views.one(images.image(number), (1, number, 0))[None])[0]
    assert torch.equal(found[0][4].views[1], alone)


def test_large_batches_of_files_are_put_together_from_parts(
    make_images: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(10)
    views, order = CropViews(RandomCrop(size=8), MEAN, STD, seed=0), Order(10, 7, 1, 0)
    monkeypatch.setattr(ImageSet, "array", None)
    whole = list(crop_batches(images, views, order, "cpu", 0))
    monkeypatch.setattr("suites.training_views.PART", 2)
    parts = list(crop_batches(images, views, order, "cpu", 0))
    assert [len(batch.number) for batch in parts] == [7, 3]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.number, other.number) and torch.equal(one.views, other.views)


def test_views_of_the_recipe_depend_on_epoch_image_and_repeat_alone() -> None:
    views, image = RecipeViews(TrainingAugmentation(size=24, erase=1.0), seed=1), photo(40, 30)
    view = views.one(image, (0, 5, 0))
    assert view.shape == (3, 24, 24) and view.dtype == torch.float32
    assert torch.equal(view, views.one(image, (0, 5, 0)))
    others = [views.one(image, key) for key in ((1, 5, 0), (0, 6, 0), (0, 5, 1))]
    others.append(RecipeViews(views.config, seed=2).one(image, (0, 5, 0)))
    assert not any(torch.equal(view, other) for other in others)


def test_randaugment_at_full_strength_blackens_where_no_bit_is_left() -> None:
    always = "rand-m10-n1-p1.0-inc1"
    views = RecipeViews(TrainingAugmentation(size=16, auto_augment=always, erase=0, mean=MEAN, std=STD), seed=0)
    black = -torch.tensor(MEAN).view(3, 1, 1) / torch.tensor(STD).view(3, 1, 1)
    made = [views.one(photo(20, 20), (0, number, 0)) for number in range(60)]
    blackened = sum(torch.allclose(view, black.expand_as(view)) for view in made)
    assert 1 <= blackened < 15  # one operation of 15


def test_views_of_the_recipe_without_augmentation_are_the_image() -> None:
    plain = TrainingAugmentation(
        size=16, scale=(1, 1), ratio=(1, 1), flip=0, auto_augment=None, color_jitter=0, erase=0, mean=MEAN, std=STD
    )
    image = photo(16, 16)
    expected = (to_tensor(image).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(RecipeViews(plain, seed=0).one(image, (0, 0, 0)), expected)


def test_making_views_leaves_the_global_generators_as_they_were(make_images: Callable[..., ImageSet]) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), torch.rand(()).item()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    expected = draws()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    views = RecipeViews(TrainingAugmentation(size=16), seed=1)
    list(decoded_batches(make_images(6), views.one, Order(6, 3, 1, 0).batches(), "cpu", 0))
    with seeded(1, 2, 3):
        inside = draws()
    assert draws() == expected
    with seeded(1, 2, 3):
        assert draws() == inside != expected
