from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import last_tokens
from pretrain.models.checkpoint import LoadedModel
from suites import features as extracting
from suites.cache import FeatureCache
from suites.features import COMMON, describe_feature, extract, feature_key, resolve_feature
from suites.rows import HEADER_BYTES
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
    images = make_images()
    other_rule = replace(model, provenance={**model.provenance, "model": {"pos_interpolation": "dino"}})
    keys = [
        feature_key(model, images, TRANSFORM, "fp32", tokens=True),
        feature_key(make_model(seed=1), images, TRANSFORM, "fp32", tokens=True),
        feature_key(other_rule, images, TRANSFORM, "fp32", tokens=True),
        feature_key(model, make_images(seed=1), TRANSFORM, "fp32", tokens=True),
        feature_key(model, images, TRANSFORM.model_copy(update={"resize": 32}), "fp32", tokens=True),
        feature_key(model, images, TRANSFORM, "bf16", tokens=True),
        feature_key(model, images, TRANSFORM, "fp32", tokens=False),
    ]
    assert len(set(keys)) == len(keys)


def test_bf16_features_are_float32_and_near_the_fp32_ones(model: LoadedModel, make_images: MakeImages) -> None:
    exact, fast = (extract(model, make_images(), TRANSFORM, precision=p).cls for p in ("fp32", "bf16"))
    assert fast.dtype == torch.float32
    assert 0 < (exact - fast).abs().max() < 0.1


@pytest.mark.promise("features that are not finite at the evaluation", "checkpoint named")
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


WANTED: list[Feature] = [
    "cls",
    "dino",
    "cls+avg",
    LastBlocks(last=1),
    LastBlocks(last=3),
    LastBlocks(last=2, avgpool=True),
    LastBlocks(last=4, avgpool=True),
]


class CountImages:
    """Images that went through a network."""

    def __init__(self, network: nn.Module):
        self.number = 0
        network.register_forward_hook(self._add)

    def _add(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.number += len(inputs[0])


@pytest.mark.parametrize(
    "vit",
    [{}, {"depth": 1}, {"depth": 6}, {"reg_tokens": 3}, {"init_values": 1e-5}, {"global_pool": "avg"}],
    ids=lambda vit: str(vit or "plain"),
)
def test_columns_of_the_common_entry_equal_a_pass_of_their_own(
    make_model: Callable[..., LoadedModel], make_images: MakeImages, cache: FeatureCache, vit: dict[str, object]
) -> None:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, **vit}
    model, images = make_model(kwargs=kwargs), make_images(20)
    assert images.array is not None
    alone = [extract(model, images, TRANSFORM, feature).cls for feature in WANTED]
    counted = CountImages(model.backbone)
    together = [extract(model, images, TRANSFORM, feature, cache=cache).cls for feature in WANTED]
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    with torch.inference_mode():
        assert torch.equal(together[0], model.backbone(TRANSFORM.batch(images.array)))
        x = TRANSFORM.batch(images.array)
        for feature, found in zip(WANTED[3:], together[3:], strict=True):
            assert isinstance(feature, LastBlocks)
            layers = last_tokens(model.backbone, x, feature.last)
            parts = [cls for cls, _ in layers] + [layers[-1][1].mean(1)] * feature.avgpool
            torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-5, atol=2e-6)
    # A network whose pooled features are not its CLS token has an entry for them (its tokens are not read through
    # the network's own forward pass); the direct call above is counted too.
    assert counted.number == 40


def test_network_without_tokens_is_passed_once(
    make_model: Callable[..., LoadedModel], make_images: MakeImages, cache: FeatureCache
) -> None:
    model = make_model(name="resnet10t", kwargs={}, init="timm")
    counted = CountImages(model.backbone)
    features: list[Feature] = ["cls", "dino", LastBlocks()]
    found = [extract(model, make_images(6), TRANSFORM, feature, cache=cache).cls for feature in features]
    assert counted.number == 6
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    extract(model, make_images(6, seed=1), TRANSFORM, beside=["cls+avg", COMMON], cache=cache)  # told when asked for
    with pytest.raises(UsageError, match="last 2 blocks need a ViT, found ResNet"):
        extract(model, make_images(6), TRANSFORM, LastBlocks(last=2), cache=cache)


def test_entry_too_large_for_the_cache_holds_what_is_asked_for_and_grows(
    model: LoadedModel, make_images: MakeImages, tmp_path: Path
) -> None:
    images, block = make_images(), 60 * 16 * 4
    cache = FeatureCache(tmp_path, max_bytes=4 * 2 * block)  # a quarter has room for 2 of the 3 columns
    counted = CountImages(model.backbone)

    def columns() -> int:
        return (cache.size() - HEADER_BYTES) // block

    extract(model, images, TRANSFORM, "cls", cache=cache)
    assert (counted.number, columns()) == (60, 1)
    pair = extract(model, images, TRANSFORM, LastBlocks(last=2), cache=cache).cls
    assert (counted.number, columns()) == (120, 2)
    extract(model, images, TRANSFORM, "cls+avg", cache=cache)
    assert (counted.number, columns()) == (180, 3)  # with what the entry had before
    assert torch.equal(extract(model, images, TRANSFORM, LastBlocks(last=2), cache=cache).cls, pair)
    assert counted.number == 180


def test_what_is_asked_for_next_is_taken_in(model: LoadedModel, make_images: MakeImages, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=1)
    counted = CountImages(model.backbone)
    extract(model, make_images(), TRANSFORM, "cls", beside=("dino", COMMON), cache=cache)
    for feature in ("dino", COMMON, "cls"):
        assert extract(model, make_images(), TRANSFORM, feature, cache=cache).from_cache
    assert counted.number == 60


def test_large_sets_are_kept_in_half_precision_and_small_ones_are_not(
    model: LoadedModel, make_images: MakeImages, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images()
    exact = extract(model, images, TRANSFORM, "cls+avg", cache=cache)
    assert (exact.cls.dtype, exact.metadata["stored"]) == (torch.float32, "float32")
    monkeypatch.setattr(extracting, "HALF_BYTES", 60 * 16 * 4 - 1)
    alone = extract(model, images, TRANSFORM, "cls+avg")
    kept = extract(model, images, TRANSFORM, "cls+avg", cache=FeatureCache(cache.folder / "half"))
    assert kept.metadata["stored"] == alone.metadata["stored"] == "float16"
    assert torch.equal(kept.cls, alone.cls)
    assert torch.equal(kept.cls, exact.cls.half())
    assert (kept.split().features.dtype, kept.split(stored=True).features.dtype) == (torch.float32, torch.float16)
    assert torch.equal(kept.split(stored=True).take(slice(3, 9)), kept.split().features[3:9])


@pytest.mark.promise("features that overflow float16", "kept in float32")
def test_features_too_large_for_half_precision_are_kept_in_float32(
    model: LoadedModel, make_images: MakeImages, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extracting, "HALF_BYTES", 0)
    with torch.no_grad():
        model.backbone.norm.weight.mul_(1e5)  # type: ignore[union-attr, operator]
    alone, kept = (extract(model, make_images(), TRANSFORM, cache=place) for place in (None, cache))
    assert alone.metadata["stored"] == kept.metadata["stored"] == "float32"
    assert torch.equal(alone.cls, kept.cls)
    assert kept.cls.abs().max() > 65504
