from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.stores import open_store
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import LoadedModel
from suites import extractor as extracting
from suites.cache import FeatureCache
from suites.descriptors import multi_scale
from suites.extractor import Extractor, group_by_shape
from suites.places import ImageFiles, image_files, images_below

PREPARE = EvalTransform(resize=None, crop=None)
DESCRIBE = partial(multi_scale, scales=(1.0, 0.5))


@pytest.fixture
def images(tmp_path: Path) -> ImageFiles:
    """Nine pictures of three shapes, in turn."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        pixels = torch.randint(0, 256, (*[(16, 24), (24, 16), (32, 32)][i % 3], 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "pictures" / f"{i}.png")
    store = open_store(tmp_path / "pictures")
    return image_files(store, images_below(store, ""), tmp_path / "pictures", "mine", "database")


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_many_shapes_come_back_in_their_order(model: LoadedModel, images: ImageFiles, workers: int) -> None:
    found = Extractor(model, workers=workers).describe(images, PREPARE, DESCRIBE)
    with torch.no_grad():
        alone = torch.cat([DESCRIBE(model.backbone, PREPARE(images.read(i))[None]) for i in range(len(images))])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "batch_pixels", "pending"), [(2, 2**23, 2**26), (9, 600, 2**26), (9, 2**23, 1500)]
)
def test_every_image_is_given_once_within_the_bounds(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, batch_pixels: int, pending: int
) -> None:
    monkeypatch.setattr(extracting, "BATCH_PIXELS", batch_pixels)
    monkeypatch.setattr(extracting, "PENDING_PIXELS", pending)
    taken = 0

    def inputs() -> object:
        nonlocal taken
        for i in range(20):
            taken += 1
            yield torch.full((3, *[(16, 24), (20, 20), (24, 16)][i % 3]), float(i))

    seen: list[int] = []
    for numbers, batch in group_by_shape(inputs(), batch_size):
        assert batch.shape[0] == len(numbers) <= batch_size
        assert len(numbers) == 1 or batch[:, 0].numel() <= batch_pixels
        assert batch[:, 0, 0, 0].tolist() == numbers
        seen += numbers
        # What was read and not given out yet waits in memory.
        assert (taken - len(seen)) * 400 <= pending + 400
    assert sorted(seen) == list(range(20))


def test_second_time_comes_from_the_cache_and_other_settings_do_not(
    model: LoadedModel, images: ImageFiles, tmp_path: Path, make_model: Callable[..., LoadedModel]
) -> None:
    extractor = Extractor(model, cache=FeatureCache(tmp_path / "cache"))
    first = extractor.describe(images, PREPARE, DESCRIBE, scales=[1, 0.5])
    assert torch.equal(extractor.describe(images, PREPARE, DESCRIBE, scales=[1, 0.5]), first)
    extractor.describe(images, PREPARE, partial(multi_scale, scales=(1.0,)), scales=[1])
    other = replace(extractor, model=make_model(1))
    assert not torch.equal(other.describe(images, PREPARE, DESCRIBE, scales=[1, 0.5]), first)
    changed = replace(images, fingerprint="0" * 64)
    extractor.describe(changed, PREPARE, DESCRIBE, scales=[1, 0.5])
    assert [entry["from_cache"] for entry in extractor.log] == [False, True, False, False, False]
    assert all({"device", "torch", "seconds"} <= set(entry) for entry in extractor.log)


@pytest.mark.promise("features that are not finite at the evaluation", "image named")
def test_features_that_are_not_finite_name_the_image(model: LoadedModel, images: ImageFiles) -> None:
    def describe(backbone: torch.nn.Module, batch: Tensor) -> Tensor:
        values = DESCRIBE(backbone, batch)
        return values * float("nan") if batch.shape[-1] == 32 else values

    with pytest.raises(DinobenchError, match=r"not finite for 3 of 9 images of mine \(first: .*2\.png\)"):
        Extractor(model).describe(images, PREPARE, describe)


def test_a_network_of_fixed_size_says_which_image_it_refuses(model: LoadedModel, images: ImageFiles) -> None:
    mixer = create_backbone(ModelConfig(name="mixer_s32_224"))
    with pytest.raises(UsageError, match="MlpMixer does not take images of 16 x 24 px"):
        Extractor(replace(model, backbone=mixer.eval())).describe(images, PREPARE, DESCRIBE)


def test_progress_counts_to_the_end(model: LoadedModel, images: ImageFiles) -> None:
    calls: list[tuple[str, int, int]] = []
    Extractor(model, progress=lambda *call: calls.append(call)).describe(images, PREPARE, DESCRIBE)
    assert calls[-1] == ("features of mine database", 9, 9)
