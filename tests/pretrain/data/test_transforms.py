from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from pretrain.data.transforms import EvalTransform

Golden = Callable[[str], dict[str, np.ndarray]]
LEVEL = 1 / 255 / 0.224


def test_golden_eval_transform_equals_the_official_one(golden: Golden) -> None:
    values = golden("eval_transform")
    found = EvalTransform()(Image.fromarray(values["image"]))
    pooled = F.avg_pool2d(found, found.shape[-1] // values["out_avgpool8"].shape[-1])
    np.testing.assert_allclose(pooled, values["out_avgpool8"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 100], values["row100"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 80), (20, 14), (40, 40)])
def test_tensors_and_pil_images_differ_by_at_most_two_levels(size: tuple[int, int], interpolation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    transform = EvalTransform(resize=32, crop=28, interpolation=interpolation)
    by_pil, by_tensor = transform(Image.fromarray(pixels)), transform(torch.from_numpy(pixels).permute(2, 0, 1))
    difference = (by_pil - by_tensor).abs() / LEVEL
    assert by_pil.shape == (3, 28, 28)
    assert difference.max() <= 2.1 and difference.mean() < 0.1


def test_a_batch_gives_what_its_images_give() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    transform = EvalTransform(resize=16, crop=None, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    batch = transform.batch(pixels)
    assert batch.shape == (4, 3, 16, 16)
    assert all(torch.equal(batch[k], transform(pixels[k])) for k in range(4))


def test_without_resize_and_crop_only_the_scale_changes() -> None:
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    transform = EvalTransform(resize=None, crop=None, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(transform(pixels), pixels / 255)


def test_the_fingerprint_depends_on_every_field() -> None:
    others = [
        {"resize": 255},
        {"crop": None},
        {"interpolation": "bilinear"},
        {"mean": (0.0, 0.0, 0.0)},
        {"std": (1, 1, 1)},
    ]
    prints = [EvalTransform().fingerprint(), *(EvalTransform(**other).fingerprint() for other in others)]
    assert len(set(prints)) == len(prints)
    assert EvalTransform().fingerprint() == EvalTransform(resize=256).fingerprint()


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        EvalTransform(size=3)
