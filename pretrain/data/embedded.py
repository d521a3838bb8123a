"""The named datasets: digits (bundled with scikit-learn), Fashion-MNIST and CIFAR-10 (under the data root).

CIFAR-10's Python version consists of pickles, which can run code when read; it is not supported. The binary version is,
and so is a pack of JPEG files, whose pixels differ: it calls itself `cifar10-jpeg` in every receipt.
"""

from __future__ import annotations

import gzip
import math
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.folders import open_folder
from pretrain.data.images import ArraySource, ImageSet, array_fingerprint
from pretrain.errors import DinobenchError

FASHION_MNIST_NEEDS = (
    "the four files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz in DINOBENCH_DATA/fashion-mnist "
    "(or torchvision's FashionMNIST/raw)"
)
CIFAR10_NEEDS = (
    "the folder cifar-10-batches-bin (or cifar-10-binary.tar.gz) in DINOBENCH_DATA, "
    "or JPEG files as cifar10-jpeg/cifar10_jpeg.tar.gz"
)
_DIGITS_TEST_IMAGES = 500
_FASHION_FOLDERS = ("fashion-mnist", "FashionMNIST/raw")
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_MAX_IDX_BYTES = 256 << 20
"""Unpacked; the images of Fashion-MNIST have 45 MiB."""
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_RECORD = 1 + 3 * 32 * 32
"""Bytes of an image in the binary version: label, then the red, green and blue planes."""


def _in_memory(name: str, split: str, pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> ImageSet:
    fingerprint = array_fingerprint(pixels, labels)
    return ImageSet(name, split, fingerprint, ArraySource(pixels), labels=labels, classes=classes)


def open_digits(split: str, root: Path | None) -> ImageSet:
    """scikit-learn's digits: 1297 train and 500 test images in a fixed stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    numbers = np.arange(len(digits.target))
    train, test = train_test_split(numbers, test_size=_DIGITS_TEST_IMAGES, stratify=digits.target, random_state=0)
    chosen = train if split == "train" else test
    # Values are 0 .. 16.
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target[chosen].astype(np.int64))
    return _in_memory("digits", split, torch.from_numpy(pixels)[:, None], labels, tuple("0123456789"))


def _missing(name: str, needs: str, root: Path | None) -> DinobenchError:
    where = f"not found under DINOBENCH_DATA={root}" if root else "no data root: set DINOBENCH_DATA to a folder"
    return DinobenchError(f"{name}: {where}. It needs {needs}.")


def find_fashion_mnist(root: Path | None) -> Path | None:
    """The folder with the idx files."""
    for folder in _FASHION_FOLDERS if root else ():
        assert root is not None
        if _idx_path(root / folder, "train-images-idx3-ubyte"):
            return root / folder
    return None


def _idx_path(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format (LeCun, MNIST page), gzipped or not."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_IDX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DinobenchError(f"cannot read {path} ({error}): is the download complete?") from error
    if len(content) > _MAX_IDX_BYTES:
        raise DinobenchError(f"{path} has more than {_MAX_IDX_BYTES >> 20} MiB: this is no MNIST")
    # Two zero bytes, the type (8 = unsigned byte), the number of axes, then their lengths.
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DinobenchError(f"{path} is not an idx file of bytes")
    num_axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(num_axes)]
    values = np.frombuffer(content, np.uint8, offset=min(4 + 4 * num_axes, len(content)))
    if values.size != math.prod(shape) or not 1 <= num_axes <= 3:
        raise DinobenchError(f"{path} announces {shape} values but holds {values.size}: is the download complete?")
    return values.reshape(shape)


def open_fashion_mnist(split: str, root: Path | None) -> ImageSet:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 train and 10,000 test images."""
    folder = find_fashion_mnist(root)
    if folder is None:
        raise _missing("fashion_mnist", FASHION_MNIST_NEEDS, root)
    stem = "train" if split == "train" else "t10k"
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        path = _idx_path(folder, f"{stem}-{kind}-ubyte")
        if path is None:
            raise _missing("fashion_mnist", f"{stem}-{kind}-ubyte.gz in {folder}", root)
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DinobenchError(f"{folder}: images {images.shape} and labels {labels.shape} of {split} do not match")
    pixels, targets = torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))
    return _in_memory("fashion_mnist", split, pixels, targets, _FASHION_CLASSES)


def _cifar10_places(root: Path) -> tuple[list[Path], list[Path]]:
    """Where the binary version and the JPEG pack may lie."""
    folders = [root, root / "cifar10", root / "cifar-10"]
    binary = [f / name for f in folders for name in ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")]
    return binary, [root / "cifar10-jpeg" / "cifar10_jpeg.tar.gz", root / "cifar10-jpeg"]


def find_cifar10(root: Path | None) -> Path | None:
    """The binary version if there is one, else the JPEG pack."""
    if root is None:
        return None
    binary, jpeg = _cifar10_places(root)
    return next((p for p in (*binary, *jpeg) if p.exists()), None)


def open_cifar10(split: str, root: Path | None) -> ImageSet:
    """CIFAR-10 (Krizhevsky 2009): 50,000 train and 10,000 test images, from the binary version or the JPEG pack."""
    found = find_cifar10(root)
    if found is None or root is None:
        pickles = root is not None and (root / "cifar-10-batches-py").exists()
        raise _missing(
            "cifar10", CIFAR10_NEEDS + ". cifar-10-batches-py holds pickles, which are not read" * pickles, root
        )
    if found in _cifar10_places(root)[1]:
        images = open_folder(found, split, "cifar10-jpeg")
        if images.classes != _CIFAR10_CLASSES:
            raise DinobenchError(f"{found}: expected the folders {_CIFAR10_CLASSES}, found {images.classes}")
        return images
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
    records = np.concatenate([_cifar10_batch(found, name) for name in names])
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return _in_memory("cifar10", split, pixels, labels, _CIFAR10_CLASSES)


def _cifar10_batch(place: Path, name: str) -> np.ndarray:
    """One file of the binary version, from its folder or its archive: uint8 [n, 3073]."""
    try:
        if place.is_dir():
            content = (place / name).read_bytes()
        else:
            with tarfile.open(place) as archive:
                file = archive.extractfile(f"cifar-10-batches-bin/{name}")
                content = file.read() if file else b""
    except (OSError, EOFError, KeyError, zlib.error, tarfile.TarError) as error:
        raise DinobenchError(f"cannot read {name} in {place} ({error}): is the download complete?") from error
    if not content or len(content) % _CIFAR10_RECORD:
        raise DinobenchError(
            f"{name} in {place} holds {len(content)} bytes, expected a multiple of {_CIFAR10_RECORD}: "
            f"is the download complete?"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR10_RECORD)
    if records[:, 0].max() >= len(_CIFAR10_CLASSES):
        raise DinobenchError(f"{name} in {place} is not a file of CIFAR-10's binary version: labels above 9")
    return records
