from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pretrain.data.views import ViewsConfig
from pretrain.data.views_pil import PilViews

Golden = Callable[[str], dict[str, np.ndarray]]
ONE_LEVEL = 1 / 255 / 0.224
"""One step of an 8-bit pixel, after normalisation."""


def test_golden_dino_augment_views_equal_the_official_ones(golden: Golden) -> None:
    values = golden("dino_augment")
    config = ViewsConfig(
        backend="pil",
        global_scale=tuple(values["global_crops_scale"]),
        local_scale=tuple(values["local_crops_scale"]),
        local=int(values["n_local"]),
    )
    views, image = PilViews(config, seed=0), Image.fromarray(values["image"])
    for number, seed in enumerate(values["seeds"].tolist()):
        random.seed(seed)
        torch.manual_seed(seed)
        found = views.draw(image)
        globals_, locals_ = torch.stack(found[:2]), torch.stack(found[2:])
        for ours, pool, name in ((globals_, 16, "global_avgpool16"), (locals_, 12, "local_avgpool12")):
            difference = F.avg_pool2d(ours, pool).numpy() - values[name][number]
            assert np.abs(difference).max() <= ONE_LEVEL
        if number == 0:
            assert np.abs(found[2].numpy() - values["first_local_crop_full"]).max() <= ONE_LEVEL


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


SMALL = ViewsConfig(backend="pil", global_size=16, local_size=8, local=2, rotation=10, shear=5, noise=0.1, erase=0.5)


def test_same_seed_epoch_and_image_give_the_same_views(image: Image.Image) -> None:
    first, again = PilViews(SMALL, seed=1)(image, 5, 2), PilViews(SMALL, seed=1)(image, 5, 2)
    assert [tuple(view.shape) for view in first] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 2
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for other in (
        PilViews(SMALL, seed=2)(image, 5, 2),
        PilViews(SMALL, 1)(image, 6, 2),
        PilViews(SMALL, 1)(image, 5, 3),
    ):
        assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[2], first[3])


def test_making_views_leaves_the_global_generators_as_they_were(image: Image.Image) -> None:
    random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), torch.rand(1)
    random.seed(0)
    torch.manual_seed(0)
    PilViews(SMALL, seed=1)(image, 0, 0)
    assert (random.random(), torch.rand(1)) == expected


def test_operations_of_probability_zero_leave_the_crop_alone() -> None:
    config = ViewsConfig(
        backend="pil",
        global_size=6,
        local=0,
        global_scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        flip=0,
        jitter=0,
        gray=0,
        blur=(0, 0, 0),
        solarize=(0, 0, 0),
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for view in PilViews(config, 0)(Image.fromarray(pixels), 0, 0):
        np.testing.assert_allclose(view.permute(1, 2, 0), pixels / 255, atol=1e-6)
