"""The drawn parameters have the distributions of torchvision's get_params (two-sample tests)."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms

from pretrain.data import parameters
from pretrain.data.random_bits import image_streams
from pretrain.data.views import ViewsConfig

DRAWS = 2500
LOWEST_P = 1e-3


def draw(config: ViewsConfig, count: int = DRAWS) -> parameters.Draw:
    return parameters.Draw(config, image_streams(0, 0, np.arange(count)))


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert stats.ks_2samp(ours, theirs).pvalue > LOWEST_P


@pytest.mark.parametrize("view", [0, 2])
@pytest.mark.parametrize("size", [(180, 240), (32, 32), (200, 40)])
def test_crop_boxes_are_distributed_as_torchvisions(size: tuple[int, int], view: int) -> None:
    config = ViewsConfig(local=1)
    found = parameters.crop_boxes(draw(config), np.tile([size], (DRAWS, 1)))
    torch.manual_seed(1)
    image, scale = torch.empty(1, *size), list(config.views[view].scale)
    expected = np.array(
        [transforms.RandomResizedCrop.get_params(image, scale, list(config.ratio)) for _ in range(DRAWS)]
    )
    for ours, theirs in zip(found, expected.T, strict=True):
        same_distribution(ours[view], theirs)
    same_distribution(found[2][view] * found[3][view], expected[:, 2] * expected[:, 3])


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (37, 400)])
def test_where_no_box_fits_the_crop_is_torchvisions_central_one(size: tuple[int, int]) -> None:
    config = ViewsConfig(local=0, global_scale=(1.0, 1.0))
    found = parameters.crop_boxes(draw(config, 5), np.tile([size], (5, 1)))
    expected = transforms.RandomResizedCrop.get_params(torch.empty(1, *size), [1.0, 1.0], list(config.ratio))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_boxes_lie_in_images_of_different_sizes() -> None:
    sizes = np.random.default_rng(0).integers(1, 60, (DRAWS, 2))
    top, left, height, width = parameters.crop_boxes(draw(ViewsConfig(local=2)), sizes)
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()


def test_jitter_factors_and_orders_are_distributed_as_torchvisions() -> None:
    config = ViewsConfig(local=0, jitter=1.0)
    ours = draw(config)
    steps, place = parameters.jitter_steps(ours)[..., 0, :], parameters.hue_places(ours, 3)[0]
    hue = ours.between("hue", -config.hue, config.hue)[0]
    torch.manual_seed(1)
    jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    theirs = [
        transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(DRAWS)
    ]
    same_distribution(hue, np.array([t[4] for t in theirs]))
    kinds = {"brightness": np.isclose(steps[:, 1], 0) & np.isclose(steps[:, 2], 0)}
    kinds["contrast"], kinds["saturation"] = steps[:, 2] != 0, steps[:, 1] != 0
    for number, name in enumerate(kinds):
        assert (kinds[name].sum(0) == 1).all()
        factors = steps[:, 0].T[kinds[name].T]
        same_distribution(factors, np.array([t[1 + number] for t in theirs]))
    # Orders: 24, each as likely.
    positions = np.stack([kind.argmax(0) for kind in kinds.values()], 1)
    orders = Counter(map(tuple, np.concatenate([positions, place[:, None]], 1).tolist()))
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > LOWEST_P


def test_jitter_without_some_operations_orders_the_others_evenly() -> None:
    steps = parameters.jitter_steps(draw(ViewsConfig(local=0, jitter=1.0, saturation=0, hue=0)))
    assert steps.shape == (2, 3, 2, DRAWS)
    contrast_first = (steps[0, 2] != 0).mean()
    assert abs(contrast_first - 0.5) < 4 * 0.5 / np.sqrt(2 * DRAWS)


def test_jitter_is_the_identity_where_it_is_not_applied() -> None:
    ours = draw(ViewsConfig(local=0, jitter=0.3))
    applied = ours["jitter"] < 0.3
    identity = np.array([1.0, 0, 0])[None, :, None]
    assert (parameters.jitter_steps(ours)[:, :, ~applied] == identity).all()
    assert (parameters.hue_places(ours, 3)[~applied] == -1).all()
    assert abs(applied.mean() - 0.3) < 0.03


def test_blur_radius_and_probabilities_are_those_of_the_official_code() -> None:
    config = ViewsConfig(local=1)
    ours = draw(config)
    random.seed(0)
    same_distribution(ours.between("radius", 0.1, 2.0)[0], np.array([random.uniform(0.1, 2) for _ in range(DRAWS)]))
    for name in ("blur", "solarize"):
        rates = (ours[name] < ours.per_view(name)).mean(1)
        np.testing.assert_allclose(rates, getattr(config, name), atol=0.03)
        assert rates[[p in (0.0, 1.0) for p in getattr(config, name)]].tolist() == [
            p for p in getattr(config, name) if p in (0.0, 1.0)
        ]


def test_erased_boxes_are_distributed_as_torchvisions() -> None:
    size = 16
    config = ViewsConfig(local=0, erase=1.0)
    found = np.stack(parameters.erase_boxes(draw(config), size))[:, 0]
    torch.manual_seed(1)
    image = torch.zeros(3, size, size)
    expected = np.array(
        [transforms.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(DRAWS)]
    )
    for ours, theirs in zip(found, expected.T, strict=True):
        same_distribution(ours, theirs)


def test_affine_parameters_are_distributed_as_torchvisions() -> None:
    config = ViewsConfig(local=0, rotation=15, shear=10)
    ours = draw(config)
    torch.manual_seed(1)
    theirs = [transforms.RandomAffine.get_params((-15, 15), None, None, (-10, 10), [16, 16]) for _ in range(DRAWS)]
    same_distribution(ours.between("rotation", -15, 15)[0], np.array([t[0] for t in theirs]))
    same_distribution(ours.between("shear", -10, 10)[0], np.array([t[3][0] for t in theirs]))
    assert all(t[3][1] == 0 for t in theirs)


def test_switching_one_operation_on_does_not_change_the_draws_of_another() -> None:
    plain = draw(ViewsConfig(local=1, jitter=0, gray=0, blur=(0, 0, 0), solarize=(0, 0, 0)), 10)
    full = draw(ViewsConfig(local=1, rotation=10, shear=5, erase=0.5, noise=0.1), 10)
    for name in ("area", "ratio", "top", "left", "flip"):
        np.testing.assert_array_equal(plain[name], full[name])


def test_views_draw_different_numbers() -> None:
    ours = draw(ViewsConfig(local=3), 200)
    for a, b in itertools.combinations(range(5), 2):
        assert abs(np.corrcoef(ours["top"][a], ours["top"][b])[0, 1]) < 0.3
