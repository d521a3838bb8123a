from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.errors import UsageError
from pretrain.models.backbones import feature_dim
from pretrain.models.pixels import Pixels, is_pixels, load_pixels, pixels_sha256


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (8, 3)])
def test_images_up_to_its_side_keep_every_pixel_and_their_distances(height: int, width: int) -> None:
    x = torch.randn(4, 3, height, width, dtype=torch.float64)
    features = Pixels(8)(x)
    assert features.shape == (4, 192) and feature_dim(Pixels(8)) == 192
    assert torch.equal(features.view(4, 3, 8, 8)[:, :, :height, :width], x)
    assert torch.allclose(torch.cdist(features, features), torch.cdist(x.flatten(1), x.flatten(1)))


def test_larger_images_are_reduced_by_the_mean_over_equal_areas() -> None:
    x = torch.randn(2, 3, 12, 6)
    features = Pixels(4)(x).view(2, 3, 4, 4)
    assert features[1, 2, 3, 0].item() == pytest.approx(x[1, 2, 9:12, 0:2].mean().item(), abs=1e-6)
    one = torch.ones(1, 3, 50, 33)
    assert torch.allclose(Pixels(4)(one), torch.ones(1, 48))


def test_each_side_is_a_network_of_its_own() -> None:
    names = ("pixels", "pixels:32", "pixels:64")
    assert pixels_sha256("pixels") == pixels_sha256("pixels:32") != pixels_sha256("pixels:64")
    for name, side in zip(names, (32, 32, 64), strict=True):
        model = load_pixels(name)
        assert (model.provenance["arch"], model.provenance["path"]) == (f"pixels{side}", name)
        assert model.provenance["weights_sha256"] == pixels_sha256(name)
        assert not list(model.backbone.parameters())


def test_a_word_stands_for_pixels_and_a_path_for_a_file(tmp_path: Path) -> None:
    assert is_pixels(Path("pixels")) and is_pixels("pixels:64")
    assert not any(map(is_pixels, ("pixels.pt", tmp_path / "pixels", "runs/pixels", "pixelsx")))


@pytest.mark.parametrize("name", ["pixels:", "pixels:0", "pixels:225", "pixels:all"])
def test_a_side_that_is_none_is_refused_with_the_range(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected pixels:<side> with a side from 1 to 224"):
        load_pixels(name)
