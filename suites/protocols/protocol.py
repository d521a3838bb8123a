"""What a protocol takes and gives.

A protocol is a file of this folder with three names: `Parameters` (its pinned numbers), `NEEDS_LABELS`, and
`run(train, test, parameters, context) -> Outcome`. The file name is the protocol's name; nothing is registered.
A protocol reads features and returns named scores; extracting, caching, tracking and printing happen elsewhere.

Features come in float32 and in memory. A protocol that sets `STREAMS = True` gets those of a large set as they are
kept, float16 and mapped into memory, and brings to float32 what it takes of them, block by block (`Split.take`).

A benchmark that is more than labelled images (queries and a database, images at several sizes, videos) has a protocol
that sets `READS_IMAGES = True`. It has `open_data(dataset, data, parameters) -> BenchmarkData` and
`run(data, extractor, parameters, context) -> Outcome` with a suites.extractor.Extractor, which applies the frozen
network and caches; its Parameters pin the transform too, so a suite's own `transform` and `feature` do not apply. It
may have `pixel_scores(data, parameters, context)` for the baseline raw_pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from suites.neighbours import Backend

if TYPE_CHECKING:
    from pretrain.data.images import ImageSet
    from pretrain.data.transforms import EvalTransform
    from pretrain.models.checkpoint import LoadedModel


class ProtocolParameters(BaseModel):
    """Base of every protocol's Parameters: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Split:
    """Features of one split of a labelled data set."""

    features: Tensor
    """[N, D] float32 (or float16, see the module), as the backbone gave them (protocols normalise)."""
    labels: Tensor
    """[N] int64; empty when the data set has no labels."""
    index: Tensor
    """[N] int64: number of the image in its data set."""
    path: Callable[[int], str] | None = None
    """Path of the image of a row, where the data set has files."""

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Tensor | slice, device: str | torch.device = "cpu") -> Tensor:
        """The features of these rows [n, D] on the device, in float32 where they are kept in float16."""
        x = self.features[rows].to(device)
        return x.float() if x.dtype == torch.float16 else x


@dataclass(frozen=True)
class Context:
    """What a protocol may know beside features and parameters."""

    num_classes: int
    classes: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    backend: Backend = "auto"
    model: LoadedModel | None = None
    """The network that made the features; None for a baseline without one (raw pixels, PCA)."""
    train_images: ImageSet | None = None
    """The images of train, for a protocol that needs other features of a few of them (patch tokens)."""
    transform: EvalTransform | None = None
    """What was done to them."""


@dataclass
class Outcome:
    """What a protocol found. Accuracies are in percent."""

    scores: dict[str, float]
    n: int
    """Number of images behind the headline score."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the headline score over images."""
    samples: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Per test image: index, label, prediction, correct."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences a reader of the scores must know, for example what is not applicable and why."""


class BenchmarkData(Protocol):
    """The opened files of a benchmark, for a protocol that reads images."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Hash of the files and of everything that says what they mean."""
        ...

    def receipt(self) -> dict[str, dict[str, Any]]:
        """By role: name, split, n, fingerprint."""
        ...


def sample_table(split: Split, prediction: Tensor, correct: Tensor, **more: Tensor) -> pd.DataFrame:
    """The per-image table of an outcome: index, label, prediction, correct and more columns [N]."""
    columns = {"index": split.index, "label": split.labels, "prediction": prediction, "correct": correct, **more}
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
