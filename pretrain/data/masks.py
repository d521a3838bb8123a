"""Which patches of the global views the student does not see (iBOT, DINOv2) or leaves out (MSN).

Sampling rules, by `kind`:
    block   bytedance/ibot da316d8 `loader.py`: every crop draws its own ratio r, then boxes (BEiT, arXiv:2106.08254)
            until r N patches are masked or no box fits; never more than r N, often a few less.
    random  the same ratio, floor(r N) patches anywhere.
    dinov2  facebookresearch/dinov2 b8931f7 `collate.py`, `masking.py`: a share of the batch's crops is masked, their
            ratios spread evenly over a range, boxes of at least 4 and at most half of all patches.
    fixed   facebookresearch/msn: the same number of patches in every crop. Each crop draws its own set, where MSN
            takes one set for a whole batch.

A crop's patches are a function of (seed, epoch, image, view), so that worker count, resuming and the number of ranks
change nothing. DINOv2's ratios belong to the batch: they are a function of (seed, step), drawn for the batch of all
ranks on every rank, which keeps its rows. The official code draws them for each GPU by itself, as one rank does here.

Shape legend: G = 2 global views, B images of this rank, N patches of a view (row by row), M masked patches in all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pretrain.data.random_bits import mix_words

Array = np.ndarray
Rng = Any
"""A `random.Random`, or the module `random` itself."""

NUM_VIEWS = 2
"""Global views of an image."""
_TRIES = 10
"""Boxes tried before a mask is left as it is."""
_DINOV2_SMALLEST = 4
"""Least area that is drawn for a box of DINOv2's masks, patches."""

# Last words of the seeds: they keep masks and views (random_bits.py) independent.
_CROP, _BATCH = 0x63726F70, 0x6D61736B


class MaskConfig(BaseModel):
    """How patches of the global views are masked. Defaults: iBOT's ViT-S/16 recipe, once `kind` is `block`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "block", "random", "dinov2", "fixed"] = "none"
    views: tuple[int, ...] = (0, 1)
    """Which of the two global views get masks. MSN masks only the second, (1,)."""
    ratio: tuple[float, ...] = (0.0, 0.3)
    """block, random: the middle of each candidate's range, of which every crop picks one. dinov2: lowest and highest
    share of masked patches, (0.1, 0.5) there. fixed: the one share."""
    variance: tuple[float, ...] = (0.0, 0.2)
    """block, random: half the width of each candidate's range (iBOT's pred_ratio_var)."""
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """block, dinov2: height / width of a box, drawn log-uniformly."""
    probability: float = Field(default=0.5, ge=0, le=1)
    """dinov2: share of the batch's crops that are masked."""
    start_epoch: int = Field(default=0, ge=0)
    """Nothing is masked before this epoch (iBOT's pred_start_epoch)."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if not self.views or list(self.views) != sorted({*self.views} & {0, 1}):
            raise ValueError(f"masks.views: expected some of the global views 0 and 1 in order, found {self.views}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"masks.aspect: expected two numbers 0 < low <= high, found {self.aspect}")
        if self.kind in ("block", "random"):
            self._check_candidates()
        elif self.kind == "dinov2" and not (len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1] <= 1):
            raise ValueError(
                "masks.ratio: masks.kind=dinov2 expects the lowest and the highest share of masked patches, "
                f"0 < low <= high <= 1, as in (0.1, 0.5), found {self.ratio}"
            )
        elif self.kind == "fixed" and not (len(self.ratio) == 1 and 0 < self.ratio[0] < 1):
            raise ValueError(
                f"masks.ratio: masks.kind=fixed expects one share between 0 and 1, as in (0.15,), found {self.ratio}"
            )
        return self

    def _check_candidates(self) -> None:
        if not self.ratio or len(self.ratio) != len(self.variance):
            raise ValueError(
                f"masks.ratio and masks.variance describe the same candidates and need the same number of values, "
                f"at least one: found {self.ratio} and {self.variance}"
            )
        for middle, width in zip(self.ratio, self.variance, strict=True):
            if width < 0 or not 0 <= middle - width <= middle + width <= 1:
                raise ValueError(
                    "masks.ratio: a candidate's range, ratio +- variance, must lie in [0, 1], "
                    f"found {middle} +- {width}"
                )


@dataclass
class Masks:
    """The masked patches of a batch, on the training device."""

    mask: Tensor
    """True where a patch is masked, bool [G, B, N]."""
    index: Tensor
    """Places of the masked patches among all G B N, ascending, int64 [M]."""
    weight: Tensor
    """1 / number of masked patches of the same crop, float32 [M]."""
    counts: Tensor
    """Number of masked patches of each crop, int64 [G, B]. Stays on the host, which never asks the device for it."""

    @classmethod
    def of(cls, mask: Tensor) -> Masks:
        """Masks from a bool tensor [G, B, N] on the CPU."""
        counts = mask.sum(-1)
        index = mask.flatten().nonzero().flatten()
        weight = counts.clamp(min=1).reciprocal().flatten().repeat_interleave(counts.flatten())
        return cls(mask, index, weight, counts)

    def kept(self) -> Tensor:
        """Places of the patches that are not masked, row by row of the crops: int64 [G B, n].

        For `fixed` masks, which leave the same n in every crop.
        """
        num_kept = self.mask.shape[-1] - int(self.counts.flatten()[0])
        return self.mask.flatten(0, 1).byte().argsort(dim=1, stable=True)[:, :num_kept]

    def of_view(self, view: int) -> Masks:
        """The masks of one view: G = 1."""
        lengths = self.counts.sum(-1).tolist()
        crops = self.mask.shape[1] * self.mask.shape[2]
        index = self.index.split(lengths)[view] - view * crops
        chosen = slice(view, view + 1)
        return Masks(self.mask[chosen], index, self.weight.split(lengths)[view], self.counts[chosen])

    def split(self, parts: int) -> list[Masks]:
        """The masks of micro-batches of equal size: the images in order, all views of each."""
        num_views, batch, num_patches = self.mask.shape
        assert batch % parts == 0, f"{batch} images cannot be divided into {parts} equal parts"
        size = batch // parts
        lengths = self.counts.view(num_views * parts, size).sum(-1).tolist()
        indices, weights = self.index.split(lengths), self.weight.split(lengths)  # views outside, parts inside
        pieces = []
        for part in range(parts):
            rows, own = slice(part * size, (part + 1) * size), slice(part, None, parts)
            # A crop moves from row (view, image) of `batch` columns to that of `size` columns.
            moved = [i - (v * (batch - size) + rows.start) * num_patches for v, i in enumerate(indices[own])]
            piece = self.mask[:, rows], torch.cat(moved), torch.cat(weights[own]), self.counts[:, rows]
            pieces.append(Masks(*piece))
        return pieces


class MaskSampler:
    """Draws the masks of a rank's images.

    Args:
        config: How; its kind is not `none`.
        grid: Rows and columns of patches of a global view.
        seed: Decides the masks.
    """

    def __init__(self, config: MaskConfig, grid: tuple[int, int], seed: int) -> None:
        assert config.kind != "none", "there is nothing to sample"
        self.config, self.grid, self.seed = config, grid, seed
        # Shuffles ten times as fast as `random`, seeded for each crop; numpy has frozen what it draws.
        self._shuffler = np.random.RandomState()

    def __call__(self, index: Tensor, epoch: int, *, step: int, first: int, batch_size: int) -> Masks:
        """The masks of a batch, on the host.

        Args:
            index: Number of each of this rank's images in the set, int64 [B].
            epoch: Counted from 0.
            step: Counted from the start of training. Like the next two it matters to `dinov2` alone.
            first: Row of the first of these images in the batch of all ranks.
            batch_size: Images in the batch of all ranks.
        """
        config = self.config
        mask = np.zeros((NUM_VIEWS, len(index), self.grid[0] * self.grid[1]), dtype=bool)
        if epoch >= config.start_epoch:
            targets = self._batch_targets(step, batch_size)[:, first:] if config.kind == "dinov2" else None
            for row, view in enumerate(config.views):
                for column, image in enumerate(index.tolist()):
                    rng = Random(mix_words(self.seed, epoch, image, view, _CROP))
                    target = None if targets is None else int(targets[row, column])
                    mask[view, column] = self._crop_mask(rng, target)
        return Masks.of(torch.from_numpy(mask))

    def _crop_mask(self, rng: Rng, target: int | None) -> Array:
        """One crop's mask, bool [N]; `target` patches where the batch decides how many."""
        config, grid = self.config, self.grid
        num_patches = grid[0] * grid[1]
        if target is not None:
            return dinov2_mask(grid, target, rng, config.aspect)
        share = config.ratio[0] if config.kind == "fixed" else pick_ratio(config.ratio, config.variance, rng)
        if config.kind == "block":
            return ibot_mask(grid, share * num_patches, rng, config.aspect)
        # MSN rounds the number it keeps, of which there is at least one here.
        kept = max(1, int(num_patches * (1 - share)))
        count = num_patches - kept if config.kind == "fixed" else int(share * num_patches)
        self._shuffler.seed(rng.getrandbits(32))
        return random_mask(num_patches, count, self._shuffler)

    def _batch_targets(self, step: int, batch_size: int) -> Array:
        """How many patches to mask in each crop of the batch of all ranks: [masked views, batch_size]."""
        config = self.config
        rng = Random(mix_words(self.seed, step, _BATCH))
        num_crops, num_patches = len(config.views) * batch_size, self.grid[0] * self.grid[1]
        targets = list(spread_targets(num_crops, num_patches, config.probability, config.ratio, rng))
        rng.shuffle(targets)
        return np.array(targets).reshape(len(config.views), batch_size)


def pick_ratio(ratio: tuple[float, ...], variance: tuple[float, ...], rng: Rng) -> float:
    """iBOT's share of masked patches: one of the candidates, each uniform on ratio +- variance."""
    drawn = [rng.uniform(m - v, m + v) if v > 0 else m for m, v in zip(ratio, variance, strict=True)]
    return drawn[0] if len(drawn) == 1 else rng.choice(drawn)


def spread_targets(
    num_crops: int, num_patches: int, probability: float, ratio: tuple[float, ...], rng: Rng
) -> Iterator[int]:
    """DINOv2's numbers of masked patches of a batch's crops: one from each of equal bins of the ratio, then zeros.

    The caller shuffles. Numbers are drawn one at a time because the official code makes each mask in between.
    """
    num_masked = int(num_crops * probability)
    edges = torch.linspace(ratio[0], ratio[1], num_masked + 1).numpy()  # single precision, as there
    for low, high in itertools.pairwise(edges):
        yield int(num_patches * rng.uniform(low, high))
    for _ in range(num_crops - num_masked):
        yield 0


def random_mask(num_patches: int, count: int, shuffler: Any) -> Array:
    """`count` patches anywhere: bool [N]. `shuffler` is a `RandomState` or the module `numpy.random`, as in iBOT."""
    mask = np.arange(num_patches) >= num_patches - count
    shuffler.shuffle(mask)
    return mask


def ibot_mask(grid: tuple[int, int], target: float, rng: Rng, aspect: tuple[float, float]) -> Array:
    """Boxes of about a ninth of the grid or more, at most `target` patches in all: bool [N]."""
    return _box_mask(grid, target, rng, aspect, smallest=(min(grid) // 3) ** 2, largest=math.inf)


def dinov2_mask(grid: tuple[int, int], target: int, rng: Rng, aspect: tuple[float, float]) -> Array:
    """Boxes of up to half the grid, at most `target` patches in all: bool [N]."""
    # Half of the rows, rounded down, times the columns: the official expression from left to right.
    return _box_mask(grid, target, rng, aspect, smallest=_DINOV2_SMALLEST, largest=grid[0] // 2 * grid[1])


def _box_mask(
    grid: tuple[int, int], target: float, rng: Rng, aspect: tuple[float, float], *, smallest: int, largest: float
) -> Array:
    """BEiT's blockwise masking.

    Masks are whole numbers of N bits: a box costs a few operations on them, however large it is.
    """
    num_patches = grid[0] * grid[1]
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    mask = 0
    while (count := mask.bit_count()) < target:
        added = _new_box(grid, mask, rng, log_aspect, smallest, min(target - count, largest))
        if not added:
            break
        mask |= added
    bits = np.frombuffer(mask.to_bytes(-(-num_patches // 8), "little"), dtype=np.uint8)
    return np.unpackbits(bits, count=num_patches, bitorder="little").astype(bool)


def _new_box(
    grid: tuple[int, int], mask: int, rng: Rng, log_aspect: tuple[float, float], smallest: int, room: float
) -> int:
    """The patches that the first fitting box adds to `mask`, at most `room`; 0 where no box fitted."""
    rows, columns = grid
    for _ in range(_TRIES):
        # `room` may be below `smallest`: a uniform number between two others, whichever is larger.
        area = rng.uniform(smallest, room)
        ratio = math.exp(rng.uniform(*log_aspect))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < rows and width < columns:
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            first_column = ((1 << height * columns) - 1) // ((1 << columns) - 1)
            box = first_column * ((1 << width) - 1) << (top * columns + left)
            added = box & ~mask
            if 0 < added.bit_count() <= room:
                return added
    return 0
