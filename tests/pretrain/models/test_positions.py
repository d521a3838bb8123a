"""Position embeddings by timm's rule and by the official DINO rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from pretrain.errors import UsageError
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.positions import PositionalViT, resampling_matrix

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny(**settings: object) -> PositionalViT:
    torch.manual_seed(0)
    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=TINY, **settings)).eval()  # type: ignore[arg-type]
    assert isinstance(backbone, PositionalViT)
    return backbone


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (48, 48), (40, 24), (16, 64)])
def test_timm_rule_equals_timm(size: tuple[int, int]) -> None:
    ours = tiny(pos_interpolation="timm")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **TINY).eval()
    theirs.load_state_dict(ours.state_dict())
    x = images(*size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_gradient_of_the_positions_equals_timm() -> None:
    ours = tiny(pos_interpolation="timm")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **TINY).eval()
    theirs.load_state_dict(ours.state_dict())
    for backbone in (ours, theirs):
        backbone(images(16, 16)).square().sum().backward()
    assert ours.pos_embed is not None
    torch.testing.assert_close(ours.pos_embed.grad, theirs.pos_embed.grad, rtol=1e-4, atol=1e-5)


def test_golden_dino_vit_positions(golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    reference = golden("dino_vit")
    patch, stored = int(reference["patch_size"]), torch.from_numpy(reference["sd.pos_embed"])
    side = int(reference["img_size"]) // patch
    for key in (key for key in reference if key.endswith(".pos_embed") and key != "sd.pos_embed"):
        height, width = reference[key.replace("pos_embed", "x")].shape[-2:]
        grid = (height // patch, width // patch)
        expected = torch.from_numpy(reference[key])[0, 1:]
        if height == width and grid == (side, side):
            assert torch.equal(expected, stored[0, 1:])
            continue
        matrix = resampling_matrix((side, side), grid, "dino")
        torch.testing.assert_close(matrix.float() @ stored[0, 1:], expected, rtol=0, atol=1e-5)


def test_official_rule_moves_the_positions_of_an_image_that_is_not_square() -> None:
    """33x35 has the stored number of patches, but the official code leaves it out only for square images."""
    backbone = tiny(pos_interpolation="dino")
    assert backbone.pos_embed is not None
    assert torch.equal(backbone.positions(8, 8, square=True), backbone.pos_embed)
    assert not torch.allclose(backbone.positions(8, 8, square=False), backbone.pos_embed, atol=1e-4)


def test_official_rule_drops_pixels_without_a_patch() -> None:
    backbone = tiny(pos_interpolation="dino")
    x = images(19, 19)
    torch.testing.assert_close(backbone(x), backbone(x[..., :16, :16]))


@pytest.mark.parametrize(("rule", "side"), [("timm", 30), ("timm", 3), ("dino", 3)])
def test_size_that_does_not_go_with_the_patch_is_refused(rule: str, side: int) -> None:
    with pytest.raises(UsageError, match=r"28 or 32 px|use at least 4 px"):
        tiny(pos_interpolation=rule)(images(side, side))


def test_positions_are_full_precision_under_autocast() -> None:
    backbone = tiny(pos_interpolation="dino")
    expected = backbone.positions(4, 4, square=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        positions = backbone.positions(4, 4, square=True)
    assert positions.dtype == torch.float32
    assert torch.equal(positions, expected)


def test_evaluating_first_does_not_stop_training() -> None:
    backbone = tiny()
    with torch.inference_mode():
        backbone(images(16, 16))
    backbone(images(16, 16)).sum().backward()
    assert backbone.pos_embed is not None and backbone.pos_embed.grad is not None
