"""Images with a class for every pixel: semantic segmentation, read from a folder or an archive without unpacking it.

                      images             label maps                list of names
    CamVid (SegNet)   <split>/X.jpg      <split>annot/X.png
    ADE20k            images/<split>/    annotations/<split>/
    Pascal VOC 2012   JPEGImages/        SegmentationClass/        ImageSets/Segmentation/<split>.txt

An image and its map have one name and one size. A map is a PNG of one channel (or a palette, whose numbers count):
`first_label` is class 0, `ignored` marks pixels that are not judged; any other number is an error. One folder around
everything is looked through. Shapes: H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.data.folders import IMAGE_SUFFIXES, files_fingerprint
from pretrain.data.images import FileSource
from pretrain.data.stores import Store, open_store
from pretrain.errors import DinobenchError
from suites.cache import content_key
from suites.places import ImageFiles

IGNORED = 255
"""What pixels that are not judged are called here, whatever their number in the file."""


class MapLayout(BaseModel):
    """Where images and maps lie and what the numbers mean; the default folders are CamVid's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: str = "{split}"
    labels: str = "{split}annot"
    listing: str | None = None
    """File with one name per line, without suffix; None = all files of the two folders."""
    classes: tuple[str, ...] = Field(min_length=2, max_length=IGNORED)
    first_label: int = Field(default=0, ge=0)
    """Number of the first class in the files."""
    ignored: int = Field(default=IGNORED, ge=0, le=255)
    """Number of the pixels that are not judged."""

    @model_validator(mode="after")
    def _check(self) -> MapLayout:
        if not 0 <= self.first_label + len(self.classes) - 1 <= 255:
            raise ValueError(f"{len(self.classes)} classes from {self.first_label} on do not fit in 8 bits")
        if 0 <= self.ignored - self.first_label < len(self.classes):
            raise ValueError(f"ignored={self.ignored} is the number of class {self.ignored - self.first_label}")
        return self


@dataclass(frozen=True)
class LabelMaps:
    """The images of one split and their maps."""

    images: ImageFiles
    store: Store
    files: tuple[str, ...]
    """Names of the maps, in the order of the images."""
    where: str
    layout: MapLayout
    fingerprint: str

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        """Of image and map, without folder and suffix."""
        return PurePosixPath(self.files[number]).stem

    def labels(self, number: int) -> NDArray[np.uint8]:
        """Classes of image `number`: [H, W], 0, 1, ... and IGNORED.

        Raises:
            DinobenchError: the map cannot be decoded, has another size than its image, or holds other numbers.
        """
        place = f"{self.where}/{self.files[number]}"
        try:
            values = _read_values(self.store.read(self.files[number]))
        # Damaged files make the decoders raise errors of every kind.
        except Exception as error:
            raise DinobenchError(f"{place} cannot be read ({error}): replace the file") from error
        width, height = self._image_size(number)
        if values.shape != (height, width):
            raise DinobenchError(
                f"{place} has {values.shape[1]} x {values.shape[0]} px, its image {self.images.source.path(number)} "
                f"{width} x {height}: give both one size (maps by nearest neighbour)"
            )
        return self._classes(values, place)

    def receipt(self) -> dict[str, Any]:
        """Name, split, number and fingerprint."""
        return {**self.images.receipt(), "fingerprint": self.fingerprint}

    def _classes(self, values: NDArray[np.uint8], place: str) -> NDArray[np.uint8]:
        layout, number = self.layout, len(self.layout.classes)
        table = np.full(256, IGNORED, dtype=np.uint8)
        table[layout.first_label : layout.first_label + number] = np.arange(number)
        known = table < IGNORED
        known[layout.ignored] = True
        found = np.bincount(values.ravel(), minlength=256) > 0
        if (found & ~known).any():
            wrong = ", ".join(str(value) for value in np.nonzero(found & ~known)[0][:5])
            last = layout.first_label + number - 1
            raise DinobenchError(
                f"{place} holds the labels {wrong}: expected {layout.first_label} to {last}, or {layout.ignored} for "
                "pixels that are not judged; name all classes in a copy of the suite definition"
            )
        return table[values]

    def _image_size(self, number: int) -> tuple[int, int]:
        name = self.images.source.path(number).removeprefix(f"{self.where}/")
        try:
            with Image.open(io.BytesIO(self.store.read(name))) as image:  # reads the header only
                return image.size
        except Exception as error:
            raise DinobenchError(f"{self.where}/{name} cannot be read ({error}): replace the file") from error


def open_label_maps(path: Path, benchmark: str, split: str, layout: MapLayout) -> LabelMaps:
    """The images and maps of a split.

    Raises:
        DinobenchError: a folder is empty, or an image has no map, or a map no image.
    """
    store = open_store(path)
    folders = [folder.format(split=split) for folder in (layout.images, layout.labels)]
    prefix = _prefix(store, folders[1])
    images, labels = (_by_stem(store, f"{prefix}{folder}/", str(path)) for folder in folders)
    if not images or not labels:
        empty = folders[0] if not images else folders[1]
        raise DinobenchError(
            f"{path} has no images in {empty}/: expected {folders[0]}/<name>.jpg with {folders[1]}/<name>.png"
        )
    names = sorted(images.keys() | labels.keys())
    if layout.listing is not None:
        names = _listed(store, path, prefix + layout.listing.format(split=split))
    _check_pairs(path, folders, names, images, labels)
    pictures, files = [images[name] for name in names], tuple(labels[name] for name in names)
    content = files_fingerprint(store, pictures, names)
    chosen = ImageFiles(benchmark, split, FileSource(store, pictures, str(path)), content)
    fingerprint = content_key(
        images=chosen.fingerprint,
        labels=files_fingerprint(store, list(files), names),
        meaning=layout.model_dump(mode="json", include={"classes", "first_label", "ignored"}),
    )
    return LabelMaps(chosen, store, files, str(path), layout, fingerprint)


def _prefix(store: Store, folder: str) -> str:
    """The folders around everything, "CamVid/" of "CamVid/trainannot/X.png"."""
    places = (f"/{name}".partition(f"/{folder}/") for name in store.sizes)
    return min((f"{before}/".lstrip("/") for before, found, _ in places if found), key=len, default="")


def _by_stem(store: Store, folder: str, where: str) -> dict[str, str]:
    """Files directly in a folder: name without suffix -> name in the store."""
    found: dict[str, str] = {}
    for name in sorted(store.sizes):
        file = name.removeprefix(folder)
        if not name.startswith(folder) or "/" in file or file.startswith("."):
            continue
        if file.lower().endswith(IMAGE_SUFFIXES):
            stem = PurePosixPath(file).stem
            if stem in found:
                raise DinobenchError(f"{where} holds two images named {stem}: {found[stem]} and {name}; keep one")
            found[stem] = name
    return found


def _listed(store: Store, path: Path, listing: str) -> list[str]:
    if listing not in store.sizes:
        raise DinobenchError(f"{path} has no list of images: expected {listing}")
    names = store.read(listing).decode("utf-8", "replace").split()
    if not names:
        raise DinobenchError(f"{path}: the list of images {listing} is empty")
    return names


def _check_pairs(
    path: Path, folders: Sequence[str], names: Sequence[str], images: dict[str, str], labels: dict[str, str]
) -> None:
    for has, lacks, what in ((folders[1], images, "image"), (folders[0], labels, "label map")):
        missing = [name for name in names if name not in lacks]
        if missing:
            own = folders[0] if lacks is images else folders[1]
            raise DinobenchError(
                f"{path}: {len(missing)} of {len(names)} names have no {what} in {own}/, for example "
                f"{', '.join(missing[:3])} (the other half is in {has}/): is the download complete?"
            )


def _read_values(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"mode {image.mode}, expected a palette or one channel of 8 bits")
        return np.asarray(image).astype(np.uint8)
