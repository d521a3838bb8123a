from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from pretrain.data import resample

CPU = torch.device("cpu")


def crops(images: torch.Tensor, boxes: np.ndarray, size: int, flip: np.ndarray) -> torch.Tensor:
    """Boxes [4, B] -> [B, 3, s, s], one crop per image."""
    top, left, height, width = boxes
    rows = resample.resize_weights(top, height, images.shape[-2], size, CPU)
    columns = resample.resize_weights(left, width, images.shape[-1], size, CPU, flip)
    return resample.crop_resize(images.transpose(1, 2), rows[:, None], columns[:, None])[:, 0].transpose(1, 2)


@pytest.mark.parametrize("size", [5, 32, 96])
def test_crop_resize_and_flip_equal_torchvisions_antialiased_bicubic(size: int) -> None:
    random = np.random.default_rng(size)
    images = torch.from_numpy(random.random((24, 3, 60, 80), np.float32))
    height, width = random.integers(1, 61, 24), random.integers(1, 81, 24)
    boxes = np.stack([random.integers(0, 61 - height), random.integers(0, 81 - width), height, width])
    flip = random.random(24) < 0.5
    found = crops(images, boxes, size, flip)
    for image, box, flipped, ours in zip(images, boxes.T, flip, found, strict=True):
        theirs = TF.resized_crop(image, *box.tolist(), [size, size], InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(ours, TF.hflip(theirs) if flipped else theirs, rtol=0, atol=2e-5)


def test_several_crops_of_an_image_equal_the_crops_one_by_one() -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.random((3, 3, 20, 30), np.float32))
    start, length = random.integers(0, 10, (2, 12)), random.integers(5, 11, (2, 12))
    rows = resample.resize_weights(start[0], length[0], 20, 8, CPU)
    columns = resample.resize_weights(start[1], length[1], 30, 8, CPU)
    together = resample.crop_resize(images.transpose(1, 2), rows.view(3, 4, 8, 20), columns.view(3, 4, 8, 30))
    for b in range(3):
        for v in range(4):
            alone = torch.einsum("yh,chw,xw->ycx", rows[4 * b + v], images[b], columns[4 * b + v])
            torch.testing.assert_close(together[b, v], alone)


def test_weights_are_zero_outside_the_box_and_sum_to_one() -> None:
    weights = resample.resize_weights(np.array([3.0, 0.0]), np.array([9.0, 1.0]), 20, 4, CPU)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))
    assert not weights[0, :, :3].any() and not weights[0, :, 12:].any() and not weights[1, :, 1:].any()


def test_the_kernel_is_keys_cubic() -> None:
    x = np.linspace(-3, 3, 601)
    a, d = -0.5, np.abs(x)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    expected = np.where(d < 1, near, np.where(d < 2, far, 0))
    found = resample.bicubic(torch.from_numpy(x.copy()))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 33])
def test_blur_equals_torchvisions_gaussian(size: int) -> None:
    images, radius = torch.rand(6, 3, size, size), np.linspace(0.1, 2, 6)
    found = resample.gaussian_blur(
        images, resample.to_device(resample.blur_taps(radius, 9), CPU), resample.reflection(size, 9)
    )
    for image, r, ours in zip(images, radius.tolist(), found, strict=True):
        if size > 4:  # torchvision's padding cannot reflect further than the image
            theirs = TF.gaussian_blur(image, [9, 9], [r, r])
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert image.min() - 1e-5 <= ours.min() and ours.max() <= image.max() + 1e-5


@pytest.mark.parametrize(("angle", "shear"), [(12.0, 0.0), (-15.0, 8.0), (0.0, -10.0), (90.0, 0.0)])
def test_affine_equals_torchvisions(angle: float, shear: float) -> None:
    from pretrain.data import parameters
    from pretrain.data.views import ViewsConfig

    class Fixed(parameters.Draw):
        def __init__(self) -> None:
            self.config = ViewsConfig(rotation=abs(angle), shear=abs(shear), local=0)
            self.shape = (1, 3)

        def between(self, name: str, low: float, high: float) -> np.ndarray:
            value = {"rotation": angle, "shear": shear}[name]
            assert np.isclose(max(abs(low), abs(high)), np.radians(abs(value)))
            return np.full(self.shape, np.radians(value))

    images, sizes = torch.zeros(3, 3, 14, 20), np.array([[14, 20], [9, 20], [14, 11]])
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, :height, :width] = torch.rand(3, height, width)
    matrices = parameters.affine_matrices(Fixed(), sizes, (14, 20)).swapaxes(0, 1)
    found = resample.affine(images, resample.to_device(matrices, CPU))[:, :, 0]
    for image, ours, (height, width) in zip(images, found, sizes, strict=True):
        theirs = TF.affine(image[:, :height, :width], angle, [0, 0], 1.0, [shear, 0.0], InterpolationMode.BILINEAR)
        torch.testing.assert_close(ours[:, :height, :width], theirs, rtol=0, atol=1e-4)
