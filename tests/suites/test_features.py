from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import last_tokens
from pretrain.models.checkpoint import LoadedModel
from suites.cache import FeatureCache
from suites.features import default_workers, describe_feature, extract, feature_key, resolve_feature
from suites.suite import Feature, LastBlocks

MakeImages = Callable[..., ImageSet]
TRANSFORM = EvalTransform(resize=16, crop=None, interpolation="bilinear")


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@torch.no_grad()
def test_cls_is_the_backbones_own_output_whatever_the_batch_size(model: LoadedModel, make_images: MakeImages) -> None:
    images = make_images(20)
    assert images.array is not None and images.labels is not None
    expected = model.backbone(TRANSFORM.batch(images.array))
    for batch_size in (3, 64):
        features = extract(model, images, TRANSFORM, batch_size=batch_size)
        torch.testing.assert_close(features.cls, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(features.labels, images.labels)
    assert features.index.tolist() == list(range(20))
    assert not features.cls.is_inference()


@torch.no_grad()
def test_layers_are_concatenated_oldest_first_then_the_mean_patch(model: LoadedModel, make_images: MakeImages) -> None:
    images = make_images(4)
    assert images.array is not None
    x = TRANSFORM.batch(images.array)
    (cls1, _), (cls2, patches) = last_tokens(model.backbone, x, 2)
    assert patches is not None
    wanted: list[tuple[Feature, torch.Tensor]] = [
        ("cls+avg", torch.cat([cls2, patches.mean(1)], 1)),
        ("dino", torch.cat([cls1, cls2], 1)),  # all blocks of a network of two
        (LastBlocks(last=2, avgpool=True), torch.cat([cls1, cls2, patches.mean(1)], 1)),
    ]
    for feature, expected in wanted:
        found = extract(model, images, TRANSFORM, feature).cls
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dino_feature_follows_the_width_of_the_backbone(make_model: Callable[..., LoadedModel]) -> None:
    wide = make_model(kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 768, "depth": 1, "num_heads": 2})
    assert resolve_feature("dino", wide.backbone) == LastBlocks(last=1, avgpool=True)
    assert resolve_feature("dino", make_model().backbone) == LastBlocks(last=4)
    resnet = make_model(name="resnet10t", kwargs={}, init="timm").backbone
    assert resolve_feature("dino", resnet) is None
    with pytest.raises(UsageError, match="needs patch tokens"):
        resolve_feature("cls+avg", resnet)
    assert describe_feature(resolve_feature("dino", make_model().backbone)) == "cls of last 4 blocks"


def test_second_extraction_comes_from_the_cache_and_is_equal(
    model: LoadedModel, make_images: MakeImages, cache: FeatureCache
) -> None:
    first, second = (extract(model, make_images(), TRANSFORM, cache=cache) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert torch.equal(first.cls, second.cls)
    assert second.metadata["device"] == "cpu"


def test_key_changes_with_everything_that_changes_features(
    model: LoadedModel, make_model: Callable[..., LoadedModel], make_images: MakeImages
) -> None:
    images, plain = make_images(), None
    other_rule = replace(model, provenance={**model.provenance, "model": {"pos_interpolation": "dino"}})
    keys = [
        feature_key(model, images, TRANSFORM, plain, "fp32"),
        feature_key(make_model(seed=1), images, TRANSFORM, plain, "fp32"),
        feature_key(other_rule, images, TRANSFORM, plain, "fp32"),
        feature_key(model, make_images(seed=1), TRANSFORM, plain, "fp32"),
        feature_key(model, images, TRANSFORM.model_copy(update={"resize": 32}), plain, "fp32"),
        feature_key(model, images, TRANSFORM, LastBlocks(last=2), "fp32"),
        feature_key(model, images, TRANSFORM, plain, "bf16"),
    ]
    assert len(set(keys)) == len(keys)


def test_bf16_features_are_float32_and_near_the_fp32_ones(model: LoadedModel, make_images: MakeImages) -> None:
    exact, fast = (extract(model, make_images(), TRANSFORM, precision=p).cls for p in ("fp32", "bf16"))
    assert fast.dtype == torch.float32
    assert 0 < (exact - fast).abs().max() < 0.1


def test_features_that_are_not_finite_name_the_checkpoint(model: LoadedModel, make_images: MakeImages) -> None:
    with torch.no_grad():
        model.backbone.norm.weight[0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(DinobenchError, match=r"last\.pt are not finite for 60 of 60 images of patterns train"):
        extract(model, make_images(), TRANSFORM)


def test_files_are_transformed_one_by_one_through_pil(model: LoadedModel, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 30 + number, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    images = open_dataset(f"folder:{tmp_path}")
    transform = EvalTransform(resize=20, crop=16)
    calls: list[tuple[str, int, int]] = []
    features = extract(model, images, transform, batch_size=4, progress=lambda *call: calls.append(call))
    expected = torch.stack([transform(images.image(i)) for i in range(6)])
    with torch.no_grad():
        torch.testing.assert_close(features.cls, model.backbone(expected), rtol=1e-5, atol=1e-6)
    assert [call[1:] for call in calls] == [(4, 6), (6, 6)]


def test_unlabelled_images_have_features_and_no_labels(model: LoadedModel, make_images: MakeImages) -> None:
    features = extract(model, make_images(labelled=False), TRANSFORM)
    assert features.labels is None
    assert len(features.split().labels) == 0


def test_small_sets_are_decoded_without_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert default_workers(100) == 0
    assert default_workers(50_000) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert default_workers(50_000) == 0


@pytest.mark.slow
def test_worker_processes_give_the_same_features(model: LoadedModel, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(0, 256, (20, 20 + number, 3), generator=generator, dtype=torch.uint8)
        (tmp_path / f"class{number % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"class{number % 2}" / f"{number}.png")
    images, transform = open_dataset(f"folder:{tmp_path}"), EvalTransform(resize=20, crop=16)
    alone, together = (extract(model, images, transform, batch_size=4, workers=n).cls for n in (0, 2))
    assert torch.equal(alone, together)
