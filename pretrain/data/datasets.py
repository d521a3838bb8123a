"""Datasets by name or URI: images, labels, split and content fingerprint.

    digits                      scikit-learn's bundled handwritten digits: needs no download
    fashion_mnist, cifar10      under the data root, the folder named by the environment variable DINOBENCH_DATA
    cifar100, flowers102, ...   the same, as torchvision lays them out (pretrain.data.torchvision_sets)
    imagenet:/path              folders train/ and val/ with one folder per class
    folder:/path                images in a folder or a .tar, .tar.gz or .zip: <split>/<class>/..., <class>/..., or flat
    wds:/path/{000..146}.tar    tar shards in WebDataset's naming, 0001.jpg with label 0001.cls, or a folder of shards;
                                in a shell the braces need quotes
    npz:/path                   arrays `images` and `labels`, or `train_images`, `train_labels`, `test_images`, ...

Every set has the splits listed for it, and parts of them: "train[:0.8]" and "train[0.8:]" are disjoint, stratified by
label and fixed, so that a recipe can be tuned without a look at the test split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pretrain.data import embedded, folders, shards, torchvision_sets
from pretrain.data.images import ImageSet
from pretrain.errors import DinobenchError, UsageError, unknown_name

DATA_ROOT_VARIABLE = "DINOBENCH_DATA"
MAX_BAD_IMAGES = 0.01


class DataConfig(BaseModel):
    """The images to pretrain on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "digits"
    """Name or URI of a dataset."""
    split: str = "train"
    """A split, or a part of one such as "train[:0.8]"."""
    resize: int | None = Field(default=None, ge=1)
    """Short side (pixels) to which images are brought before the views are cut; None leaves them as they are."""
    max_bad_images: float = Field(default=MAX_BAD_IMAGES, ge=0, le=1)
    """Share of unreadable images up to which a set is accepted."""
    cache: Literal["auto", "device", "none"] = "auto"
    """Which sets lie on the training device as uint8: of `auto` those of one image size that decode to 2 GiB or less,
    with `device` any set, which is refused where it does not fit. Changes no view and no run's identity."""

    @property
    def label(self) -> str:
        """Short name without path, fit for file names."""
        return dataset_label(self.name)

    def open(self, *, root: Path | None = None) -> ImageSet:
        """The images, resized."""
        images = open_dataset(self.name, self.split, root=root, max_bad_images=self.max_bad_images)
        return images if self.resize is None else images.resized(self.resize)


@dataclass(frozen=True)
class DatasetInfo:
    """A line of the dataset catalogue."""

    name: str
    description: str
    splits: tuple[str, ...]
    available: bool
    where: str
    """Where it was found, or what to put where."""


@dataclass(frozen=True)
class _Entry:
    """A named dataset: how it is opened (split, data root or None -> images) and where it is looked for."""

    description: str
    splits: tuple[str, ...]
    open: Callable[[str, Path | None], ImageSet]
    find: Callable[[Path | None], Path | None]
    needs: str


_NAMED = {
    "digits": _Entry(
        "1,797 handwritten digits, 8 x 8 gray, 10 classes (scikit-learn's bundled copy)",
        ("train", "test"),
        embedded.open_digits,
        lambda root: Path("scikit-learn"),
        "nothing: it comes with scikit-learn",
    ),
    "fashion_mnist": _Entry(
        "70,000 articles of clothing, 28 x 28 gray, 10 classes",
        ("train", "test"),
        embedded.open_fashion_mnist,
        embedded.find_fashion_mnist,
        embedded.FASHION_MNIST_NEEDS,
    ),
    "cifar10": _Entry(
        "60,000 photographs, 32 x 32 colour, 10 classes",
        ("train", "test"),
        embedded.open_cifar10,
        embedded.find_cifar10,
        embedded.CIFAR10_NEEDS,
    ),
} | {
    name: _Entry(
        entry.description,
        entry.splits,
        partial(torchvision_sets.open_set, name),
        partial(torchvision_sets.find, name),
        entry.needs,
    )
    for name, entry in torchvision_sets.SETS.items()
}
_URIS = {
    "imagenet": ("ImageNet-1k: folders train/ and val/ with one folder per class", ("train", "val"), "imagenet:/path"),
    "folder": ("images in a folder or archive, with or without classes and splits", ("train", "val"), "folder:/path"),
    "wds": (
        "tar shards in WebDataset's naming: 0001.jpg with 0001.cls, or a folder of them",
        ("train", "val", "test"),
        "wds:/path/{000..146}.tar",
    ),
    "npz": ("images and labels in a NumPy archive", ("train", "val", "test"), "npz:/path"),
}


def data_root() -> Path | None:
    """The folder of the datasets, if the environment names one."""
    value = os.environ.get(DATA_ROOT_VARIABLE)
    return Path(value).expanduser() if value else None


def dataset_names(root: Path | None = None) -> list[DatasetInfo]:
    """The catalogue, with what is available here."""
    root = root or data_root()
    infos = []
    for name, entry in _NAMED.items():
        found = entry.find(root)
        infos.append(DatasetInfo(name, entry.description, entry.splits, found is not None, str(found or entry.needs)))
    for description, splits, pattern in _URIS.values():
        infos.append(DatasetInfo(pattern, description, splits, True, "the path in the name"))
    return infos


def dataset_label(name_or_uri: str) -> str:
    """Short name of a dataset, fit for file names: `cifar10`, `imagenet`, `folder-hymenoptera160`, `wds-train`."""
    scheme, colon, path = name_or_uri.partition(":")
    if not colon or scheme == "imagenet":
        return scheme
    stem = re.sub(r"(\.tar)?\.\w{2,4}$", "", Path(path).name)
    if scheme == "wds":
        stem = re.sub(r"[-_.]*[{*?].*", "", stem)
    return f"{scheme}-{re.sub(r'[^A-Za-z0-9._-]+', '_', stem) or 'data'}"


def open_dataset(
    name_or_uri: str,
    split: str = "train",
    *,
    root: Path | None = None,
    max_bad_images: float = MAX_BAD_IMAGES,
) -> ImageSet:
    """Opens a dataset.

    Args:
        name_or_uri: As listed in the module's docstring.
        split: A split of the set, or a part of it: "train[:0.8]".
        root: The data root; default: the environment variable DINOBENCH_DATA.
        max_bad_images: Share of unreadable image files up to which the set is accepted.
    """
    whole, start, stop = _parse_split(split)
    scheme, colon, path = name_or_uri.partition(":")
    if colon and scheme in _URIS:
        images = _open_uri(scheme, path, whole, dataset_label(name_or_uri))
    elif name_or_uri in _NAMED:
        entry = _NAMED[name_or_uri]
        if whole not in entry.splits:
            raise unknown_name(f"split of {name_or_uri}", whole, entry.splits)
        images = entry.open(whole, root or data_root())
    else:
        raise unknown_name("dataset", name_or_uri, [*_NAMED, *(pattern for _, _, pattern in _URIS.values())])
    images = images.checked(max_bad_images)
    if len(images) == 0:
        raise DinobenchError(f"{name_or_uri} has no images in its split {whole!r}")
    if (start, stop) == (0.0, 1.0):
        return images
    part = _part(images, start, stop, split)
    if len(part) == 0:
        raise DinobenchError(f"{name_or_uri} has {len(images)} images in {whole!r}, too few for the part {split!r}")
    return part


def _open_uri(scheme: str, path: str, split: str, label: str) -> ImageSet:
    if not path:
        raise UsageError(f"{scheme}: names no path; expected {_URIS[scheme][2]}")
    if scheme == "wds":
        return shards.open_shards(path, split, label)
    location = Path(path).expanduser()
    if scheme == "npz":
        return folders.open_npz(location, split, label)
    return folders.open_folder(location, split, label, needs_splits=scheme == "imagenet")


def _parse_split(split: str) -> tuple[str, float, float]:
    """'train[0.8:]' -> ('train', 0.8, 1.0)."""
    match = re.fullmatch(r"(\w+)(?:\[(\d*\.?\d*):(\d*\.?\d*)\])?", split)
    start, stop = 0.0, 1.0
    if match:
        start, stop = float(match[2] or 0), float(match[3] or 1)
    if not match or not 0 <= start < stop <= 1:
        raise UsageError(f"cannot read the split {split!r}: expected a name, or a part such as 'train[:0.8]'")
    return match[1], start, stop


def _part(images: ImageSet, start: float, stop: float, split: str) -> ImageSet:
    """The part [start, stop) of each class, in a fixed random order of its images."""
    labels = torch.zeros(len(images), dtype=torch.int64) if images.labels is None else images.labels
    # RandomState: numpy promises that its stream never changes.
    random = np.random.RandomState(0)
    kept: list[Tensor] = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.from_numpy(random.permutation(len(members)))]
        kept.append(members[round(start * len(members)) : round(stop * len(members))])
    return images.subset(torch.cat(kept).sort().values, split=split)
