from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pretrain.data.stores import open_store
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import LoadedModel
from suites import patch_maps
from suites.cache import FeatureCache
from suites.descriptors import patch_tokens
from suites.extractor import Extractor
from suites.patch_maps import Ragged, colour_maps, extract_maps, feature_map, input_multiple
from suites.places import ImageFiles, image_files, images_below

PREPARE = EvalTransform(resize=None, crop=None)
SHAPES = [(16, 24), (20, 24), (24, 17)]
"""Height and width; the second and third fill no whole patches of 8 px."""


@pytest.fixture
def images(tmp_path: Path) -> ImageFiles:
    """Seven pictures of three shapes, in turn."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        pixels = torch.randint(0, 256, (*SHAPES[i % 3], 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    store = open_store(folder)
    return image_files(store, images_below(store, ""), folder, "mine", "train")


def test_arrays_of_several_shapes_come_back_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arrays = [np.arange(n * m, dtype=np.float16).reshape(n, m) for n, m in ((4, 3), (1, 5), (6, 2))]
    ragged = Ragged(iter(arrays))
    assert len(ragged) == 3
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(ragged[number], array)
        assert ragged.shape(number) == array.shape
    # The file has no name: nothing is left behind by a process that is killed.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("disk full: maps of patch features", "told with the way out; exit 3")
def test_a_full_disk_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "w+b", buffering=0))
    with pytest.raises(DinobenchError, match="do not fit in .*No space left.*set TMPDIR to a folder with room"):
        Ragged(iter([np.zeros(3)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_shapes_have_the_tokens_that_they_have_alone(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, images: ImageFiles, workers: int
) -> None:
    monkeypatch.setattr(patch_maps, "CHUNK", 3)
    maps = extract_maps(Extractor(model, workers=workers), images, PREPARE)
    assert len(maps) == 7 and maps.dim == 16
    for number in range(7):
        height, width = SHAPES[number % 3]
        # Filled up with the mean colour, which is 0 after normalisation.
        pixels = F.pad(PREPARE(images.read(number)), (0, -width % 8, 0, -height % 8))
        with torch.no_grad():
            alone = patch_tokens(model.backbone, pixels[None])
        torch.testing.assert_close(
            torch.from_numpy(maps.features[number].copy()), alone.tokens[0].half(), rtol=2e-3, atol=2e-3
        )
        assert tuple(maps.grids[number]) == alone.grid == (-(-height // 8), -(-width // 8))
        assert tuple(maps.spans[number]) == (height / 8, width / 8)
    both = maps.batch([2, 0], "cpu")
    torch.testing.assert_close(both[-6:], torch.from_numpy(maps.features[0].copy()).float())


def test_a_split_is_computed_once_and_told_as_one_set_of_features(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, images: ImageFiles, tmp_path: Path
) -> None:
    monkeypatch.setattr(patch_maps, "CHUNK", 3)
    cache, done = FeatureCache(tmp_path / "cache"), []
    extractor = Extractor(model, cache=cache, progress=lambda what, part, total: done.append((what, part, total)))
    first, second = (extract_maps(extractor, images, PREPARE, size=1) for _ in range(2))
    assert [part["from_cache"] for part in extractor.log] == [False, True]
    assert extractor.log[0]["device"] == "cpu" and float(extractor.log[0]["seconds"]) > 0
    for number in range(7):
        np.testing.assert_array_equal(first.features[number], second.features[number])
    np.testing.assert_array_equal(first.spans, second.spans)
    assert len(list(cache.folder.rglob("*.safetensors"))) == 3
    assert done[:3] == [("features of mine train", 3, 7), ("features of mine train", 6, 7), done[2]]
    extract_maps(extractor, images, PREPARE, size=2)
    assert not extractor.log[2]["from_cache"]


def test_a_split_that_would_fill_the_cache_leaves_it_to_others(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, images: ImageFiles, tmp_path: Path
) -> None:
    monkeypatch.setattr(patch_maps, "CHUNK", 2)
    cache = FeatureCache(tmp_path / "cache", max_bytes=2048)
    maps = extract_maps(Extractor(model, cache=cache), images, PREPARE)
    assert len(maps) == 7 and maps.features[6].shape == (6, 16)
    assert len(list(cache.folder.rglob("*.safetensors"))) == 1  # the part by which its size was found


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_other_networks_give_their_last_map(name: str) -> None:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {} if name == "resnet18" else {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}
    backbone = create_backbone(ModelConfig(name=name, kwargs=kwargs)).eval()
    assert input_multiple(backbone) == (32, 32)
    images = torch.randn(2, 3, 64, 64)
    network: Any = backbone
    with torch.no_grad():
        found = feature_map(backbone, images)
        assert found.shape == (2, 2, 2, network.num_features)
        # Both pool by the mean over the map, so it is the same map.
        torch.testing.assert_close(found.mean((1, 2)), backbone(images), rtol=1e-4, atol=1e-5)


def test_a_network_without_a_map_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="patch tokens of a plain ViT or a network whose timm .* found Flatten"):
        feature_map(nn.Flatten(), torch.zeros(1, 3, 8, 8))
    mixer = create_backbone(ModelConfig(name="mixer_s32_224", kwargs={"img_size": 32}))
    with pytest.raises(UsageError, match="found MlpMixer: this suite does not apply"):
        feature_map(mixer, torch.zeros(1, 3, 32, 32))


def test_features_beyond_float16_are_refused_with_the_image(
    make_model: Callable[..., LoadedModel], images: ImageFiles
) -> None:
    model = make_model()
    backbone: Any = model.backbone
    with torch.no_grad():
        backbone.norm.weight.fill_(1e6)
    with pytest.raises(
        DinobenchError, match=r"last\.pt are not finite in float16 for .*0\.png: the weights are broken"
    ):
        extract_maps(Extractor(replace(model, backbone=backbone)), images, PREPARE)


def test_colours_are_means_over_the_pixels_of_a_patch(images: ImageFiles) -> None:
    maps = colour_maps(images, PREPARE, 8)
    for number in range(3):
        pixels = PREPARE(images.read(number))
        rows, columns = maps.grids[number]
        plain = [
            pixels[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean((1, 2))
            for row in range(rows)
            for column in range(columns)
        ]
        np.testing.assert_allclose(maps.features[number], torch.stack(plain).numpy(), atol=2e-3)
        assert tuple(maps.spans[number]) == (pixels.shape[1] / 8, pixels.shape[2] / 8)
