from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import UsageError
from pretrain.models.backbones import last_tokens
from pretrain.models.checkpoint import LoadedModel
from suites.patch_sample import sample_patch_tokens

TRANSFORM = EvalTransform(resize=16, crop=None, interpolation="bilinear")
"""The tiny network has 2 x 2 patches of 16 x 16 images, 16 wide."""


def rows(tokens: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(round(value, 4) for value in row) for row in tokens.tolist()}


def test_all_tokens_of_a_small_set_are_those_of_the_backbone(
    model: LoadedModel, make_images: Callable[..., ImageSet]
) -> None:
    images = make_images(70)  # more than a batch
    found = sample_patch_tokens(model, images, TRANSFORM, num_images=1000, num_tokens=1000, seed=0)
    with torch.no_grad():
        (_, patches), *_ = last_tokens(model.backbone, TRANSFORM.batch(images.array))
    assert patches is not None
    assert found.shape == (70 * 4, 16)
    assert rows(found) == rows(patches.flatten(0, 1))


def test_sample_is_bounded_and_hangs_on_the_seed_alone(
    model: LoadedModel, make_images: Callable[..., ImageSet]
) -> None:
    images = make_images(60)
    bounds = {"num_images": 10, "num_tokens": 25}
    first, again, other = (sample_patch_tokens(model, images, TRANSFORM, **bounds, seed=seed) for seed in (3, 3, 4))
    assert first.shape == (25, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    few = sample_patch_tokens(model, images, TRANSFORM, num_images=10, num_tokens=1000, seed=3)
    assert len(few) == 40 and rows(first) <= rows(few)


def test_backbone_without_patches_is_refused(
    make_model: Callable[..., LoadedModel], make_images: Callable[..., ImageSet]
) -> None:
    resnet = make_model(name="resnet18", kwargs={}, init="timm")
    with pytest.raises(UsageError, match="ResNet has no patch tokens"):
        sample_patch_tokens(resnet, make_images(3), TRANSFORM, num_images=3, num_tokens=3, seed=0)
