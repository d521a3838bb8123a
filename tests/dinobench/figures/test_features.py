from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinobench.figures import features
from dinobench.figures.inputs import Picture, training_pictures
from pretrain.errors import UsageError
from pretrain.models.backbones import last_tokens


def grids(*shapes: tuple[int, int], dim: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3.0, 2.0] + [0.1] * (dim - 3))
    return [torch.randn(*shape, dim, generator=generator) * scale + 7 for shape in shapes]


def test_the_components_are_those_of_the_covariance_over_all_images() -> None:
    tokens = grids((4, 5), (3, 3), (6, 2))
    colours, shares = features.principal_colours(tokens)
    assert [tuple(colour.shape) for colour in colours] == [(4, 5, 3), (3, 3, 3), (6, 2, 3)]
    flat = torch.cat([grid.flatten(0, 1) for grid in tokens]).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    assert shares == pytest.approx((values.flip(0)[:3] / values.sum()).tolist(), rel=1e-9)
    projected = (flat - flat.mean(0)) @ vectors.flip(1)[:, :3]
    painted = torch.cat([colour.flatten(0, 1) for colour in colours]).double()
    assert painted.min() == 0 and painted.max() == 1
    for component in range(3):
        inner = (painted[:, component] > 0) & (painted[:, component] < 1)
        pair = torch.stack([painted[inner, component], projected[inner, component]])
        assert torch.corrcoef(pair)[0, 1].abs() == pytest.approx(1, abs=1e-6)


def test_a_sign_of_the_axes_changes_nothing() -> None:
    """In another order of the tokens the decomposition may turn an axis around; the colours stay."""
    tokens = grids((8, 8))
    again, _ = features.principal_colours([tokens[0].flip(0)])
    colours, _ = features.principal_colours(tokens)
    assert torch.allclose(again[0].flip(0), colours[0], atol=1e-6)


def test_equal_tokens_have_one_colour_in_all_images() -> None:
    first, second = grids((4, 4), (4, 4))
    second[0, 0] = first[3, 2]
    colours, _ = features.principal_colours([first, second])
    assert torch.equal(colours[1][0, 0], colours[0][3, 2])


def test_too_few_patches_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 4 patches, found 3"):
        features.principal_colours(grids((1, 3)))


def test_the_grid_is_that_of_the_last_block(make_subject: Callable) -> None:
    subject = make_subject(size=24)
    x = subject.pixels(Image.linear_gradient("L").convert("RGB").resize((40, 24)))
    grid = features.patch_grid(subject, x)
    assert grid.shape == (6, 10, 24)
    with torch.no_grad():
        assert torch.equal(grid.flatten(0, 1), last_tokens(subject.model.backbone, x[None])[0][1][0])


def test_each_image_stands_beside_its_colours(make_subject: Callable, tmp_path: Path, look: Callable) -> None:
    subject = make_subject()
    pictures = [*training_pictures(subject, 4), Picture("noise.png", Image.effect_noise((20, 16), 90).convert("RGB"))]
    drawing = features.draw_features(subject, pictures)
    assert drawing.numbers["images"] == [picture.label for picture in pictures]
    assert sum(drawing.numbers["explained_variance"]) <= 1 + 1e-9
    panels = drawing.figure.axes
    assert len(panels) == 2 * 8
    assert [axes.get_title() for axes in panels[8:10]] == ["noise.png", "4 x 5 patches"]
    assert tuple(panels[9].images[0].get_array().shape) == (4, 5, 3)
    look(drawing.write(tmp_path))


def test_a_backbone_without_patch_tokens_is_refused(make_subject: Callable) -> None:
    subject = make_subject(name="test_resnet", kwargs={})
    with pytest.raises(UsageError, match="colours of patches need the patch tokens of a ViT; ResNet has none"):
        features.draw_features(subject, training_pictures(subject, 1))
