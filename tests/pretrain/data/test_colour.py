from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from pretrain.data import colour

IDENTITY = (1.0, 0.0, 0.0)


@pytest.fixture
def images() -> torch.Tensor:
    images = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    images[0] = images[0, :1]  # a gray image has no hue
    images[1, 0] = images[1, 1]  # ties for the largest channel
    images[2, 2] = images[2, 0]
    return images


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_linear_steps_equal_torchvisions_operations(images: torch.Tensor, factor: float) -> None:
    steps = {
        TF.adjust_brightness: (factor, 0.0, 0.0),
        TF.adjust_contrast: (factor, 0.0, 1 - factor),
        TF.adjust_saturation: (factor, 1 - factor, 0.0),
    }
    for operation, weights in steps.items():
        table = torch.tensor(weights)[:, None].expand(3, len(images))
        found = colour.linear_step(images.clone(), table, use_gray=True, use_mean=True)
        torch.testing.assert_close(found, operation(images, factor), rtol=0, atol=1e-6)


def test_a_step_may_be_a_different_operation_for_each_image(images: torch.Tensor) -> None:
    table = torch.tensor([[1.3, 0.8, 0.7, 1.0], [0.0, 0.0, 0.3, 0.0], [0.0, 0.2, 0.0, 0.0]])
    found = colour.linear_step(images[:4].clone(), table, use_gray=True, use_mean=True)
    expected = [
        TF.adjust_brightness(images[0], 1.3),
        TF.adjust_contrast(images[1], 0.8),
        TF.adjust_saturation(images[2], 0.7),
        images[3],
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    assert torch.equal(found[3], images[3])


def test_contrast_without_saturation_takes_the_same_mean(images: torch.Tensor) -> None:
    table = torch.tensor([0.7, 0.0, 0.3])[:, None].expand(3, len(images))
    short = colour.linear_step(images.clone(), table, use_gray=False, use_mean=True)
    torch.testing.assert_close(short, TF.adjust_contrast(images, 0.7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.03, 0.1, 0.5])
def test_hue_equals_torchvisions(images: torch.Tensor, turns: float) -> None:
    found = colour.shift_hue(images, torch.full((len(images),), turns))
    torch.testing.assert_close(found, TF.adjust_hue(images, turns), rtol=0, atol=1e-5)


def test_gray_and_solarize_equal_torchvisions(images: torch.Tensor) -> None:
    torch.testing.assert_close(colour.to_gray(images), TF.rgb_to_grayscale(images, 3), rtol=0, atol=1e-6)
    assert torch.equal(colour.solarize(images, 128 / 255), TF.solarize(images, 128 / 255))


def test_one_channel_stands_for_three_equal_ones(images: torch.Tensor) -> None:
    one = images[:, :1].clone()
    three = one.repeat(1, 3, 1, 1)
    table = torch.tensor([0.7, 0.1, 0.2])[:, None].expand(3, len(images))
    turns = torch.full((len(images),), 0.1)
    operations = {
        "step": lambda x: colour.linear_step(x.clone(), table, use_gray=True, use_mean=True),
        "hue": lambda x: colour.shift_hue(x, turns),
        "gray": colour.to_gray,
    }
    for name, operation in operations.items():
        torch.testing.assert_close(operation(one).expand(-1, 3, -1, -1), operation(three), msg=name)


@pytest.mark.parametrize("pattern", [[True] * 8, [False] * 8, [True, False] * 4])
def test_only_the_chosen_images_change(images: torch.Tensor, pattern: list[bool]) -> None:
    chosen, factors = np.array(pattern), np.arange(8.0)
    before = images.clone()
    found = colour.where_chosen(chosen, lambda x, f: x * f[:, None, None, None], images, factors)
    expected = before * torch.where(torch.tensor(pattern), torch.arange(8.0), 1.0)[:, None, None, None]
    torch.testing.assert_close(found, expected)
