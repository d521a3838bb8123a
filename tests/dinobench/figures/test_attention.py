from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinobench.figures import attention
from dinobench.figures.inputs import Picture
from pretrain.errors import UsageError
from pretrain.models.backbones import last_self_attention

PICTURE = Picture("ramp.png", Image.linear_gradient("L").convert("RGB").resize((40, 24)))


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.95])
def test_the_mask_is_the_smallest_set_that_holds_the_mass(mass: float) -> None:
    weights = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(0)) ** 3
    mask = attention.mass_mask(weights, mass)
    for head, kept in zip(weights.double(), mask, strict=True):
        inside = head[kept] / head.sum()
        assert inside.sum() >= mass
        assert inside.sum() - inside.min() < mass
        assert inside.min() >= (head[~kept] / head.sum()).max()


def test_equal_weights_and_one_weight() -> None:
    assert attention.mass_mask(torch.ones(1, 2, 5), 0.6).sum() == 6
    single = torch.zeros(1, 2, 2)
    single[0, 1, 0] = 1
    assert attention.mass_mask(single, 0.6).tolist() == [[[False, False], [True, False]]]


@pytest.mark.parametrize("mass", [0.0, 1.0, 60.0])
def test_a_mass_that_is_no_share_is_refused(mass: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1, found"):
        attention.mass_mask(torch.ones(1, 2, 2), mass)


@pytest.mark.parametrize("registers", [0, 3])
def test_the_map_is_the_row_of_cls_over_the_patches(make_subject: Callable, registers: int) -> None:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "reg_tokens": registers}
    subject = make_subject(kwargs=kwargs, size=24)
    x = subject.pixels(PICTURE.image)
    assert x.shape == (3, 24, 40)
    maps = attention.cls_attention(subject, x)
    assert maps.shape == (3, 6, 10)
    whole = last_self_attention(subject.model.backbone, x[None])[0, :, 0]
    assert torch.equal(maps.flatten(1), whole[:, 1 + registers :])
    prefix = whole[:, : 1 + registers].sum(1)
    assert torch.allclose(maps.sum((1, 2)) + prefix, torch.ones(3))


def test_the_picture_shows_a_map_and_a_mask_per_head(make_subject: Callable, tmp_path: Path, look: Callable) -> None:
    subject = make_subject(size=24)
    drawing = attention.draw_attention(subject, PICTURE, 0.6)
    assert drawing.name == "attention_ramp-png_step7"
    assert drawing.numbers["grid"] == [6, 10]
    x = subject.pixels(PICTURE.image)
    maps = attention.cls_attention(subject, x)
    mask = attention.mass_mask(maps, 0.6)
    panels = drawing.figure.axes
    assert len(panels) == 8
    for head, facts in enumerate(drawing.numbers["heads"]):
        assert facts["patches"] == int(mask[head].sum())
        assert 0.6 <= facts["mass"] < 0.6 + 1 / facts["patches"]
        shown, covered = panels[1 + head].images[1], panels[5 + head].images[1]
        assert torch.allclose(torch.tensor(shown.get_array()), maps[head])
        assert torch.equal(torch.tensor(covered.get_array())[..., 3] > 0, mask[head])
        # both lie over the whole image, 24 x 40 px
        assert shown.get_extent() == covered.get_extent() == [-0.5, 39.5, 23.5, -0.5]
    look(drawing.write(tmp_path))


def test_many_heads_take_several_rows(make_subject: Callable) -> None:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 8}
    drawing = attention.draw_attention(make_subject(kwargs=kwargs), PICTURE)
    titles = [axes.get_title() for axes in drawing.figure.axes if axes.get_title().startswith("head")]
    assert titles == [f"head {number}" for number in range(1, 9)]
    assert len(drawing.figure.axes) == 4 * 7


def test_backbones_without_patches_or_cls_are_refused(make_subject: Callable) -> None:
    with pytest.raises(UsageError, match="need the patch tokens of a ViT; ResNet has none"):
        attention.draw_attention(make_subject(name="test_resnet", kwargs={}), PICTURE)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    pooled = make_subject(kwargs={**kwargs, "class_token": False, "global_pool": "avg"})
    with pytest.raises(UsageError, match="need a CLS token"):
        attention.draw_attention(pooled, PICTURE)


def test_an_image_below_a_patch_asks_for_a_larger_size(make_subject: Callable) -> None:
    with pytest.raises(UsageError, match="an image of 3 x 3 px has no whole patch of 4 x 4 px: give a larger --size"):
        attention.draw_attention(make_subject(size=3), Picture("dot", Image.new("RGB", (5, 5))))
