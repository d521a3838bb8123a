"""The batched views equal torchvision's operations applied one by one with the same parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from pretrain.data import parameters
from pretrain.data.random_bits import image_streams
from pretrain.data.views import ViewsConfig
from pretrain.data.views_batched import BLUR_TAPS, BatchedViews
from pretrain.data.views_pil import PilViews

FULL = ViewsConfig(global_size=20, local=3, local_size=12, rotation=12, shear=6, erase=0.5)
COLOUR = ViewsConfig(global_size=20, local=3, local_size=12)
GRAY = ViewsConfig(
    global_size=16, local=2, local_size=8, flip=0, saturation=0, hue=0, gray=0, solarize=(0, 0, 0), blur=(0, 0, 0)
)
BATCH = 24


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (BATCH, 3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def one_by_one(config: ViewsConfig, seed: int, pixels: Tensor, sizes: np.ndarray, epoch: int) -> list[list[Tensor]]:
    """Reference: views[v][b] with torchvision's functional operations on float images."""
    draw = parameters.Draw(config, image_streams(seed, epoch, np.arange(len(pixels))))
    boxes = np.stack(parameters.crop_boxes(draw, sizes)).astype(int)
    steps, places = parameters.jitter_steps(draw), parameters.hue_places(draw, 3)
    return [
        [_reference(config, draw, pixels[b], sizes[b], v, b, boxes, steps, places) for b in range(len(pixels))]
        for v in range(len(config.views))
    ]


def _reference(config, draw, image, size, v, b, boxes, steps, places) -> Tensor:
    view = config.views[v]
    x = image[:, : size[0], : size[1]].float() / 255
    if config.rotation or config.shear:
        angle = draw.between("rotation", -config.rotation, config.rotation)[v, b]
        shear = draw.between("shear", -config.shear, config.shear)[v, b]
        x = TF.affine(x, float(angle), [0, 0], 1.0, [float(shear), 0.0], InterpolationMode.BILINEAR)
    output = [view.size, view.size]
    x = TF.resized_crop(x, *boxes[:, v, b].tolist(), output, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    if draw["flip"][v, b] < config.flip:
        x = TF.hflip(x)
    for number in range(4):
        if places[v, b] == number:
            x = TF.adjust_hue(x, float(draw.between("hue", -config.hue, config.hue)[v, b]))
        if number < 3:
            gain, by_gray, by_mean = steps[number, :, v, b].tolist()
            operation = TF.adjust_saturation if by_gray else TF.adjust_contrast if by_mean else TF.adjust_brightness
            x = operation(x, gain)
    if draw["gray"][v, b] < config.gray:
        x = TF.rgb_to_grayscale(x, 3)
    if draw["blur"][v, b] < view.blur:
        radius = float(draw.between("radius", *config.blur_radius)[v, b])
        x = TF.gaussian_blur(x, [BLUR_TAPS, BLUR_TAPS], [radius, radius])
    if draw["solarize"][v, b] < view.solarize:
        x = TF.solarize(x, 128 / 255)
    x = TF.normalize(x, list(config.mean), list(config.std))
    if config.erase:
        top, left, height, width = (int(t[v, b]) for t in parameters.erase_boxes(draw, view.size))
        x = TF.erase(x, top, left, height, width, torch.zeros(())) if height else x
    return x


@pytest.mark.parametrize("config", [COLOUR, FULL], ids=["colour", "affine+erase"])
def test_views_equal_torchvisions_float_operations(config: ViewsConfig, pixels: Tensor) -> None:
    sizes = np.tile([[30, 40]], (BATCH, 1))
    found = BatchedViews(config, seed=3)(pixels, None, torch.arange(BATCH), 2)
    for ours, theirs in zip(found, one_by_one(config, 3, pixels, sizes, 2), strict=True):
        difference = (ours - torch.stack(theirs)).abs()
        # Solarization and the hue's corners are discontinuous: a value on the edge may fall on the other side.
        assert (difference > 1e-3).float().mean() < 1e-3
        assert difference.median() < 1e-5


def test_where_all_views_are_gray_the_steps_after_it_go_on(pixels: Tensor) -> None:
    config = ViewsConfig(global_size=16, local=0, gray=1, blur=(0.5, 0.5, 0.5), solarize=(0.5, 0.5, 0.5))
    found = BatchedViews(config, seed=3)(pixels, None, torch.arange(BATCH), 2)
    for ours, theirs in zip(found, one_by_one(config, 3, pixels, np.tile([[30, 40]], (BATCH, 1)), 2), strict=True):
        assert (ours - torch.stack(theirs)).abs().median() < 1e-5


def test_padded_images_give_the_views_of_the_images_alone(pixels: Tensor) -> None:
    sizes = torch.stack([torch.arange(BATCH) % 11 + 20, torch.arange(BATCH) % 17 + 24], 1)
    for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    views = BatchedViews(FULL, 0)
    together = views(pixels, sizes, torch.arange(BATCH), 0)
    for b in range(0, BATCH, 5):
        height, width = sizes[b].tolist()
        alone = views(pixels[b : b + 1, :, :height, :width], None, torch.tensor([b]), 0)
        for a, c in zip(together, alone, strict=True):
            assert (a[b] - c[0]).abs().median() < 1e-5
            assert ((a[b] - c[0]).abs() > 1e-3).float().mean() < 1e-2


def test_views_of_an_image_do_not_depend_on_the_batch_around_it(pixels: Tensor) -> None:
    config = FULL.model_copy(update={"noise": 0.1})
    views = BatchedViews(config, 1)
    whole = views(pixels, None, torch.arange(BATCH), 4)
    order = torch.tensor([7, 3, 20])
    some = views(pixels[order], None, order, 4)
    for a, b in zip(whole, some, strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-5)


def test_seed_epoch_index_and_view_each_change_the_views(pixels: Tensor) -> None:
    index = torch.arange(BATCH)
    first = BatchedViews(COLOUR, 0)(pixels, None, index, 0)
    again = BatchedViews(COLOUR, 0)(pixels, None, index, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [
        BatchedViews(COLOUR, 1)(pixels, None, index, 0),
        BatchedViews(COLOUR, 0)(pixels, None, index, 1),
        BatchedViews(COLOUR, 0)(pixels, None, index + 1, 0),
    ]
    assert not any(torch.equal(first[0], other[0]) for other in others)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[2], first[3])


def test_making_views_does_not_touch_the_global_generators(pixels: Tensor) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    BatchedViews(FULL, 0)(pixels, None, torch.arange(BATCH), 0)
    assert torch.equal(torch.rand(1), expected)


def test_one_channel_gives_the_views_of_three_equal_ones(pixels: Tensor) -> None:
    gray, index = pixels[:, :1].contiguous(), torch.arange(BATCH)
    for config in (COLOUR, GRAY, FULL):
        one = BatchedViews(config, 0)(gray, None, index, 0)
        three = BatchedViews(config, 0)(gray.repeat(1, 3, 1, 1), None, index, 0)
        for a, b in zip(one, three, strict=True):
            assert a.shape == b.shape
            assert ((a - b).abs() > 1e-3).float().mean() < 1e-3


def test_noise_has_the_configured_spread_and_differs_between_views() -> None:
    config = GRAY.model_copy(update={"noise": 0.1, "jitter": 0, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    pixels = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    views = BatchedViews(config, 0)(pixels, None, torch.arange(64), 0)
    residuals = [view - 128 / 255 for view in views]
    for residual in residuals:
        assert abs(residual.std() - 0.1) < 2e-3 and abs(residual.mean()) < 2e-3
    for a, b in ((0, 1), (2, 3)):
        assert abs(torch.corrcoef(torch.stack([residuals[a].flatten(), residuals[b].flatten()]))[0, 1]) < 0.03
    corner = residuals[0][..., :8, :8].flatten(), residuals[2].flatten()
    assert abs(torch.corrcoef(torch.stack(corner))[0, 1]) < 0.03


def test_batched_and_pil_views_have_the_same_mean_and_spread() -> None:
    # One smooth image many times over; both backends draw from the same distributions.
    ramp = torch.linspace(0, 1, 48)
    image = torch.stack([ramp[:, None] * ramp, ramp[:, None].expand(48, 48), ramp.expand(48, 48).flip(1)])
    pixels = (image * 255).to(torch.uint8)
    config = ViewsConfig(global_size=32, local=1, local_size=16)
    count = 150
    batched = BatchedViews(config, 0)(pixels.expand(count, -1, -1, -1), None, torch.arange(count), 0)
    pil, picture = PilViews(config, 0), TF.to_pil_image(pixels)
    reference = [torch.stack(views) for views in zip(*(pil(picture, k, 0) for k in range(count)), strict=True)]
    for ours, theirs in zip(batched, reference, strict=True):
        for statistic in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)), lambda x: x.std((2, 3)).amax(1)):
            a, b = statistic(ours), statistic(theirs)
            error = math.sqrt((a.var() + b.var()) / count)
            assert abs(a.mean() - b.mean()) < 4 * error + 0.01


def test_the_largest_views_of_equal_sizes_form_one_group() -> None:
    config = ViewsConfig(global_size=12, local=2, local_size=12)
    views = BatchedViews(config, 0)(torch.zeros(2, 3, 20, 20, dtype=torch.uint8), None, torch.arange(2), 0)
    assert [tuple(view.shape) for view in views] == [(2, 3, 12, 12)] * 4


def test_views_inside_autocast_keep_full_precision(pixels: Tensor) -> None:
    plain = BatchedViews(COLOUR, 0)(pixels, None, torch.arange(BATCH), 0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = BatchedViews(COLOUR, 0)(pixels, None, torch.arange(BATCH), 0)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_an_image_of_one_pixel_is_a_valid_image() -> None:
    views = BatchedViews(COLOUR, 0)(torch.full((2, 3, 1, 1), 200, dtype=torch.uint8), None, torch.arange(2), 0)
    assert all(view.isfinite().all() for view in views)


@pytest.mark.gpu
def test_views_on_the_gpu_equal_those_on_the_cpu(pixels: Tensor) -> None:
    config = FULL.model_copy(update={"noise": 0.1})
    index = torch.arange(BATCH)
    cpu = BatchedViews(config, 0)(pixels, None, index, 1)
    gpu = BatchedViews(config, 0)(pixels.cuda(), None, index, 1)
    for a, b in zip(cpu, gpu, strict=True):
        assert ((a - b.cpu()).abs() > 1e-2).float().mean() < 1e-2
