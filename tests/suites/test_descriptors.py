from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.transforms import EvalTransform
from pretrain.errors import UsageError
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import LoadedModel
from suites.descriptors import cls_and_gem, multi_scale, patch_tokens, thumbnail, whole_patches

Arrays = dict[str, np.ndarray]
Golden = Callable[[str], Arrays]
BuildViT = Callable[[Arrays], torch.nn.Module]


@torch.no_grad()
def test_golden_dino_vit_multiscale_of_single_images_and_of_a_batch(golden: Golden, official_vit: BuildViT) -> None:
    reference = golden("dino_vit")
    backbone, x = official_vit(reference), torch.from_numpy(reference["multiscale.x"])
    scales = (1.0, 2**-0.5, 0.5)
    expected = torch.from_numpy(reference["multiscale.feat"]).reshape(len(x), -1)
    torch.testing.assert_close(multi_scale(backbone, x, scales), expected, rtol=0, atol=1e-5)
    doubled = multi_scale(backbone, torch.cat([x, x.flip(-1)]), scales)
    torch.testing.assert_close(doubled[:1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(doubled.norm(dim=1), torch.ones(2))


@torch.no_grad()
def test_golden_copydays_gem_whiten_features(golden: Golden, official_vit: BuildViT) -> None:
    reference = golden("copydays_gem_whiten")
    side = int(reference["imsize"])
    images = [Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC) for pixels in reference["images"]]
    transform = EvalTransform(resize=None, crop=None)
    inputs = torch.stack([transform(image) for image in images])
    found = cls_and_gem(official_vit(reference), inputs, 4.0)
    torch.testing.assert_close(found, torch.from_numpy(reference["features"]), rtol=1e-4, atol=1e-5)


def tiny(rule: str) -> torch.nn.Module:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs, pos_interpolation=rule)).eval()


@torch.no_grad()
def test_pixels_that_fill_no_patch_do_not_count() -> None:
    images = torch.randn(2, 3, 29, 39, generator=torch.Generator().manual_seed(0))
    ours = tiny("timm")
    assert whole_patches(ours, images).shape == (2, 3, 24, 32)
    assert whole_patches(tiny("dino"), images).shape == images.shape
    torch.testing.assert_close(
        multi_scale(ours, images, (1.0,)), multi_scale(ours, images[..., :24, :32], (1.0,)), rtol=0, atol=0
    )
    patches = patch_tokens(ours, images)
    assert patches.tokens.shape == (2, 12, 16)
    assert (patches.grid, patches.size) == ((3, 4), (8, 8))


@torch.no_grad()
def test_a_convolutional_network_has_no_patches_to_pool_or_follow() -> None:
    resnet = create_backbone(ModelConfig(name="resnet18")).eval()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cls_and_gem(resnet, images, 4.0), resnet(images))
    with pytest.raises(UsageError, match="patch tokens need a plain ViT, found ResNet"):
        patch_tokens(resnet, images)


def test_generalised_mean_of_equal_tokens_is_the_token(model: LoadedModel) -> None:
    describe = partial(cls_and_gem, power=4.0)
    flat = torch.zeros(1, 3, 16, 16)
    found = describe(model.backbone, flat)
    tokens = patch_tokens(model.backbone, flat).tokens.clamp(min=1e-6)
    assert (found[:, 16:] >= tokens.mean(1) - 1e-6).all()
    assert (found[:, 16:] <= tokens.amax(1) + 1e-6).all()


def test_thumbnail_never_enlarges_and_keeps_the_shape() -> None:
    assert thumbnail(Image.new("RGB", (300, 100)), 150).size == (150, 50)
    assert thumbnail(Image.new("RGB", (100, 300)), 150).size == (50, 150)
    small = Image.new("RGB", (30, 10))
    assert thumbnail(small, 150).size == (30, 10)
