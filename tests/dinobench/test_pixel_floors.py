"""The raw-pixel floors of the data packs' README, from the features of the checkpoint `pixels`.

The README classifies by Euclidean distance and majority of 5 neighbours, without preprocessing, which no suite does:
suites compare by the cosine, of normalised colours. So the rule is scikit-learn's here, and what is tested is all
before it: images, their order and labels, and the features. A shifted label or a transposed image would miss the floor.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ArraySource, ImageSet, array_fingerprint
from pretrain.data.transforms import EvalTransform
from pretrain.models.pixels import load_pixels
from suites.extractor import Extractor
from suites.features import extract
from suites.protocols import retrieval
from suites.suite import load_suite

PACKS = Path(os.environ.get("DINOBENCH_DATA", ""))
GREY = 1 / 255
LEVELS = EvalTransform.model_validate(
    {"resize": None, "crop": None, "mean": (0.0, 0.0, 0.0), "std": (GREY, GREY, GREY)}
)
"""Grey levels 0 to 255, which are exact also where features are kept in 16 bits."""
pytestmark = pytest.mark.slow


def needs(pack: str) -> pytest.MarkDecorator:
    there = bool(os.environ.get("DINOBENCH_DATA")) and (PACKS / pack).is_dir()
    return pytest.mark.skipif(not there, reason=f"DINOBENCH_DATA has no pack {pack}")


def accuracy(train: ImageSet, test: ImageSet, side: int) -> float:
    """Of the majority of the 5 Euclidean neighbours, in percent, on the features of `pixels:<side>`."""
    model = load_pixels(f"pixels:{side}")
    parts = [extract(model, images, LEVELS) for images in (train, test)]
    (x, y), (queries, labels) = [(part.cls.float().numpy(), part.labels) for part in parts]
    classifier = KNeighborsClassifier(5, algorithm="brute").fit(x, y)
    return 100 * float((classifier.predict(queries) == labels.numpy()).mean())


@needs("fashion-mnist")
def test_fashion_mnist_on_the_first_2000_test_images() -> None:
    train, test = (open_dataset("fashion_mnist", split) for split in ("train", "test"))
    assert accuracy(train, test.subset(range(2000)), 28) == pytest.approx(85.9, abs=0.051)


@needs("cifar10-jpeg")
def test_cifar10_on_2000_test_images() -> None:
    """The README does not say which. This draw was found by its figure, 35.25; all 10,000 images give 33.95.

    A draw of 2,000 has a standard deviation of about 1: the figure is one that a draw can have, and this one fixes it.
    """
    train, test = (open_dataset("cifar10", split) for split in ("train", "test"))
    some = np.random.RandomState(0).permutation(len(test))[:2000]
    assert accuracy(train, test.subset(torch.from_numpy(some)), 32) == pytest.approx(35.3, abs=0.051)


@needs("tiny-imagenet-25")
def test_tiny_imagenet_on_every_4th_pixel() -> None:
    """Of both directions: 16 x 16 of 64 x 64."""

    def every_4th(split: str) -> ImageSet:
        images = open_dataset(f"folder:{PACKS / 'tiny-imagenet-25' / 'tiny_imagenet25.tar.gz'}", split)
        assert images.array is not None and images.labels is not None
        pixels = images.array[:, :, ::4, ::4].contiguous()
        fingerprint = array_fingerprint(pixels, images.labels)
        return ImageSet("tiny", split, fingerprint, ArraySource(pixels), labels=images.labels, classes=images.classes)

    train, test = every_4th("train"), every_4th("val")
    assert (len(train), len(test)) == (12_500, 1250)
    assert accuracy(train, test, 16) == pytest.approx(11.4, abs=0.051)


@needs("coil20")
def test_coil20_by_the_cosine_of_mean_centred_pixels() -> None:
    """Average precision without interpolation, as the README has it; ours is revisitop's, by trapezoids."""
    suite = load_suite("coil20_retrieval")
    opened = retrieval.open_data(suite.dataset, None, suite.resolved_parameters())
    extractor = Extractor(load_pixels("pixels:128"))

    def levels(image: Image.Image) -> torch.Tensor:
        return LEVELS(image)

    database, queries = (
        extractor.describe(images, levels, lambda network, x: network(x), made_by="grey levels")
        for images in (opened.database, opened.queries)
    )
    mean = database.mean(0)
    order = retrieval.rank(database - mean, queries - mean)
    found = []
    for difficulty in ("easy", "medium", "hard"):
        positives, ignored = opened.truth.positives(difficulty), opened.truth.ignored(difficulty)
        precisions = []
        for query, (wanted, left_out) in enumerate(zip(positives, ignored, strict=True)):
            ranked = [image for image in order[:, query] if image not in set(left_out)]
            hits = np.isin(ranked, list(wanted))
            precisions.append((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())
        found.append(100 * float(np.mean(precisions)))
    assert found == pytest.approx([81.7, 60.9, 53.3], abs=0.051)
