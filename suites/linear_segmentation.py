"""A linear head on patch features for dense labels, several learning rates trained at once.

DINOv2's head (facebookresearch/dinov2 `dinov2/eval/segmentation/models/decode_heads/linear_head.py`): BatchNorm over
all patches of the batch, then a linear map of every patch (a 1 x 1 convolution; weight N(0, 0.01), bias 0); logits are
enlarged to the label map (bilinear, align_corners=False); cross-entropy over the judged pixels. AdamW (weight decay on
all parameters), linear warm-up and linear ("poly", power 1) decay to 0, per iteration.

The statistics of BatchNorm do not depend on the rate, so all rates share them, the batches and the initial weights.
The loss is taken on every `stride`-th row and column of the label maps, from a place drawn at each iteration: on
average over iterations the loss on all pixels, at 1 / stride^2 of its cost. stride = 1 is the loss on all of them.

Shapes: T patches of a batch, D features, R rates, C classes, h x w patches, H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suites.label_maps import IGNORED
from suites.overlap import count_pixels
from suites.patch_maps import PatchMaps, Ragged

MAX_LOGITS = 2**26
"""Enlarged logits that are in memory at a time: 256 MiB."""
BETAS = (0.9, 0.999)
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How heads are trained."""

    iterations: int
    warmup_iterations: int
    batch_size: int
    weight_decay: float
    stride: int

    def factor(self, iteration: int) -> float:
        """Share of the learning rate at an iteration 0, 1, ..."""
        warm = min(1.0, (iteration + 1) / (self.warmup_iterations + 1))
        return warm * (1 - iteration / self.iterations)


@dataclass(frozen=True)
class LabelledMaps:
    """Features and labels of the images of a split."""

    maps: PatchMaps
    labels: Ragged
    """Per image uint8 [H, W]; IGNORED is not judged."""

    def __len__(self) -> int:
        return len(self.maps)

    def shapes(self, number: int) -> tuple[tuple[float, ...], ...]:
        """Of image `number`: patches, span, pixels."""
        return tuple(self.maps.grids[number]), tuple(self.maps.spans[number]), self.labels.shape(number)


class LinearHeads(nn.Module):
    """R linear heads behind one BatchNorm."""

    def __init__(self, num_rates: int, dim: int, num_classes: int, generator: torch.Generator):
        super().__init__()
        # Its scale and shift are trained, so each rate has its own.
        self.norm = nn.BatchNorm1d(dim, affine=False)
        initial = 0.01 * torch.randn(num_classes, dim, generator=generator)
        self.weight = nn.ParameterList(initial.clone() for _ in range(num_rates))
        self.bias = nn.ParameterList(torch.zeros(num_classes) for _ in range(num_rates))
        self.scale = nn.ParameterList(torch.ones(dim) for _ in range(num_rates))
        self.shift = nn.ParameterList(torch.zeros(dim) for _ in range(num_rates))

    def forward(self, features: Tensor) -> Tensor:
        """Features [T, D] -> logits [T, R * C]."""
        weight, scale = torch.stack(list(self.weight)), torch.stack(list(self.scale))
        bias = torch.stack(list(self.bias)) + (weight @ torch.stack(list(self.shift)).unsqueeze(2)).squeeze(2)
        return torch.addmm(bias.flatten(), self.norm(features), (weight * scale.unsqueeze(1)).flatten(0, 1).T)

    def of_rate(self, number: int) -> list[nn.Parameter]:
        """The parameters of one rate."""
        return [part[number] for part in (self.weight, self.bias, self.scale, self.shift)]

    def only(self, number: int) -> LinearHeads:
        """The head of one rate alone."""
        alone = copy.deepcopy(self)
        for name in ("weight", "bias", "scale", "shift"):
            setattr(alone, name, nn.ParameterList([getattr(alone, name)[number]]))
        return alone

    @property
    def num_rates(self) -> int:
        """R."""
        return len(self.weight)

    def finite(self) -> list[bool]:
        """Per rate, whether it did not diverge."""
        return [all(bool(part.isfinite().all()) for part in self.of_rate(r)) for r in range(self.num_rates)]


def interpolation(places: Tensor, length: int, span: float, cells: int) -> Tensor:
    """Weights [places, cells] that give pixels their values from patches, bilinear along one axis.

    Args:
        places: numbers of the pixels.
        length: pixels of the whole axis, which cover
        span: patches of the `cells` there are (fewer where the input was filled up).
    """
    centre = ((places + 0.5) * (span / length) - 0.5).clamp(0, cells - 1)
    return (1 - (centre[:, None] - torch.arange(cells, device=places.device)).abs()).clamp(min=0).float()


def enlarge(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Logits of patches [..., h, w] -> of pixels [..., H, W], by weights [H, h] and [W, w]."""
    return rows @ logits @ columns.T


def fit_heads(
    data: LabelledMaps,
    images: Sequence[int],
    rates: Sequence[float],
    num_classes: int,
    schedule: Schedule,
    *,
    seed: int = 0,
    device: str = "cpu",
    report: Report | None = None,
) -> LinearHeads:
    """Train one head per learning rate on these images; they come back in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    heads = LinearHeads(len(rates), data.maps.dim, num_classes, generator).to(device).train()
    groups = [{"params": heads.of_rate(number), "lr": rate} for number, rate in enumerate(rates)]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=schedule.weight_decay)
    batches = _batches(images, schedule.batch_size, generator)
    for iteration in range(schedule.iterations):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(iteration)
        start = torch.randint(schedule.stride, (2,), generator=generator).tolist()
        optimizer.zero_grad()
        add_gradients(heads, data, next(batches), schedule.stride, start, device)
        optimizer.step()
        if report is not None and (iteration + 1) % 50 == 0:
            report("iterations of the linear head", iteration + 1, schedule.iterations)
    return heads.eval()


def add_gradients(
    heads: LinearHeads, data: LabelledMaps, images: Sequence[int], stride: int, start: Sequence[int], device: str
) -> float:
    """Add the gradients of the mean cross-entropy of each rate; their sum, for tests.

    Images of the same shapes go together, as many as MAX_LOGITS allows: beyond the patches nothing is kept.
    """
    images = sorted(images, key=data.shapes)
    labels = [np.ascontiguousarray(data.labels[i][start[0] :: stride, start[1] :: stride]) for i in images]
    judged = max(1, sum(int((one != IGNORED).sum()) for one in labels))
    logits = heads(data.maps.batch(images, device))
    leaf = logits.detach().requires_grad_()
    total, first = 0.0, 0
    for numbers in _groups(images, labels, data, leaf.shape[1]):
        (height, width), span, size = data.shapes(images[numbers[0]])
        height, width = int(height), int(width)
        rows, columns = (
            interpolation(torch.arange(start[axis], size[axis], stride, device=device), int(size[axis]), span[axis], n)
            for axis, n in enumerate((height, width))
        )
        number = len(numbers) * height * width
        patches = leaf[first : first + number].view(len(numbers), height, width, heads.num_rates, -1)
        # The classes before the pixels: several times faster on a CPU, in the products and in the softmax.
        pixels = enlarge(patches.permute(0, 3, 4, 1, 2), rows, columns)
        target = torch.from_numpy(np.stack([labels[k] for k in numbers])).to(device).long()
        target = target[:, None].expand(-1, heads.num_rates, -1, -1)
        loss = F.cross_entropy(pixels.flatten(0, 1), target.flatten(0, 1), ignore_index=IGNORED, reduction="sum")
        loss = loss / judged
        loss.backward()
        total, first = total + float(loss.detach()), first + number
    logits.backward(leaf.grad)
    return total


@torch.inference_mode()
def count_overlaps(
    heads: LinearHeads, data: LabelledMaps, images: Sequence[int], num_classes: int, device: str = "cpu"
) -> Tensor:
    """Pixel counts of suites.overlap on all pixels of these images: int64 [R, N, 3, C]."""
    counts = torch.zeros(heads.num_rates, len(images), 3, num_classes, dtype=torch.int64)
    for place, number in enumerate(images):
        grid, span, size = data.shapes(number)
        height, width = int(size[0]), int(size[1])
        logits = heads(data.maps.batch([number], device)).view(int(grid[0]), int(grid[1]), heads.num_rates, -1)
        columns = interpolation(torch.arange(width, device=device), width, span[1], int(grid[1]))
        labels = torch.from_numpy(data.labels[number].copy()).to(device)
        # In strips of rows, so that large images of many classes do not fill the memory.
        for strip in torch.arange(height, device=device).split(max(1, MAX_LOGITS // (width * num_classes))):
            rows = interpolation(strip, height, span[0], int(grid[0]))
            for rate in range(heads.num_rates):
                found = enlarge(logits[:, :, rate].permute(2, 0, 1), rows, columns).argmax(0)
                counts[rate, place] += count_pixels(labels[strip], found, num_classes).cpu()
    return counts


def _batches(images: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches without end: one permutation of the images after the other, cut without gaps."""
    left: list[int] = []
    while True:
        while len(left) < size:
            left += [images[k] for k in torch.randperm(len(images), generator=generator).tolist()]
        yield left[:size]
        left = left[size:]


def _groups(images: Sequence[int], labels: Sequence[np.ndarray], data: LabelledMaps, width: int) -> Iterator[list[int]]:
    """Places of images of the same shapes, next to each other, within MAX_LOGITS."""
    for _, members in groupby(range(len(images)), key=lambda place: data.shapes(images[place])):
        places = list(members)
        most = max(1, MAX_LOGITS // (labels[places[0]].size * width))
        yield from (places[first : first + most] for first in range(0, len(places), most))
