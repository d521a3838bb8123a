"""The evaluation transform: resize the short side, crop the centre, normalise.

A PIL image goes through PIL, as in the official evaluation scripts (equal to golden/eval_transform); uint8 tensors go
through torch's 8-bit resize on the CPU, which follows PIL's arithmetic up to its rounding (at most 2 levels of 255
apart, 0.1 on average). Files are therefore transformed one by one through PIL, sets in memory as batches through
`batch`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchvision.transforms import functional as TF

from pretrain.data.images import resized_size, to_tensor
from pretrain.data.views import IMAGENET_MEAN, IMAGENET_STD, Triple


class EvalTransform(BaseModel):
    """Default: Resize(256, bicubic), CenterCrop(224), ImageNet normalisation (facebookresearch/dino `eval_knn.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int | None = Field(256, ge=1)
    """Short side after resizing, pixels; None leaves the image as it is."""
    crop: int | None = Field(224, ge=1)
    """Side of the central crop, pixels; None keeps everything. Smaller images are padded with black."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """PIL RGB or uint8 [3, H, W] -> float32 [3, h, w]."""
        if isinstance(image, Tensor):
            return self.batch(image[None])[0]
        return self._normalise(self._cropped(to_tensor(self._resized(image))))

    def batch(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] on the CPU -> float32 [B, 3, h, w]."""
        return self._normalise(self._cropped(self._resized_batch(pixels)))

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.resize is None:
            return image
        height, width = resized_size(image.height, image.width, self.resize)
        return image.resize((width, height), Image.Resampling[self.interpolation.upper()])

    def _resized_batch(self, pixels: Tensor) -> Tensor:
        if self.resize is None:
            return pixels
        size = resized_size(pixels.shape[-2], pixels.shape[-1], self.resize)
        return F.interpolate(pixels, size, mode=self.interpolation, antialias=True)

    def _cropped(self, pixels: Tensor) -> Tensor:
        return pixels if self.crop is None else TF.center_crop(pixels, [self.crop, self.crop])

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def fingerprint(self) -> str:
        """Hash of everything that changes the result."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]
