"""Two labelled splits of a data set, for the protocols that train on its images themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pretrain.data.datasets import open_dataset
from pretrain.data.images import ImageSet
from pretrain.errors import DinobenchError, UsageError
from suites.cache import content_key
from suites.suite import SuiteDataset


@dataclass(frozen=True)
class LabelledData:
    """Images with one label each: `train` to learn from, `test` to score."""

    train: ImageSet
    test: ImageSet

    @property
    def name(self) -> str:
        return self.train.name

    @property
    def fingerprint(self) -> str:
        """Hash of the images and labels of both splits."""
        return content_key(train=self.train.fingerprint, test=self.test.fingerprint)

    @property
    def num_classes(self) -> int:
        assert self.train.labels is not None and self.test.labels is not None
        largest = max(int(images.labels.max()) for images in (self.train, self.test) if images.labels is not None)
        return max(len(self.train.classes), largest + 1)

    def receipt(self) -> dict[str, dict[str, Any]]:
        """By role: name, split, n, fingerprint."""
        return {
            role: {"name": images.name, "split": images.split, "n": len(images), "fingerprint": images.fingerprint}
            for role, images in (("train", self.train), ("test", self.test))
        }


def open_labelled(dataset: SuiteDataset, data: str | None) -> LabelledData:
    """The splits of the suite's data set, or of `data` with the suite's splits.

    Raises:
        UsageError: neither names a data set.
        DinobenchError: labels are missing, several per image, all the same, or not the same in both splits.
    """
    name = data or dataset.name
    if name is None or name.endswith(":"):
        raise UsageError(f"this suite does not know where its images are: add --data {name or 'folder:'}/path")
    opened = LabelledData(*(open_dataset(name, split=split) for split in (dataset.train, dataset.test)))
    check_labelled(opened)
    return opened


def check_labelled(data: LabelledData) -> None:
    """Refuse labels with which a classifier would learn nothing, or something else than is scored.

    Raises:
        DinobenchError: as of `open_labelled`.
    """
    for images in (data.train, data.test):
        if images.labels is None:
            raise DinobenchError(
                f"this suite trains a classifier, but {images.name} {images.split} has no labels: sort the images "
                "into one folder per class"
            )
        if images.labels.ndim != 1:
            raise DinobenchError(
                f"this suite expects one label per image, but those of {images.name} {images.split} may have several: "
                "use a suite made for this data set"
            )
    if tuple(data.train.classes) != tuple(data.test.classes):
        odd = sorted(set(data.train.classes) ^ set(data.test.classes))[:5]
        raise DinobenchError(
            f"{data.name}: the classes of {data.train.split} ({len(data.train.classes)}) and {data.test.split} "
            f"({len(data.test.classes)}) differ, for example {', '.join(map(repr, odd))}, so labels do not mean the "
            "same: give both the same folders"
        )
    assert data.train.labels is not None
    if len(data.train.labels.unique()) < 2:
        raise DinobenchError(
            f"this suite needs at least two classes, but {data.name} {data.train.split} has one: every classifier "
            "would be right"
        )
