"""Semantic segmentation by a linear head on frozen patch tokens, mIoU (DINOv2, section 7.4, "lin.", Table 10).

facebookresearch/dinov2, the released configurations dinov2_vit*14_{ade20k,voc2012}_linear_config.py: BatchNorm and a
1 x 1 convolution on the patch tokens of the last block, AdamW (learning rate 1e-3, weight decay 1e-4, betas .9, .999),
40,000 iterations of 16 images, 1,500 of warm-up, linear decay; logits enlarged bilinearly, align_corners=False; mIoU on
the label maps at their own size. suites.linear_segmentation has the head, suites.overlap the scores, all in percent.

The learning rate is chosen by mIoU on the split `validation`, whose images are then not trained on either; where there
is none, on a held-out part of train, and the head is trained again on all of train. The test split is read once.

Departures from the official code: features are extracted once, from the whole image, without its random sizes, crops,
flips and colours in training and without its windows of 512 px in testing; the loss of an iteration is on every
`stride`-th row and column and is a mean over judged pixels; several learning rates instead of one.

A sample is a test image: pixels, correct pixels, accuracy, mIoU over its own classes. The table `classes` has IoU,
accuracy and pixels of every class; the interval is over images. raw_pixels is the same head on the mean colour of
every patch of `colour_patch` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.data.transforms import EvalTransform
from pretrain.data.views import IMAGENET_MEAN, IMAGENET_STD, Triple
from pretrain.errors import DinobenchError
from suites.cache import content_key
from suites.extractor import Extractor
from suites.label_maps import LabelMaps, MapLayout, open_label_maps
from suites.linear_segmentation import LabelledMaps, LinearHeads, Schedule, count_overlaps, fit_heads
from suites.overlap import Overlap, overlap_of
from suites.passes import Progress, default_workers
from suites.patch_maps import PatchMaps, Ragged, colour_maps, extract_maps
from suites.places import find_benchmark
from suites.protocols.protocol import Context, Outcome, ProtocolParameters
from suites.suite import SuiteDataset

NEEDS_LABELS = False
READS_IMAGES = True


class Parameters(ProtocolParameters):
    """Numbers that define the score; the defaults are the official ones where there are any."""

    layout: MapLayout
    validation: str | None = None
    """Split on which the learning rate is chosen; None = a part of train."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of train on which it is chosen otherwise."""
    short_side: int | None = Field(default=512, ge=1)
    """Short side of the input, pixels; None leaves the image as it is."""
    long_side: int | None = Field(default=2048, ge=1)
    """The longer side is at most this."""
    learning_rates: tuple[float, ...] = Field(default=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), min_length=1)
    iterations: int = Field(default=40_000, ge=1)
    warmup_iterations: int = Field(default=1500, ge=0)
    batch_size: int = Field(default=16, ge=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    stride: int = Field(default=4, ge=1)
    """Pixels from one row or column of the loss to the next; 1 = all of them."""
    colour_patch: int = Field(default=8, ge=1)
    """Side of the patches of the baseline raw_pixels, pixels of the input."""
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def schedule(self) -> Schedule:
        """What the head needs of this."""
        return Schedule(
            iterations=self.iterations,
            warmup_iterations=self.warmup_iterations,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            stride=self.stride,
        )


@dataclass(frozen=True)
class SegmentationData:
    """Images and label maps of the splits."""

    name: str
    splits: dict[str, LabelMaps]
    """By role: train, test, and validation where there is one."""

    @property
    def fingerprint(self) -> str:
        """Hash of all images and maps and of what the labels mean."""
        return content_key(**{role: maps.fingerprint for role, maps in self.splits.items()})

    def receipt(self) -> dict[str, dict[str, Any]]:
        """By role: name, split, n, fingerprint."""
        return {role: maps.receipt() for role, maps in self.splits.items()}


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> SegmentationData:
    """The splits of the suite.

    Raises:
        DinobenchError: nothing is found, or images and label maps are no pairs.
    """
    layout = parameters.layout
    needs = f"{layout.images}/<name>.jpg and {layout.labels}/<name>.png".format(split=dataset.train)
    name, path = find_benchmark(dataset.name, data, needs)
    wanted = {"train": dataset.train, "validation": parameters.validation, "test": dataset.test}
    return SegmentationData(
        name,
        {role: open_label_maps(path, name, split, layout) for role, split in wanted.items() if split is not None},
    )


def run(data: SegmentationData, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Extract features, train the head, score the test split."""
    made_by = parameters.model_dump(mode="json", include={"short_side", "long_side", "mean", "std"})
    prepare = partial(prepare_image, parameters=parameters)

    def look(maps: LabelMaps) -> PatchMaps:
        return extract_maps(extractor, maps.images, prepare, **made_by)

    found = {role: LabelledMaps(look(maps), _labels(maps)) for role, maps in data.splits.items()}
    return score_maps(data, found, parameters, context, extractor.progress)


def pixel_scores(data: SegmentationData, parameters: Parameters, context: Context) -> dict[str, float]:
    """Scores of the mean colour of every patch."""
    prepare = partial(prepare_image, parameters=parameters)
    found = {
        role: LabelledMaps(colour_maps(maps.images, prepare, parameters.colour_patch), _labels(maps))
        for role, maps in data.splits.items()
    }
    return score_maps(data, found, parameters, context).scores


def score_maps(
    data: SegmentationData,
    found: dict[str, LabelledMaps],
    parameters: Parameters,
    context: Context,
    progress: Progress | None = None,
) -> Outcome:
    """Train the head on the features of the splits and score it."""
    train, test, names = found["train"], found["test"], parameters.layout.classes
    schedule = parameters.schedule()

    def fit(images: Sequence[int], rates: Sequence[float]) -> LinearHeads:
        options: dict[str, Any] = {"seed": context.seed, "device": context.device, "report": progress}
        return fit_heads(train, images, rates, len(names), schedule, **options)

    def judge(heads: LinearHeads, maps: LabelledMaps, images: Sequence[int]) -> list[Overlap]:
        return [overlap_of(counts) for counts in count_overlaps(heads, maps, images, len(names), context.device)]

    everything = list(range(len(train)))
    fitted, validation, chosen_on = everything, found.get("validation"), "the validation split"
    if validation is None:
        fitted, held = held_out_images(len(train), parameters.held_out, context.seed)
        heads = fit(fitted, parameters.learning_rates)
        validated, chosen_on = judge(heads, train, held), f"{len(held)} images of train"
    else:
        heads = fit(fitted, parameters.learning_rates)
        validated = judge(heads, validation, range(len(validation)))
    best = select([overlap.mean_iou() for overlap in validated], heads.finite())
    rate = parameters.learning_rates[best]
    final = heads.only(best) if validation is not None else fit(everything, [rate])
    overlap = judge(final, test, range(len(test)))[0]
    if not overlap.labelled.any():
        raise DinobenchError(f"{data.name}: no pixel of {data.splits['test'].images.role} has a label that is judged")
    scores = {
        "miou": 100 * overlap.mean_iou(),
        "pixel_accuracy": 100 * overlap.pixel_accuracy(),
        "class_accuracy": 100 * overlap.class_accuracy(),
        "validation_miou": 100 * validated[best].mean_iou(),
        "learning_rate": rate,
    }
    samples = overlap.images()
    samples.insert(0, "image", [data.splits["test"].name(number) for number in range(len(test))])
    samples.insert(0, "index", range(len(test)))
    low, high = overlap.interval(context.seed)
    notes = [f"learning rate {rate:g} chosen among {len(heads.weight)} by mIoU on {chosen_on}"]
    if len(heads.weight) > 1 and rate in (min(parameters.learning_rates), max(parameters.learning_rates)):
        notes.append("the chosen learning rate is at the edge of the sweep")
    absent = [name for name, pixels in zip(names, overlap.labelled.sum(0), strict=True) if not pixels]
    if absent:
        notes.append(f"the test images show no {', '.join(absent)}: such a class counts 0 if predicted, else not")
    return Outcome(scores, len(test), (100 * low, 100 * high), samples, {"classes": overlap.classes(names)}, notes)


def select(scores: Sequence[float], finite: Sequence[bool]) -> int:
    """Number of the best score; the first of equals, never a head that diverged.

    Raises:
        DinobenchError: none is left.
    """
    usable = [k for k, (score, whole) in enumerate(zip(scores, finite, strict=True)) if whole and score == score]
    if not usable:
        raise DinobenchError(
            "every learning rate of the segmentation head diverged, or no pixel to choose it on has a label: use "
            "smaller learning_rates in a copy of the suite definition, and look at the label maps"
        )
    return max(usable, key=lambda k: (scores[k], -k))


def held_out_images(number: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on and of those held out, at least one of each.

    Raises:
        DinobenchError: there is only one image.
    """
    if number < 2:
        raise DinobenchError("segmentation needs two train images to hold one out for the choice of the learning rate")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(max(1, round(share * number)), number - 1)
    return sorted(order[held:]), sorted(order[:held])


def prepare_image(image: Image.Image, parameters: Parameters) -> Tensor:
    """PIL RGB -> normalised [3, H, W] at the input size (bilinear, antialiased)."""
    size = input_size(image.width, image.height, parameters)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return EvalTransform(resize=None, crop=None, mean=parameters.mean, std=parameters.std)(image)


def input_size(width: int, height: int, parameters: Parameters) -> tuple[int, int]:
    """Width and height of the input: the short side as asked for unless the longer one gets too long."""
    short, long = parameters.short_side, parameters.long_side
    scale = 1.0 if short is None else short / min(width, height)
    if long is not None:
        scale = min(scale, long / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _labels(maps: LabelMaps) -> Ragged:
    """The label maps of a split, checked, in a temporary file."""
    loader = DataLoader(_LabelFiles(maps), batch_size=None, num_workers=default_workers(len(maps)))
    return Ragged(labels.numpy() for labels in loader)


class _LabelFiles(Dataset[Tensor]):
    def __init__(self, maps: LabelMaps):
        self.maps = maps

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(self.maps.labels(number))
