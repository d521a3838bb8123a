"""Copy detection on the strong subset of Copydays: which of many images was this strongly altered picture made from?

facebookresearch/dino `eval_copy_detection.py` (DINO, Table 4): images resized to a square (bicubic); descriptor = CLS
and generalised mean of the patch tokens; whitened with a separate set of images (suites.whitening); cosine similarity;
mAP over the altered pictures on the first `depth` answers, by trapezoids. The database is the originals and
distractors; an original answers a picture if their file names begin with the same four characters.

A sample is an altered picture: index, name, average precision in percent. The interval is over them.

Files: original/ and strong/ (of Copydays), distractors/ and whitening/ (YFCC100M images of the user's choice; of each
the first, by name, of the number that the suite pins; 0 = none).
Shapes: N database images, Q pictures, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.stores import open_store
from pretrain.data.transforms import EvalTransform
from pretrain.data.views import IMAGENET_MEAN, IMAGENET_STD, Triple
from pretrain.errors import DinobenchError
from suites.cache import content_key
from suites.descriptors import cls_and_gem
from suites.extractor import Extractor
from suites.interval import mean_interval
from suites.places import ImageFiles, find_benchmark, image_files, images_below
from suites.protocols.protocol import Context, Outcome, ProtocolParameters
from suites.ranking import average_precision
from suites.suite import SuiteDataset
from suites.whitening import fit_whitening

NEEDS_LABELS = False
READS_IMAGES = True
NUM_NAMING = 4
"""Characters of a file name that say which picture it is."""


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    image_size: int = Field(default=320, ge=1)
    """Side of the square, pixels."""
    gem_power: float = Field(default=4.0, gt=0)
    num_distractors: int = Field(default=10000, ge=0)
    num_whitening: int = Field(default=20000, ge=0)
    """Images from which the whitening is computed; 0 = no whitening."""
    depth: int = Field(default=20, ge=1)
    """Answers per picture that count."""
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


@dataclass(frozen=True)
class CopyData:
    """Copydays with distractors and whitening images."""

    name: str
    roles: dict[str, ImageFiles]
    """original, strong, and distractors and whitening where the suite has them."""

    @property
    def fingerprint(self) -> str:
        """Hash of all images."""
        return content_key(**{role: images.fingerprint for role, images in self.roles.items()})

    def receipt(self) -> dict[str, dict[str, Any]]:
        """By role: name, split, n, fingerprint."""
        return {role: images.receipt() for role, images in self.roles.items()}


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> CopyData:
    """The images of all roles.

    Raises:
        DinobenchError: a folder is missing or holds fewer images than the suite pins.
    """
    name, path = find_benchmark(dataset.name, data, "the folders original/ and strong/ of Copydays")
    store = open_store(path)
    wanted = {"original": None, "strong": None}
    wanted |= {"distractors": parameters.num_distractors, "whitening": parameters.num_whitening}
    roles = {}
    for role, number in wanted.items():
        if number == 0:
            continue
        files = images_below(store, role)
        if len(files) < (number or 1):
            raise DinobenchError(
                f"{path}/{role} holds {len(files)} images, this suite needs {number or 'some'}: add them, or measure "
                f"with a copy of the definition that sets {'num_' + role if number else 'other data'} (another number)"
            )
        roles[role] = image_files(store, files[:number], path, name, role)
    return CopyData(name, roles)


def run(data: CopyData, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Search every altered picture among originals and distractors."""
    prepare = partial(_prepare, parameters=parameters)
    describe = partial(cls_and_gem, power=parameters.gem_power)
    made_by = {
        "descriptor": "cls_and_gem",
        **parameters.model_dump(mode="json", include={"image_size", "gem_power", "mean", "std"}),
    }
    found = {role: extractor.describe(images, prepare, describe, **made_by) for role, images in data.roles.items()}
    database = torch.cat([found[role] for role in ("original", "distractors") if role in found])
    queries = found["strong"]
    if "whitening" in found:
        whiten = fit_whitening(found["whitening"])
        database, queries = whiten(database), whiten(queries)
    answers = best_answers(database, queries, parameters.depth)
    originals, pictures = (names_of(data.roles[role]) for role in ("original", "strong"))
    values = 100 * score_answers(answers, originals, pictures)
    samples = pd.DataFrame({"index": np.arange(len(pictures)), "query": pictures, "ap": values})
    notes = [f"{len(pictures)} altered pictures among {len(originals)} originals and {len(database)} images in all"]
    if "whitening" not in found:
        notes.append("without whitening")
    interval = mean_interval(values, seed=context.seed)
    return Outcome({"map": float(values.mean())}, len(values), interval, samples, notes=notes)


def best_answers(database: Tensor, queries: Tensor, depth: int) -> NDArray[np.int64]:
    """The `depth` most similar rows of database [N, D] for queries [Q, D], best first: [Q, min(depth, N)]."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    return torch.sort(similarity, dim=1, descending=True, stable=True).indices[:, :depth].numpy()


def score_answers(answers: NDArray[np.int64], originals: list[str], pictures: list[str]) -> NDArray[np.float64]:
    """Average precision [Q] of answers [Q, depth], numbers into a database that begins with the originals.

    Raises:
        DinobenchError: a picture has no original.
    """
    values = np.zeros(len(pictures))
    for number, picture in enumerate(pictures):
        positives = [i for i, original in enumerate(originals) if original[:NUM_NAMING] == picture[:NUM_NAMING]]
        if not positives:
            raise DinobenchError(
                f"no original begins like {picture} ({picture[:NUM_NAMING]}...): expected the file names of Copydays"
            )
        values[number] = average_precision(np.flatnonzero(np.isin(answers[number], positives)), len(positives))
    return values


def names_of(images: ImageFiles) -> list[str]:
    """File names without folder and suffix."""
    return [PurePosixPath(images.source.path(number)).stem for number in range(len(images))]


def _prepare(image: Image.Image, parameters: Parameters) -> Tensor:
    transform = EvalTransform(resize=None, crop=None, mean=parameters.mean, std=parameters.std)
    side = parameters.image_size
    return transform(image.resize((side, side), Image.Resampling.BICUBIC))
