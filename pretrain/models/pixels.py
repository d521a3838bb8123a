"""The pixels themselves as a checkpoint: what every representation has to beat, by the same protocol.

`pixels` stands for a network without parameters that gives its input back as one vector of fixed length. Like any
network it sees images after the suite's transform, in normalised colours. Larger images are brought to 32 x 32 by the
mean over equal areas (Torralba, Fergus and Freeman, 80 Million Tiny Images, PAMI 2008, describe images by as much);
smaller ones keep their pixels and are filled up with zeros, which changes neither distances nor angles. `pixels:64` is
the same for 64 x 64.

The baseline raw_pixels of suites.baselines is the other choice: stored images in [0, 1], before any transform.

Shapes: B images of H x W pixels, S the side, features [B, 3 * S * S].
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import UsageError
from pretrain.models.checkpoint import LoadedModel

SIDE = 32
MAX_SIDE = 224
FORMAT = 1
"""Raised when the same images would give other features."""
_NAME = re.compile(r"pixels(?::(.*))?")


class Pixels(nn.Module):
    """Images [B, 3, H, W] -> their values [B, 3 * S * S]."""

    def __init__(self, side: int = SIDE):
        super().__init__()
        self.side = side
        self.num_features = 3 * side * side

    def forward(self, x: Tensor) -> Tensor:
        height, width = (min(size, self.side) for size in x.shape[-2:])
        if x.shape[-2:] != (height, width):
            x = F.adaptive_avg_pool2d(x, (height, width))
        return F.pad(x, (0, self.side - width, 0, self.side - height)).flatten(1)


def is_pixels(checkpoint: str | Path) -> bool:
    """Whether this names pixels instead of a file; a file of such a name needs its absolute path."""
    return _NAME.fullmatch(str(checkpoint)) is not None


def pixels_sha256(name: str | Path) -> str:
    """What stands for the hash of a file and for that of its weights.

    Raises:
        UsageError: see `load_pixels`.
    """
    return hashlib.sha256(f"dinobench pixels {FORMAT} side {_side(str(name))}".encode()).hexdigest()


def load_pixels(name: str | Path) -> LoadedModel:
    """`pixels` or `pixels:<side>`, ready to be measured.

    Raises:
        UsageError: the side is no number from 1 to 224.
    """
    side, digest = _side(str(name)), pixels_sha256(name)
    absent = ("step", "images_seen", "epoch", "seed", "recipe_hash", "model", "network")
    provenance = {
        "path": str(name),
        "sha256": digest,
        "format": "pixels",
        "method": "pixels",
        "arch": f"pixels{side}",
        "label": f"pixels{side}",
        **dict.fromkeys(absent),
        "weights_sha256": digest,
        "matched": 0,
        "missing": [],
        "unexpected": [],
        "coverage": 100.0,
        "dropped": [],
        "notes": [f"no network: the features are the images themselves, larger ones reduced to {side} x {side}"],
    }
    return LoadedModel(Pixels(side).eval(), None, None, "none", None, provenance)


def _side(name: str) -> int:
    match = _NAME.fullmatch(name)
    given = match[1] if match else None
    if given is None:
        return SIDE
    if not given.isdecimal() or not 1 <= int(given) <= MAX_SIDE:
        raise UsageError(f"{name}: expected pixels:<side> with a side from 1 to {MAX_SIDE}, found {given!r}")
    return int(given)
