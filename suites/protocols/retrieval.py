"""Image retrieval on the revisited Oxford and Paris buildings, or any benchmark with ground truth of that schema.

facebookresearch/dino `eval_image_retrieval.py` (DINO, Table 3): the whole image, its longer side at most `image_size`,
never enlarged, not cropped to the query's box; descriptor = pooled features, or their mean over several scales, at unit
length; the database in order of cosine similarity (ties: the earlier image first); mAP over the queries by trapezoids
and mean precision at k, for the three difficulties of suites.ground_truth. All in percent; `map` is the pinned one.

A sample is a query: index, name, and its average precision at each difficulty (empty where it has no positives). The
interval is over queries. raw_pixels are pixels in [0, 1] minus the mean image of the database.

Files: ground truth gnd_<name>.json or gnd_<name>.pkl, images anywhere below the folder (or in the archive) by their
names. Shapes: N database images, Q queries, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.datasets import data_root
from pretrain.data.images import to_tensor
from pretrain.data.stores import open_store
from pretrain.data.transforms import EvalTransform
from pretrain.data.views import IMAGENET_MEAN, IMAGENET_STD, Triple
from pretrain.errors import DinobenchError
from suites.cache import content_key
from suites.descriptors import multi_scale, thumbnail
from suites.extractor import Extractor
from suites.ground_truth import DIFFICULTIES, Difficulty, GroundTruth, read_ground_truth
from suites.interval import mean_interval
from suites.places import ImageFiles, find_benchmark, image_files, images_below
from suites.protocols.protocol import Context, Outcome, ProtocolParameters
from suites.ranking import RankingScores, score_ranking
from suites.suite import SuiteDataset

NEEDS_LABELS = False
READS_IMAGES = True
MAX_PIXEL_SIDE = 128
"""The baseline raw_pixels is for small images of one size."""


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    image_size: int = Field(default=224, ge=1)
    """Longer side, pixels, beyond which an image is reduced."""
    scales: tuple[float, ...] = Field(default=(1.0,), min_length=1)
    """Sizes of the reduced image over which features are averaged."""
    difficulty: Difficulty = "medium"
    """Of the score `map`."""
    precision_at: tuple[int, ...] = (1, 5, 10)
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


@dataclass(frozen=True)
class RetrievalData:
    """A database, queries and which image answers which."""

    name: str
    truth: GroundTruth
    database: ImageFiles
    queries: ImageFiles

    @property
    def fingerprint(self) -> str:
        """Hash of the images and the ground truth."""
        return content_key(
            database=self.database.fingerprint, queries=self.queries.fingerprint, truth=self.truth.fingerprint()
        )

    def receipt(self) -> dict[str, dict[str, Any]]:
        """By role: name, split, n, fingerprint."""
        truth = {"name": self.name, "split": "ground truth", "n": len(self.truth.queries)}
        return {
            "database": self.database.receipt(),
            "queries": self.queries.receipt(),
            "ground_truth": {**truth, "fingerprint": self.truth.fingerprint()},
        }


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> RetrievalData:
    """The benchmark's images and ground truth.

    Raises:
        DinobenchError: the folder, the ground truth or an image that it names is missing.
    """
    name, path = find_benchmark(dataset.name, data, "the images and gnd_<name>.json or .pkl")
    truth = read_ground_truth(_find_truth(name, path))
    store = open_store(path)
    files: dict[str, str] = {}
    for file in images_below(store, ""):
        stem = PurePosixPath(file).stem
        if stem in files:
            raise DinobenchError(f"{path} holds two images named {stem}: {files[stem]} and {file}; keep one")
        files[stem] = file
    missing = [image for image in (*truth.images, *truth.queries) if image not in files]
    if missing:
        raise DinobenchError(
            f"{path} lacks {len(missing)} of the {len(truth.images)} images and {len(truth.queries)} queries of "
            f"{name} (first: {missing[0]}): is the download complete?"
        )
    database, queries = (
        image_files(store, [files[image] for image in images], path, name, role)
        for images, role in ((truth.images, "database"), (truth.queries, "queries"))
    )
    return RetrievalData(name, truth, database, queries)


def run(data: RetrievalData, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Rank the database for every query and score the ranking."""
    prepare = partial(_prepare, parameters=parameters)
    describe = partial(multi_scale, scales=parameters.scales)
    made_by = {
        "descriptor": "multi_scale",
        **parameters.model_dump(mode="json", include={"image_size", "scales", "mean", "std"}),
    }
    database, queries = (
        extractor.describe(images, prepare, describe, **made_by) for images in (data.database, data.queries)
    )
    return score_descriptors(data.truth, database, queries, parameters, context)


def pixel_scores(data: RetrievalData, parameters: Parameters, context: Context) -> dict[str, float] | None:
    """Scores of the pixels as descriptors; None for large images or images of several sizes."""
    pixels = [_pixels(images) for images in (data.database, data.queries)]
    if pixels[0] is None or pixels[1] is None or pixels[0].shape[1] != pixels[1].shape[1]:
        return None
    mean = pixels[0].mean(0)
    return score_descriptors(data.truth, pixels[0] - mean, pixels[1] - mean, parameters, context).scores


def score_descriptors(
    truth: GroundTruth, database: Tensor, queries: Tensor, parameters: Parameters, context: Context
) -> Outcome:
    """Scores of descriptors [N, D] and [Q, D]."""
    order = rank(database, queries)
    found: dict[Difficulty, RankingScores] = {
        difficulty: score_ranking(
            order, truth.positives(difficulty), truth.ignored(difficulty), parameters.precision_at
        )
        for difficulty in DIFFICULTIES
    }
    pinned = found[parameters.difficulty]
    if not pinned.num_scored:
        raise DinobenchError(f"no query has an image to be found at difficulty {parameters.difficulty}")
    scores = {"map": 100 * pinned.mean_average_precision}
    for difficulty, result in found.items():
        if result.num_scored:
            scores |= _named(difficulty, result, parameters)
    samples = pd.DataFrame({"index": np.arange(len(truth.queries)), "query": list(truth.queries)})
    for difficulty, result in found.items():
        samples[f"ap_{difficulty}"] = 100 * result.average_precision
    notes = [f"{pinned.num_scored} of {len(truth.queries)} queries have positives ({parameters.difficulty})"]
    precision = pinned.average_precision
    interval = mean_interval(100 * precision[np.isfinite(precision)], seed=context.seed)
    return Outcome(scores, pinned.num_scored, interval, samples, notes=notes)


def rank(database: Tensor, queries: Tensor) -> NDArray[np.int64]:
    """Database [N, D] in order of cosine similarity for each query [Q, D]: [N, Q]."""
    similarity = F.normalize(database.double(), dim=1) @ F.normalize(queries.double(), dim=1).T
    return torch.sort(similarity, dim=0, descending=True, stable=True).indices.numpy()


def _named(difficulty: Difficulty, result: RankingScores, parameters: Parameters) -> dict[str, float]:
    scores = {f"map_{difficulty}": 100 * result.mean_average_precision}
    for k, value in zip(parameters.precision_at, result.mean_precision, strict=True):
        scores[f"mp{k}_{difficulty}"] = 100 * float(value)
    return scores


def _prepare(image: Image.Image, parameters: Parameters) -> Tensor:
    transform = EvalTransform(resize=None, crop=None, mean=parameters.mean, std=parameters.std)
    return transform(thumbnail(image, parameters.image_size))


def _pixels(images: ImageFiles) -> Tensor | None:
    """Images of one size as vectors in [0, 1], [N, C * H * W]; one channel when all images are gray."""
    size = images.read(0).size
    if max(size) > MAX_PIXEL_SIDE:
        return None
    rows = []
    for number in range(len(images)):
        pixels = to_tensor(images.read(number))
        if pixels.shape[1:] != (size[1], size[0]):
            return None
        rows.append(pixels)
    stacked = torch.stack(rows)
    if all(torch.equal(stacked[:, 0], stacked[:, channel]) for channel in (1, 2)):
        stacked = stacked[:, :1]
    return stacked.flatten(1).float() / 255


def _find_truth(name: str, path: Path) -> Path:
    """gnd_<name>.json or .pkl, beside the images or above them, or under the data root."""
    root = data_root()
    folders = [path, path.parent] + ([root, root / "retrieval-gnd"] if root else [])
    candidates = [folder / f"gnd_{name}{suffix}" for folder in folders for suffix in (".json", ".pkl")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DinobenchError(f"{name}: no ground truth: put gnd_{name}.json or gnd_{name}.pkl in {candidates[0].parent}")
