"""Video object segmentation by propagating the first frame's mask along similar patches (DAVIS), without training.

facebookresearch/dino `eval_video_segmentation.py` (DINO, Table 5), after Jabri et al., arXiv 2006.14613. Frames with
their short side at 480 px, the other a multiple of 64. Each patch of a frame takes the labels of patches of the first
frame and of the last `num_last_frames` ones: affinity exp(cos / temperature) within +-`neighbourhood` rows and columns,
those below the `top_k`-th largest set to 0, divided by their sum. The soft labels are enlarged (bilinear), each channel
scaled to [0, 1], and the largest taken; the mask returns to the size of the frame (nearest).

J and F of suites.mask_measures for every object on all frames but the first and the last, as the DAVIS toolkits do.
`jf`, `j_*` and `f_*` are means over objects, in percent. A sample is an object: sequence, object, J and F; the table
`frames` has both for every frame. The interval resamples sequences, whose objects belong together.

Shapes: H x W pixels, h x w patches, P = h w, S frames of context, C = objects + background, D features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.images import to_tensor
from pretrain.data.views import IMAGENET_MEAN, Triple
from pretrain.errors import DinobenchError
from suites.davis import NUM_SEQUENCES, Davis, Video, Year, open_davis
from suites.descriptors import Patches, patch_tokens
from suites.extractor import Extractor
from suites.interval import bootstrap_interval
from suites.mask_measures import contour_accuracy, region_similarity, summarise
from suites.places import find_benchmark
from suites.protocols.protocol import Context, Outcome, ProtocolParameters
from suites.suite import SuiteDataset

NEEDS_LABELS = False
READS_IMAGES = True
Labels = NDArray[np.uint8]


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    year: Year = 2017
    """What the masks mean: 2016, one object; 2017, several."""
    short_side: int = Field(default=480, ge=1)
    multiple: int = Field(default=64, ge=1)
    """The longer side is cut down to a multiple of this, pixels."""
    num_last_frames: int = Field(default=7, ge=0)
    neighbourhood: int = Field(default=12, ge=0)
    """Patches in each direction; 0 = no limit."""
    top_k: int = Field(default=5, ge=1)
    temperature: float = Field(default=0.1, gt=0)
    mean: Triple = IMAGENET_MEAN
    std: Triple = (0.228, 0.224, 0.225)
    """As in the official script, where the first value differs from ImageNet's 0.229."""


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> Davis:
    """The sequences of the suite's `test` split."""
    name, path = find_benchmark(dataset.name, data, "JPEGImages/, Annotations/ and ImageSets/ of DAVIS (480p)")
    return open_davis(path, name, parameters.year, dataset.test)


def run(data: Davis, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Propagate the first mask of every sequence and judge the masks."""
    total, done = sum(len(video.frames) for video in data.videos), 0
    judged: list[_Judged] = []
    for video in data.videos:
        first = data.mask(video, 0)
        masks = list(segment(data, video, first, extractor, parameters))
        judged += _judge(data, video, first, masks)
        done += len(video.frames)
        if extractor.progress is not None:
            extractor.progress(f"frames of {data.name}", done, total)
    return _outcome(judged, data, context.seed)


def segment(data: Davis, video: Video, first: Labels, extractor: Extractor, parameters: Parameters) -> Iterator[Labels]:
    """Masks [H, W] of the frames 1, 2, ... of a video from its first mask; not of the last frame, which is not judged.

    Raises:
        DinobenchError: the first frame shows no object.
    """
    if not first.any():
        raise DinobenchError(f"{data.where}: the first mask of {video.name} shows no object to follow")

    def look(number: int) -> Patches:
        return extractor.apply(patch_tokens, resize_frame(data.frame(video, number), parameters)[None])

    patches = look(0)
    tokens = patches.tokens[0].float()
    context = [(tokens, _one_hot(first, patches.grid).to(tokens.device))]
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=parameters.num_last_frames)
    for number in range(1, len(video.frames) - 1):
        tokens = look(number).tokens[0].float()
        sources, labels = (torch.stack(part) for part in zip(*context, *recent, strict=True))
        soft = propagate_labels(
            tokens,
            sources,
            labels,
            neighbourhood=parameters.neighbourhood,
            top_k=parameters.top_k,
            temperature=parameters.temperature,
        )
        recent.append((tokens, soft))
        mask = enlarge(soft, patches.size).argmax(0).to(torch.uint8).cpu().numpy()
        height, width = first.shape
        yield np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def propagate_labels(
    target: Tensor, sources: Tensor, labels: Tensor, *, neighbourhood: int, top_k: int, temperature: float
) -> Tensor:
    """Soft labels [C, h, w] of a frame's patches [P, D] from patches [S, P, D] with labels [S, C, h, w].

    One row of patches at a time: only the rows near it can give it labels, and the affinities stay small.
    """
    num_labels, rows, columns = labels.shape[1:]
    target = F.normalize(target, dim=-1).view(rows, columns, -1)
    sources = F.normalize(sources, dim=-1).unflatten(1, (rows, columns))
    near_rows, near_columns = (near(n, neighbourhood).to(target.device) for n in (rows, columns))
    propagated = []
    for row in range(rows):
        chosen = near_rows[row].nonzero().flatten()
        keys = sources[:, chosen].flatten(0, 2)
        values = labels[:, :, chosen].permute(0, 2, 3, 1).reshape(-1, num_labels)
        affinity = (target[row] @ keys.T / temperature).exp()
        # Source positions are frames x rows x columns: the limit on columns repeats for each frame and row.
        affinity = affinity * near_columns.repeat(1, len(labels) * len(chosen))
        kth = affinity.topk(min(top_k, affinity.shape[1]), dim=1).values[:, -1:]
        affinity = torch.where(affinity >= kth, affinity, 0)
        propagated.append(affinity / affinity.sum(1, keepdim=True) @ values)
    return torch.stack(propagated).permute(2, 0, 1)


def near(length: int, distance: int) -> Tensor:
    """Which of `length` positions lie within `distance` of each other: bool [length, length]; 0 = all of them."""
    position = torch.arange(length)
    return (position[:, None] - position).abs() <= (distance or length)


def enlarge(soft: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Soft labels [C, h, w] of patches of this height and width -> those of pixels, each channel scaled to [0, 1]."""
    size = soft.shape[1] * patch_size[0], soft.shape[2] * patch_size[1]
    large = F.interpolate(soft[None], size, mode="bilinear", align_corners=False)[0]
    largest, smallest = large.amax((1, 2), keepdim=True), large.amin((1, 2), keepdim=True)
    spread = torch.where(largest > smallest, largest - smallest, 1)
    return torch.where(largest > 0, (large - smallest) / spread, large)


def resize_frame(image: Image.Image, parameters: Parameters) -> Tensor:
    """PIL RGB -> normalised [3, H, W], bilinear without antialiasing (OpenCV's rule, equal up to its rounding)."""
    width, height = frame_size(image.width, image.height, parameters)
    pixels = F.interpolate(to_tensor(image)[None].float(), (height, width), mode="bilinear")[0].round()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (parameters.mean, parameters.std))
    return (pixels / 255 - mean) / std


def frame_size(width: int, height: int, parameters: Parameters) -> tuple[int, int]:
    """Width and height at which a frame is looked at."""
    short, multiple = parameters.short_side, parameters.multiple
    longer = int(short * max(width, height) / min(width, height)) // multiple * multiple
    if longer == 0:
        raise DinobenchError(f"frames of {width} x {height} px leave no {multiple} px at short side {short}")
    return (short, longer) if height > width else (longer, short)


def _one_hot(labels: Labels, grid: tuple[int, int]) -> Tensor:
    """Objects [H, W] -> float32 [C, h, w], taken at the nearest pixel."""
    small = Image.fromarray(labels).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    numbers = torch.from_numpy(np.array(small)).long()
    return F.one_hot(numbers, int(labels.max()) + 1).permute(2, 0, 1).float()


@dataclass(frozen=True)
class _Judged:
    """One object of one sequence on its judged frames."""

    sequence: str
    number: int
    j: NDArray[np.float64]
    """[F] in [0, 1]."""
    f: NDArray[np.float64]


def _judge(data: Davis, video: Video, first: Labels, masks: list[Labels]) -> list[_Judged]:
    true = [data.mask(video, number) for number in range(1, len(masks) + 1)]
    judged = []
    for one in range(1, int(first.max()) + 1):
        pairs = [(found == one, wanted == one) for found, wanted in zip(masks, true, strict=True)]
        j, f = (np.array([measure(*pair) for pair in pairs]) for measure in (region_similarity, contour_accuracy))
        judged.append(_Judged(video.name, one, j, f))
    return judged


def _outcome(judged: list[_Judged], data: Davis, seed: int) -> Outcome:
    objects, frames = [], []
    for index, one in enumerate(judged):
        parts = {f"{name}_{part}": 100 * value for name, part, value in _summaries(one)}
        jf = (parts["j_mean"] + parts["f_mean"]) / 2
        objects.append({"index": index, "sequence": one.sequence, "object": one.number, "jf": jf, **parts})
        frames += [
            {"sequence": one.sequence, "object": one.number, "frame": frame, "j": 100 * j, "f": 100 * f}
            for frame, (j, f) in enumerate(zip(one.j, one.f, strict=True), start=1)
        ]
    names = ("jf", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
    scores = {name: float(np.mean([row[name] for row in objects])) for name in names}
    expected = NUM_SEQUENCES.get((data.year, data.split))
    notes = [f"{len(objects)} objects in {len(data.videos)} sequences; the interval resamples sequences"]
    if expected not in (None, len(data.videos)):
        notes.append(f"DAVIS-{data.year} {data.split} has {expected} sequences: not comparable with published figures")
    interval = _interval([[row["jf"] for row in objects if row["sequence"] == v.name] for v in data.videos], seed)
    return Outcome(scores, len(objects), interval, pd.DataFrame(objects), {"frames": pd.DataFrame(frames)}, notes)


def _summaries(one: _Judged) -> Iterator[tuple[str, str, float]]:
    for name, values in (("j", one.j), ("f", one.f)):
        for part, value in summarise(values)._asdict().items():
            yield name, part, value


def _interval(values: list[list[float]], seed: int) -> tuple[float, float]:
    """Of the mean over the objects of all sequences; the sequences are drawn."""
    total, number = np.array([sum(v) for v in values]), np.array([len(v) for v in values])

    def mean(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return counts @ total / (counts @ number)

    return bootstrap_interval(np.arange(len(values)), mean, seed=seed)
