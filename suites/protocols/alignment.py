"""Alignment and uniformity of augmented views (Wang & Isola, ICML 2020, equations 1 and 2).

Two views x, y of each image by RandomResizedCrop and flip, features f at unit length:

    alignment   mean over images of ||f(x) - f(y)||^2: 0 when crops of an image fall together, 2 for unrelated ones
    uniformity  log of the mean over pairs of images of exp(-2 ||f(x_i) - f(x_j)||^2), first views only: 0 when all are
                one point, -4 when all are orthogonal

Lower is better for both, and only both together say something: a constant network has alignment 0. The interval of
alignment is over images. A sample is an image: index, squared distance of its views.

Shapes: N images, B batch, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.views import IMAGENET_MEAN, IMAGENET_STD, Triple
from pretrain.errors import DinobenchError, UsageError
from suites.extractor import Extractor
from suites.interval import mean_interval
from suites.passes import default_workers
from suites.protocols.protocol import Context, Outcome, ProtocolParameters
from suites.protocols.representation import pair_potential
from suites.suite import SuiteDataset
from suites.training_views import CropViews, Order, RandomCrop, crop_batches

NEEDS_LABELS = False
READS_IMAGES = True


class Parameters(ProtocolParameters):
    """Numbers that define the scores."""

    crop: RandomCrop = RandomCrop()
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    num_images: int = Field(default=10000, ge=2)
    """Of a larger split, a seeded draw of so many."""
    temperature: float = Field(default=2.0, gt=0)
    """Factor t of the Gaussian potential exp(-t d^2)."""


@dataclass(frozen=True)
class TestImages:
    """The images whose views are compared."""

    __test__ = False  # no test for pytest to collect
    images: ImageSet

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def fingerprint(self) -> str:
        """Of the whole split."""
        return self.images.fingerprint

    def receipt(self) -> dict[str, dict[str, Any]]:
        """Name, split, n, fingerprint."""
        images = self.images
        return {"test": {"name": images.name, "split": images.split, "n": len(images), "fingerprint": self.fingerprint}}


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> TestImages:
    """The test split; labels are not read.

    Raises:
        UsageError: neither the suite nor `data` names a data set.
    """
    name = data or dataset.name
    if name is None or name.endswith(":"):
        raise UsageError(f"this suite does not know where its images are: add --data {name or 'folder:'}/path")
    return TestImages(open_dataset(name, dataset.test))


def run(data: TestImages, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Compare the features of two views of each image."""
    images, chosen = data.images, torch.arange(len(data.images))
    if len(images) > parameters.num_images:
        generator = torch.Generator().manual_seed(context.seed)
        chosen = torch.randperm(len(images), generator=generator)[: parameters.num_images].sort().values
        images = images.subset(chosen, split=images.split)
    if len(images) < 2:
        raise DinobenchError(f"{data.name} {images.split} has {len(images)} image: uniformity needs pairs of images")
    first, second = view_features(images, extractor, parameters, context.seed)
    distance = (first - second).square().sum(1).double()
    potential = pair_potential(first, parameters.temperature)
    scores = {"alignment": distance.mean().item(), "uniformity": math.log(potential.mean().item())}
    samples = pd.DataFrame({"index": chosen.numpy(), "distance": distance.numpy()})
    notes = ["lower is better; a constant network has alignment 0: read it together with uniformity"]
    return Outcome(scores, len(images), mean_interval(distance.numpy(), seed=context.seed), samples, notes=notes)


def view_features(images: ImageSet, extractor: Extractor, parameters: Parameters, seed: int) -> Tensor:
    """Features at unit length of two views of each image: float32 [2, N, D], in the order of the images.

    Raises:
        DinobenchError: a feature is not finite.
    """
    views = CropViews(parameters.crop, parameters.mean, parameters.std, seed)
    order = Order(len(images), extractor.batch_size, epochs=2, seed=seed)  # an epoch is a view of every image
    workers = default_workers(len(images)) if extractor.workers is None else extractor.workers
    found: list[Tensor] = []
    numbers: list[Tensor] = []
    for batch in crop_batches(images, views, order, extractor.device, workers):
        found.append(extractor.apply(_unit_features, batch.views).float().cpu())
        numbers.append(batch.number + batch.epoch * len(images))
        if extractor.progress is not None:
            done = sum(map(len, numbers))
            extractor.progress(f"views of {images.name} {images.split}", done, 2 * len(images))
    features = torch.cat(found)
    if not torch.isfinite(features).all():
        raise DinobenchError("the features are not finite: the weights of this checkpoint are broken or overflow")
    return torch.empty_like(features).index_copy_(0, torch.cat(numbers), features).view(2, len(images), -1)


def _unit_features(backbone: nn.Module, views: Tensor) -> Tensor:
    """Views [B, 3, s, s] -> [B, D]."""
    return nn.functional.normalize(backbone(views).float(), dim=1)
