"""The views of a whole batch as tensor operations on its device.

Images are processed together by output size: all global views of the batch are one tensor, all local views another.
There is no loop over images and nothing is fetched from the device. Randomness is a function of (seed, epoch, image,
view): the parameters are drawn on the host (parameters.py), noise on the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.data import colour, parameters, resample
from pretrain.data.device import copy_to
from pretrain.data.random_bits import device_normals, image_streams
from pretrain.data.resample import to_device
from pretrain.data.views import SOLARIZE_THRESHOLD, ViewsConfig

BLUR_TAPS = 9
"""Width of the Gaussian (DINOv2's kernel_size): it ends two standard deviations out at the largest radius, 2."""


class BatchedViews:
    """All views of a batch: uint8 pixels in, normalised float32 views out.

    >>> views = BatchedViews(ViewsConfig(global_size=8, local=0), seed=0)
    >>> [tuple(view.shape) for view in views(torch.zeros(4, 3, 10, 12, dtype=torch.uint8), None, torch.arange(4), 0)]
    [(4, 3, 8, 8), (4, 3, 8, 8)]
    """

    def __init__(self, config: ViewsConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        sizes = [view.size for view in config.views]
        # Views of one size are neighbours: the two global ones, then the local ones.
        self._groups = [(s, slice(sizes.index(s), sizes.index(s) + sizes.count(s))) for s in dict.fromkeys(sizes)]
        self._constants: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, pixels: Tensor, sizes: Tensor | None, index: Tensor, epoch: int) -> list[Tensor]:
        """The views [g1, g2, l1, ...] of a batch.

        Args:
            pixels: uint8 [B, C, H, W], zero where images smaller than H x W are padded (at the bottom and right). C = 1
                stands for three equal channels: everything is then computed once and repeated at the end.
            sizes: Height and width of each image, int64 [B, 2] on the CPU; None where none is padded.
            index: Number of each image in its set, int64 [B] on the CPU; decides its random numbers.
            epoch: Likewise.

        Returns:
            One float32 [B, 3, s, s] per view, on the device of `pixels`.
        """
        batch, _, height, width = pixels.shape
        host_sizes = np.tile([[height, width]], (batch, 1)) if sizes is None else sizes.numpy(force=True)
        streams = image_streams(self.seed, epoch, index.numpy(force=True))
        draw = parameters.Draw(self.config, streams)
        # Half precision would cost two levels of 255.
        with torch.autocast(pixels.device.type, enabled=False):
            return self._views(pixels, draw, host_sizes, streams)

    def _views(self, pixels: Tensor, draw: parameters.Draw, sizes: np.ndarray, streams: np.ndarray) -> list[Tensor]:
        """The views, group by group."""
        images = self._images(pixels, draw, sizes)
        boxes = np.stack(parameters.crop_boxes(draw, sizes))
        steps = parameters.jitter_steps(draw) if self.config.jitters else None
        noise = self._noise(streams, pixels.shape[1], pixels.device) if self.config.noise else None
        views: list[Tensor] = []
        for size, group in self._groups:
            x = self._crop(draw, images, boxes, size, group)  # [N, C, s, s], N = V B
            x = x if steps is None else self._jitter(draw, x, steps, group)
            x = self._filter(draw, x, group)
            x = self._finish(draw, x, group, None if noise is None else noise[size])
            views.extend(x.view(-1, len(pixels), 3, size, size))
        return views

    def _images(self, pixels: Tensor, draw: parameters.Draw, sizes: np.ndarray) -> Tensor:
        """The images that the views are cut from, with their rows outermost.

        Returns:
            float32 [B, 1, H, C, W], the same image for all views; or [B, V, H, C, W] if each view has its own rotation.
        """
        if not (self.config.rotation or self.config.shear):
            return pixels.permute(0, 2, 1, 3).float()[:, None]
        matrices = parameters.affine_matrices(draw, sizes, (pixels.shape[-2], pixels.shape[-1])).swapaxes(0, 1)
        return resample.affine(pixels.float(), to_device(matrices, pixels.device)).permute(0, 2, 3, 1, 4)

    def _crop(self, draw: parameters.Draw, images: Tensor, boxes: np.ndarray, size: int, group: slice) -> Tensor:
        """Crop, resize and flip to [0, 1]: images [B, V or 1, H, C, W], boxes [4, V, B] -> [N, C, s, s]."""
        batch, own_images, height, channels, width = images.shape
        top, left, box_height, box_width = boxes[:, group].swapaxes(1, 2).reshape(4, -1)  # image by image
        flip = np.zeros((2, len(top)), bool)
        if self.config.flip:
            flip[1] = (draw["flip"] < self.config.flip)[group].T.ravel()
        # Rows and columns at once; the weights of pixels outside the image are 0 and cut off.
        weights = resample.resize_weights(
            np.concatenate([top, left]),
            np.concatenate([box_height, box_width]),
            max(height, width),
            size,
            images.device,
            flip.ravel(),
        )
        rows, columns = weights.view(2, batch, -1, size, max(height, width))
        rows, columns = rows[..., :height] * (1 / 255), columns[..., :width]
        if own_images == 1:
            crops = resample.crop_resize(images[:, 0], rows, columns)
        else:
            own = images[:, group].flatten(0, 1)
            crops = resample.crop_resize(own, rows.flatten(0, 1)[:, None], columns.flatten(0, 1)[:, None])
        crops = crops.view(batch, -1, size, channels, size).permute(1, 0, 3, 2, 4)
        # Clipped as 8-bit pixels are: the cubic filter overshoots.
        return crops.clamp(0, 1).reshape(-1, channels, size, size)

    def _jitter(self, draw: parameters.Draw, x: Tensor, steps: np.ndarray, group: slice) -> Tensor:
        """Colour jitter on [N, C, s, s] with steps [S, 3, V, B]."""
        config, num_steps = self.config, len(steps)
        weights = to_device(steps[:, :, group].reshape(num_steps, 3, -1), x.device)
        place = hue = None
        if config.hue:
            place = parameters.hue_places(draw, num_steps)[group].ravel()
            hue = draw.between("hue", -config.hue, config.hue)[group].ravel()
        for number in range(num_steps + 1):
            if place is not None:
                x = colour.where_chosen(place == number, colour.shift_hue, x, hue)
            if number < num_steps:
                use_gray, use_mean = config.saturation > 0, config.contrast > 0
                x = colour.linear_step(x, weights[number], use_gray=use_gray, use_mean=use_mean)
        return x

    def _filter(self, draw: parameters.Draw, x: Tensor, group: slice) -> Tensor:
        """Gray, blur and solarization on [N, C, s, s]."""
        if self.config.gray:
            x = colour.where_chosen((draw["gray"] < self.config.gray)[group].ravel(), colour.to_gray, x)
        views = draw.views[group]
        if any(view.blur for view in views):
            chosen = (draw["blur"] < draw.per_view("blur"))[group].ravel()
            taps = resample.blur_taps(draw.between("radius", *self.config.blur_radius)[group].ravel(), BLUR_TAPS)
            shifts = self._constant(x)[0]
            x = colour.where_chosen(chosen, lambda images, t: resample.gaussian_blur(images, t, shifts), x, taps)
        if any(view.solarize for view in views):
            chosen = (draw["solarize"] < draw.per_view("solarize"))[group].ravel()
            x = colour.where_chosen(chosen, lambda images: colour.solarize(images, SOLARIZE_THRESHOLD / 255), x)
        return x

    def _finish(self, draw: parameters.Draw, x: Tensor, group: slice, noise: Tensor | None) -> Tensor:
        """Noise (per image [V, B, C s s]), normalisation and erasing: [N, C, s, s] -> [N, 3, s, s]."""
        size = x.shape[-1]
        _, gain, offset = self._constant(x)
        if noise is not None:
            x = x.add_(noise.reshape(x.shape), alpha=self.config.noise)
        x = torch.addcmul(offset, x, gain)
        if self.config.erase:
            boxes = np.stack(parameters.erase_boxes(draw, size))[:, group].reshape(4, -1, 1)
            top, left, height, width = to_device(boxes, x.device)
            position = torch.arange(size, device=x.device)
            in_rows = (position >= top) & (position < top + height)  # [N, s]
            in_columns = (position >= left) & (position < left + width)
            x = x.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
        return x

    def _noise(self, streams: np.ndarray, channels: int, device: torch.device) -> dict[int, Tensor]:
        """N(0, 1) for every value of the views of each size s, [V, B, values]."""
        first = parameters.NOISE_COUNTERS_PER_VIEW
        words = {size: -(-channels * size * size // 4) for size, _ in self._groups}
        counters = [first * (v.number + 1) + torch.arange(words[v.size]) for v in self.config.views]
        normals = device_normals(
            copy_to(torch.from_numpy(streams.view(np.int64)), device),
            copy_to(torch.cat(counters), device),
        )
        parts = normals.split([4 * words[size] * (group.stop - group.start) for size, group in self._groups], 1)
        return {
            size: part.view(len(streams), -1, 4 * words[size])[..., : channels * size * size].transpose(0, 1)
            for (size, _), part in zip(self._groups, parts, strict=True)
        }

    def _constant(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Blur shifts of the size and the normalisation as gain and offset, made once per device and size."""
        key = (x.device, x.shape[-1])
        if key not in self._constants:
            std = torch.tensor(self.config.std).view(3, 1, 1)
            offset = -torch.tensor(self.config.mean).view(3, 1, 1) / std
            shifts = resample.reflection(x.shape[-1], BLUR_TAPS)
            self._constants[key] = (shifts.to(x.device), (1 / std).to(x.device), offset.to(x.device))
        return self._constants[key]
