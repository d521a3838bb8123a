"""Multi-crop views (DINO, arXiv:2104.14294, section 3.1): what is drawn, shared by both implementations.

From each image: two global views, then `local` local ones. Order of operations, both backends: [rotation + shear] ->
random resized crop (bicubic, antialiased) -> flip -> colour jitter in random order -> gray -> blur -> solarize ->
[noise] -> normalise -> [erase]. Operations whose probability or strength is 0 do not exist: they cost nothing and
draw nothing (but for the blur of `blur_kind: gaussian`).

`pil` (views_pil.py) is the reference: torchvision on PIL images, one image at a time, equal to the official DINO
augmentation, and with `blur_kind: gaussian` to DINOv2's. `batched` (views_batched.py) does the same on a whole batch of
tensors on any device. They differ in three stated ways: `batched` does not round to 8 bits between operations, its blur
is always DINOv2's 9-tap Gaussian, and the random numbers come from different generators (same distributions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Range = tuple[float, float]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

SOLARIZE_THRESHOLD = 128
"""PIL's default: values from here on (of 255) are inverted."""


@dataclass(frozen=True)
class View:
    """One view of an image: its number among the views, and what depends on its kind."""

    number: int
    size: int
    """Side of the square output, pixels."""
    scale: Range
    """Share of the image area that the crop covers."""
    blur: float
    solarize: float


class ViewsConfig(BaseModel):
    """Which views are made of an image. Defaults: facebookresearch/dino 7c446df `main_dino.py` (ViT-S/16)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["batched", "pil"] = "batched"
    """`batched`: tensors on the training device. `pil`: the CPU reference, one image at a time."""
    global_size: int = Field(default=224, ge=1)
    """Side of the two global views, pixels."""
    global_scale: Range = (0.4, 1.0)
    """Share of the image area in a global view, drawn uniformly."""
    local: int = Field(default=8, ge=0)
    """Number of local views."""
    local_size: int = Field(default=96, ge=1)
    """Side of the local views, pixels."""
    local_scale: Range = (0.05, 0.4)
    """Share of the image area in a local view, drawn uniformly."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width / height of the crop box, drawn log-uniformly."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    jitter: float = Field(default=0.8, ge=0, le=1)
    """Probability of colour jitter."""
    brightness: float = Field(default=0.4, ge=0)
    contrast: float = Field(default=0.4, ge=0)
    saturation: float = Field(default=0.2, ge=0)
    hue: float = Field(default=0.1, ge=0, le=0.5)
    gray: float = Field(default=0.2, ge=0, le=1)
    """Probability of dropping the colour."""
    blur: Triple = (1.0, 0.1, 0.5)
    """Probability of blur in global view 1, global view 2, local views: with which an image is in fact blurred."""
    blur_kind: Literal["box", "gaussian"] = "box"
    """`pil` only. `box`: three box filters (PIL, as DINO and iBOT). `gaussian`: 9 taps (torchvision, as DINOv2).

    DINOv2's released code reads a probability p as 1 - p: it declares (1.0, 0.1, 0.5) and blurs (0.0, 0.9, 0.5). `blur`
    holds what happens.
    """
    blur_radius: Range = (0.1, 2.0)
    """Standard deviation of the blur in output pixels, drawn uniformly."""
    solarize: Triple = (0.0, 0.2, 0.0)
    """Probability of solarization in global view 1, global view 2, local views."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """The image is rotated by up to this many degrees either way before the crop (black outside)."""
    shear: float = Field(default=0.0, ge=0, lt=90)
    """The image is sheared along x by up to this many degrees either way before the crop."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a random box (torchvision's RandomErasing: 2 to 33 % of the area) is set to the mean colour."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise added to each pixel, where pixels lie in [0, 1]."""
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    @model_validator(mode="after")
    def _check(self) -> ViewsConfig:
        for name in ("global_scale", "local_scale", "ratio", "blur_radius"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"views.{name}: expected two numbers 0 < low <= high, found ({low}, {high})")
        for name in ("global_scale", "local_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(
                    f"views.{name}: a crop covers at most the whole image (1.0), found {getattr(self, name)}"
                )
        for name in ("blur", "solarize"):
            if not all(0 <= p <= 1 for p in getattr(self, name)):
                raise ValueError(f"views.{name}: expected three probabilities in [0, 1], found {getattr(self, name)}")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"views.std: expected three positive numbers, found {self.std}")
        return self

    @property
    def views(self) -> tuple[View, ...]:
        """All views of an image, in the order in which they are returned: g1, g2, l1, ..., ln."""
        kinds = [0, 1] + [2] * self.local
        return tuple(
            View(
                number=number,
                size=self.local_size if kind == 2 else self.global_size,
                scale=self.local_scale if kind == 2 else self.global_scale,
                blur=self.blur[kind],
                solarize=self.solarize[kind],
            )
            for number, kind in enumerate(kinds)
        )

    @property
    def jitters(self) -> bool:
        """Whether there is any colour jitter to do."""
        return self.jitter > 0 and (self.brightness > 0 or self.contrast > 0 or self.saturation > 0 or self.hue > 0)
