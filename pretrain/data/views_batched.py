"""The views of a whole batch as tensor operations on its device.

Images are processed together by output size: all global views of the batch are one tensor, all local views another. No
loop over images, no transfer to the host. Randomness is a function of (seed, epoch, image, view): see random_bits.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data import colour, parameters, resample
from pretrain.data.random_bits import image_streams, normals
from pretrain.data.views import SOLARIZE_THRESHOLD, View, ViewsConfig

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
        sizes = dict.fromkeys(view.size for view in config.views)
        self._groups = [tuple(view for view in config.views if view.size == size) for size in sizes]
        self._constants: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, pixels: Tensor, sizes: Tensor | None, index: Tensor, epoch: int) -> list[Tensor]:
        """The views [g1, g2, l1, ...] of a batch.

        Args:
            pixels: uint8 [B, 3, H, W], zero where images smaller than H x W are padded (at the bottom and right).
            sizes: Height and width of each image, int64 [B, 2]; None where none is padded.
            index: Number of each image in its set, int64 [B]; decides its random numbers.
            epoch: Likewise.

        Returns:
            One float32 [B, 3, s, s] per view.
        """
        if sizes is None:
            sizes = torch.tensor(pixels.shape[-2:]).to(pixels.device, non_blocking=True).expand(len(pixels), 2)
        streams = image_streams(self.seed, epoch, index.to(pixels.device, non_blocking=True))
        images = pixels.permute(0, 2, 1, 3).float().mul_(1 / 255)  # [B, H, 3, W]
        views: dict[int, Tensor] = {}
        for group in self._groups:
            crops = self._group(group, images, sizes, streams)
            views.update(zip((view.number for view in group), crops, strict=True))
        return [views[number] for number in range(len(views))]

    def _group(self, group: tuple[View, ...], images: Tensor, sizes: Tensor, streams: Tensor) -> Tensor:
        """The views of one output size: images [B, H, 3, W] -> [V, B, 3, s, s]."""
        draw = parameters.Draw(self.config, group, streams)
        crops = self._crop(draw, images, sizes)
        shape = crops.shape
        x = crops.view(-1, *shape[2:])  # [N, 3, s, s], N = V B
        x = self._filter(draw, self._recolour(draw, x))
        return self._finish(draw, x, streams).view(shape)

    def _crop(self, draw: parameters.Draw, images: Tensor, sizes: Tensor) -> Tensor:
        """Affine map, crop, resize and flip: images [B, H, 3, W] -> [V, B, 3, s, s]."""
        config, size = self.config, draw.views[0].size
        batch, height, _, width = images.shape
        top, left, box_height, box_width = parameters.crop_boxes(draw, sizes)
        flip = (draw["flip"] < config.flip).flatten() if config.flip else None
        rows = resample.resize_weights(top.flatten(), box_height.flatten(), height, size)
        columns = resample.resize_weights(left.flatten(), box_width.flatten(), width, size, flip)
        rows, columns = rows.view(-1, batch, size, height), columns.view(-1, batch, size, width)
        if not (config.rotation or config.shear):
            return resample.crop_resize(images, rows, columns)
        # Each view has its own rotated image: views become images of one crop each.
        angle, shear = parameters.affine_parameters(draw)
        num_views = len(draw.views)
        planes = images.transpose(1, 2).expand(num_views, -1, -1, -1, -1).reshape(-1, 3, height, width)
        turned = resample.affine(planes, sizes.repeat(num_views, 1), angle.flatten(), shear.flatten())
        crops = resample.crop_resize(turned.transpose(1, 2), rows.flatten(0, 1)[None], columns.flatten(0, 1)[None])
        return crops.view(num_views, batch, 3, size, size)

    def _recolour(self, draw: parameters.Draw, x: Tensor) -> Tensor:
        """Colour jitter and gray on [N, 3, s, s]."""
        config = self.config
        if config.jitters:
            steps, hue, place = parameters.jitter_parameters(draw)
            use_gray, use_mean = config.saturation > 0, config.contrast > 0
            for number in range(len(steps) + 1):
                if hue is not None and place is not None:
                    x = colour.where_chosen((place == number).flatten(), colour.shift_hue, x, hue.flatten())
                if number < len(steps):
                    x = colour.linear_step(x, steps[number].flatten(1), use_gray=use_gray, use_mean=use_mean)
        if config.gray:
            x = colour.where_chosen((draw["gray"] < config.gray).flatten(), colour.to_gray, x)
        return x

    def _filter(self, draw: parameters.Draw, x: Tensor) -> Tensor:
        """Blur and solarization on [N, 3, s, s]."""
        blur, solarize = [view.blur for view in draw.views], [view.solarize for view in draw.views]
        if any(blur):
            radius = draw.between("radius", *self.config.blur_radius).flatten()
            shifts = self._constant(x)[0]
            chosen = parameters.chosen(draw, "blur", blur).flatten()
            x = colour.where_chosen(chosen, lambda images, r: resample.gaussian_blur(images, r, shifts), x, radius)
        if any(solarize):
            chosen = parameters.chosen(draw, "solarize", solarize).flatten()
            x = colour.where_chosen(chosen, lambda images: colour.solarize(images, SOLARIZE_THRESHOLD / 255), x)
        return x

    def _finish(self, draw: parameters.Draw, x: Tensor, streams: Tensor) -> Tensor:
        """Noise, normalisation and erasing on [N, 3, s, s]."""
        config, size = self.config, x.shape[-1]
        if config.noise:
            # Counters of different views lie a whole view of values apart.
            values = 3 * size * size
            noise = [
                normals(streams, parameters.NOISE_COUNTER + view.number * values, values) for view in draw.views
            ]
            x = x.add_(torch.cat(noise).view_as(x), alpha=config.noise)
        _, gain, offset = self._constant(x)
        x = torch.addcmul(offset, x, gain)
        if config.erase:
            top, left, height, width = (t.reshape(-1, 1) for t in parameters.erase_boxes(draw, size))
            position = torch.arange(size, device=x.device)
            in_rows = (position >= top) & (position < top + height)  # [N, s]
            in_columns = (position >= left) & (position < left + width)
            x = x.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
        return x

    def _constant(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Blur shifts of the size and the normalisation as gain and offset, made once per device and size."""
        key = (x.device, x.shape[-1])
        if key not in self._constants:
            std = torch.tensor(self.config.std).view(3, 1, 1)
            offset = -torch.tensor(self.config.mean).view(3, 1, 1) / std
            shifts = resample.reflection(x.shape[-1], BLUR_TAPS)
            self._constants[key] = (shifts.to(x.device), (1 / std).to(x.device), offset.to(x.device))
        return self._constants[key]
