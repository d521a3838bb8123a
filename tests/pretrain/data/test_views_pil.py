from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pretrain.data.transforms import EvalTransform
from pretrain.data.views import ViewsConfig
from pretrain.data.views_pil import PilViews

Golden = Callable[[str], dict[str, np.ndarray]]
ONE_LEVEL = 1 / 255 / 0.224
"""One step of an 8-bit pixel, after normalisation."""

UNCHANGED = ViewsConfig(
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
"""Views that are the image itself."""


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


def test_golden_dinov2_augment_views_equal_the_official_ones(golden: Golden) -> None:
    values = golden("dinov2_augment")
    config = ViewsConfig(
        backend="pil",
        global_size=int(values["global_size"]),
        local_size=int(values["local_size"]),
        global_scale=tuple(values["global_crops_scale"]),
        local_scale=tuple(values["local_crops_scale"]),
        local=int(values["n_local"]),
        blur=(0.0, 0.9, 0.5),  # the released code declares (1.0, 0.1, 0.5)
        blur_kind="gaussian",
    )
    views, image = PilViews(config, seed=0), Image.fromarray(values["image"])
    for number, seed in enumerate(values["seeds"].tolist()):
        random.seed(seed)
        torch.manual_seed(seed)
        found = views.draw(image)
        for ours, name in ((found[:2], "global_avgpool14"), (found[2:], "local_avgpool7")):
            expected = values[name][number]
            pooled = F.avg_pool2d(torch.stack(ours), ours[0].shape[-1] // expected.shape[-1])
            assert np.abs(pooled.numpy() - expected).max() <= 1e-5


def test_golden_dinov2_augment_blurs_where_the_declared_probability_says_not_to(golden: Golden) -> None:
    values = golden("dinov2_augment")
    trials, small = 600, Image.fromarray(values["image"][:32, :32])
    pixels = torch.from_numpy(values["image"][:32, :32]).permute(2, 0, 1) / 255
    found = []
    for declared in values["blur_p_declared"].tolist():
        config = UNCHANGED.model_copy(update={"global_size": 32, "blur": (1 - declared, 0, 0), "blur_kind": "gaussian"})
        views = PilViews(config, seed=0)
        found.append(np.mean([not torch.equal(views(small, k, 0)[0], pixels) for k in range(trials)]))
    happens = 1 - values["blur_p_declared"]
    spread = 4 * np.sqrt(happens * (1 - happens) * 2 / trials + 1e-4)  # two samples; where nothing is drawn, 4 %
    assert (np.abs(found - values["blur_rate_observed_600"]) <= spread).all()
    # The narrowest kernels leave 8-bit pixels as they are: the rate is a little below 1 - p.
    assert (found <= happens + spread).all() and (found >= 0.85 * happens - spread).all()


@pytest.mark.parametrize(("resize", "name"), [(256, "eval_avgpool8"), (224, "eval_resize224_avgpool8")])
def test_golden_dinov2_augment_evaluation_transforms(golden: Golden, resize: int, name: str) -> None:
    values = golden("dinov2_augment")
    found = EvalTransform(resize=resize)(Image.fromarray(values["image"]))
    np.testing.assert_allclose(F.avg_pool2d(found, 8), values[name], rtol=1e-4, atol=1e-5)


def test_golden_dinov2_augment_crops_of_the_linear_probe(golden: Golden) -> None:
    values = golden("dinov2_augment")
    none = (0.0, 0.0, 0.0)
    config = ViewsConfig(backend="pil", global_scale=(0.08, 1.0), local=0, jitter=0, gray=0, blur=none, solarize=none)
    torch.manual_seed(int(values["seeds"][0]))
    found = PilViews(config, seed=0).draw(Image.fromarray(values["image"]))[0]
    np.testing.assert_allclose(F.avg_pool2d(found, 8), values["linear_train_avgpool8_seed"], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("blur_kind", ["box", "gaussian"])
def test_operations_of_probability_zero_leave_the_crop_alone(blur_kind: str) -> None:
    config = UNCHANGED.model_copy(update={"blur_kind": blur_kind})
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for view in PilViews(config, 0)(Image.fromarray(pixels), 0, 0):
        np.testing.assert_allclose(view.permute(1, 2, 0), pixels / 255, atol=1e-6)
