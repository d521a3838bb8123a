"""Small labelled datasets under torchvision's names, opened by torchvision's own classes from the data root.

A set lies under the data root as torchvision's download leaves it; nothing is downloaded. Lists and annotations are
read at opening, images when they are needed. Splits are the official ones; `trainval` is train and val together. DTD
has ten partitions: the first. Caltech-101 has no official split: 30 images per class, drawn once and for all, are
train and the rest test (101 classes: torchvision leaves BACKGROUND_Google out). torchvision knows no split of SUN397:
the first of the authors' partitions. VOC 2007 has several classes per image, see pretrain.data.multi_label.

CIFAR-100 consists of pickles, which can run code when read: torchvision reads them only after it has found their MD5
to be that of the official files. The lists of Flowers102 are compared in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from pretrain.data.folders import files_fingerprint
from pretrain.data.images import ArraySource, FileSource, ImageSet, array_fingerprint
from pretrain.data.multi_label import VOC_CLASSES, MultiLabelSet, read_presence
from pretrain.data.stores import FolderStore
from pretrain.errors import DinobenchError

CALTECH101_TRAIN_IMAGES = 30
"""Per class (Fei-Fei, Fergus, Perona 2004; Kornblith et al. 2019)."""


class Listing(NamedTuple):
    """The images of a split: paths, targets (labels [N], or presence [N, C]) and classes."""

    paths: list[str]
    targets: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class TorchvisionSet:
    """A line of the catalogue."""

    description: str
    splits: tuple[str, ...]
    read: Callable[[str, str], Listing | ImageSet]
    """(data root, split) -> the images and what they show."""
    images: str
    """Folder of the images below the data root."""
    files: tuple[str, ...]
    """What else must be there, below the data root."""
    source: str
    """Where these come from."""

    @property
    def needs(self) -> str:
        """What to put where."""
        return f"{', '.join(self.parts)} in DINOBENCH_DATA ({self.source})"

    @property
    def parts(self) -> tuple[str, ...]:
        """What must be there, below the data root."""
        parts = (self.images, *self.files)
        return tuple(part for part in parts if not any(other.startswith(f"{part}/") for other in parts))

    def missing(self, root: Path) -> list[str]:
        """What is not there."""
        return [part for part in self.parts if not (root / part).exists()]


def find(name: str, root: Path | None) -> Path | None:
    """The folder of a set's images, if all that it needs is there."""
    entry = SETS[name]
    return root / entry.images if root and not entry.missing(root) else None


def open_set(name: str, split: str, root: Path | None) -> ImageSet:
    """A split of a set.

    Raises:
        DinobenchError: something of the set is missing or damaged; the message says what it needs.
    """
    entry = SETS[name]
    if root is None:
        raise DinobenchError(f"{name}: no data root: set DINOBENCH_DATA to a folder. It needs {entry.needs}.")
    missing = entry.missing(root)
    if missing:
        some = f": no {', '.join(missing)}" if any((root / part).exists() for part in entry.parts) else ""
        raise DinobenchError(f"{name}: not found under DINOBENCH_DATA={root}{some}. It needs {entry.needs}.")
    try:
        found = entry.read(str(root), split)
    # Damaged lists make torchvision and the readers of .mat, .xml and .json raise errors of every kind.
    except Exception as error:
        raise DinobenchError(
            f"{name}: torchvision cannot read {split} under {root} ({type(error).__name__}: {error}): is the download "
            f"complete and are its lists the originals? It needs {entry.needs}."
        ) from error
    return found if isinstance(found, ImageSet) else _file_set(name, split, root / entry.images, found)


def _file_set(name: str, split: str, folder: Path, listing: Listing) -> ImageSet:
    """The images of a listing, which must all be there."""
    store = FolderStore(folder)
    names = [PurePath(path).relative_to(folder).as_posix() for path in listing.paths]
    missing = [file for file in names if file not in store.sizes]
    if missing or not names:
        first = f" (first: {missing[0]})" if missing else ""
        raise DinobenchError(
            f"{name}: {folder} lacks {len(missing)} of the {len(names)} images of {split}{first}: "
            "is the download complete?"
        )
    digest = hashlib.sha256(files_fingerprint(store, names, names).encode())
    digest.update(listing.targets.numpy().astype("<i8").tobytes())
    source, fingerprint = FileSource(store, names, str(folder)), digest.hexdigest()
    if listing.targets.ndim == 2:
        plain = ImageSet(name, split, fingerprint, source, classes=listing.classes)
        return MultiLabelSet.of(plain, listing.targets)
    return ImageSet(name, split, fingerprint, source, labels=listing.targets, classes=listing.classes)


def _listing(*parts: Any) -> Listing:
    """Of torchvision sets made with `loader=str`, whose items are (path, label): no image is decoded."""
    classes = {tuple(part.classes) for part in parts}
    if len(classes) != 1:
        raise ValueError("train and val have different classes")
    items = [part[number] for part in parts for number in range(len(part))]
    labels = torch.tensor([int(label) for _, label in items], dtype=torch.int64)
    return Listing([path for path, _ in items], labels, classes.pop())


def _train_and_val(split: str) -> list[str]:
    """The splits of which torchvision has no union."""
    return ["train", "val"] if split == "trainval" else [split]


def _cifar100(root: str, split: str) -> ImageSet:
    data = datasets.CIFAR100(root, train=split == "train")
    pixels = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    labels = torch.tensor(data.targets, dtype=torch.int64)
    fingerprint = array_fingerprint(pixels, labels)
    return ImageSet("cifar100", split, fingerprint, ArraySource(pixels), labels=labels, classes=tuple(data.classes))


def _flowers102(root: str, split: str) -> Listing:
    return _listing(*(datasets.Flowers102(root, part, loader=str) for part in _train_and_val(split)))


def _oxford_iiit_pet(root: str, split: str) -> Listing:
    # The one class that takes no loader: its items would decode every image.
    data: Any = datasets.OxfordIIITPet(root, split)
    labels = torch.tensor(data._labels, dtype=torch.int64)
    return Listing([str(path) for path in data._images], labels, tuple(data.classes))


def _dtd(root: str, split: str) -> Listing:
    return _listing(*(datasets.DTD(root, part, partition=1, loader=str) for part in _train_and_val(split)))


def _fgvc_aircraft(root: str, split: str) -> Listing:
    return _listing(datasets.FGVCAircraft(root, split, annotation_level="variant", loader=str))


def _stanford_cars(root: str, split: str) -> Listing:
    return _listing(datasets.StanfordCars(root, split, loader=str))


def _food101(root: str, split: str) -> Listing:
    return _listing(datasets.Food101(root, split, loader=str))


def _caltech101(root: str, split: str) -> Listing:
    data = datasets.Caltech101(root)
    labels = torch.tensor(data.y, dtype=torch.int64)
    chosen = draw_per_class(labels, CALTECH101_TRAIN_IMAGES)
    rows = (chosen if split == "train" else ~chosen).nonzero().flatten().tolist()
    folder = Path(root) / SETS["caltech101"].images
    paths = [str(folder / data.categories[data.y[row]] / f"image_{data.index[row]:04d}.jpg") for row in rows]
    return Listing(paths, labels[rows], tuple(data.categories))


def draw_per_class(labels: Tensor, count: int) -> Tensor:
    """Which of the images [N] with labels [N] are among `count` of each class, always the same ones: bool [N].

    Raises:
        DinobenchError: a class has no more than `count` images.
    """
    random = np.random.RandomState(0)  # numpy promises that its stream never changes
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) <= count:
            raise DinobenchError(f"class {int(label)} has {len(members)} images: expected more than {count} of each")
        chosen[members[torch.from_numpy(random.permutation(len(members)))][:count]] = True
    return chosen


def _sun397(root: str, split: str) -> Listing:
    data = datasets.SUN397(root, loader=str)
    folder = Path(root) / SETS["sun397"].images
    lines = (folder / _SUN397_LISTS[split]).read_text().split()
    # "/a/apartment_building/outdoor/sun_x.jpg" shows apartment_building/outdoor.
    labels = [data.class_to_idx["/".join(PurePath(line.lstrip("/")).parts[1:-1])] for line in lines]
    return Listing([str(folder / line.lstrip("/")) for line in lines], torch.tensor(labels), tuple(data.classes))


def _voc2007(root: str, split: str) -> Listing:
    data = datasets.VOCDetection(root, year="2007", image_set=split)
    return Listing(data.images, torch.tensor([read_presence(path) for path in data.annotations]), VOC_CLASSES)


_SUN397_LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}
_VOC, _VOC_SPLITS = "VOCdevkit/VOC2007", ("train", "val", "trainval", "test")
_CARS = ("cars_train", "cars_test", "cars_test_annos_withlabels.mat")
_CARS_DEVKIT = ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat")
SETS = {
    "cifar100": TorchvisionSet(
        "60,000 photographs, 32 x 32 colour, 100 classes",
        ("train", "test"),
        _cifar100,
        "cifar-100-python",
        tuple(f"cifar-100-python/{part}" for part in ("train", "test", "meta")),
        "cifar-100-python.tar.gz, unpacked",
    ),
    "flowers102": TorchvisionSet(
        "Oxford Flowers: 8,189 photographs, 102 classes",
        ("train", "val", "trainval", "test"),
        _flowers102,
        "flowers-102/jpg",
        ("flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        "102flowers.tgz, unpacked, and the two lists beside it",
    ),
    "oxford_iiit_pet": TorchvisionSet(
        "Oxford-IIIT Pets: 7,349 photographs, 37 breeds",
        ("trainval", "test"),
        _oxford_iiit_pet,
        "oxford-iiit-pet/images",
        ("oxford-iiit-pet/annotations/trainval.txt", "oxford-iiit-pet/annotations/test.txt"),
        "images.tar.gz and annotations.tar.gz, unpacked",
    ),
    "dtd": TorchvisionSet(
        "Describable Textures: 5,640 photographs, 47 classes; first partition",
        ("train", "val", "trainval", "test"),
        _dtd,
        "dtd/dtd/images",
        tuple(f"dtd/dtd/labels/{part}1.txt" for part in ("train", "val", "test")),
        "dtd-r1.0.1.tar.gz, unpacked in dtd/",
    ),
    "fgvc_aircraft": TorchvisionSet(
        "FGVC Aircraft: 10,000 photographs, 100 variants",
        ("train", "val", "trainval", "test"),
        _fgvc_aircraft,
        "fgvc-aircraft-2013b/data/images",
        ("fgvc-aircraft-2013b/data/variants.txt",),
        "fgvc-aircraft-2013b.tar.gz, unpacked",
    ),
    "stanford_cars": TorchvisionSet(
        "Stanford Cars: 16,185 photographs, 196 models",
        ("train", "test"),
        _stanford_cars,
        "stanford_cars",
        tuple(f"stanford_cars/{part}" for part in (*_CARS, *_CARS_DEVKIT)),
        "cars_train.tgz, cars_test.tgz and car_devkit.tgz, unpacked, and the labels of test",
    ),
    "food101": TorchvisionSet(
        "Food-101: 101,000 photographs, 101 dishes",
        ("train", "test"),
        _food101,
        "food-101/images",
        ("food-101/meta/train.json", "food-101/meta/test.json"),
        "food-101.tar.gz, unpacked",
    ),
    "caltech101": TorchvisionSet(
        "Caltech-101: 8,677 photographs, 101 classes; 30 per class are train",
        ("train", "test"),
        _caltech101,
        "caltech101/101_ObjectCategories",
        ("caltech101/101_ObjectCategories/BACKGROUND_Google",),
        "101_ObjectCategories.tar.gz, unpacked in caltech101/",
    ),
    "sun397": TorchvisionSet(
        "SUN397: 39,700 of 108,754 photographs, 397 scenes; first partition",
        ("train", "test"),
        _sun397,
        "SUN397",
        ("SUN397/ClassName.txt", *(f"SUN397/{file}" for file in _SUN397_LISTS.values())),
        "SUN397.tar.gz, unpacked, and in it the lists of Partitions.zip, which torchvision does not fetch",
    ),
    "voc2007": TorchvisionSet(
        "Pascal VOC 2007: 9,963 photographs, 20 classes, several per image",
        _VOC_SPLITS,
        _voc2007,
        f"{_VOC}/JPEGImages",
        tuple(f"{_VOC}/{part}" for part in ("Annotations", *(f"ImageSets/Main/{part}.txt" for part in _VOC_SPLITS))),
        "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar, unpacked",
    ),
}
