"""Image sets of the user: folders or archives of image files, and NumPy archives.

Layouts of a folder, found from the paths alone: `<split>/<class>/...`, `<split>/...`, `<class>/...`, or flat. One
folder around everything is looked through. There are labels where every image of the split lies in a class folder;
classes are in alphabetical order, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from pretrain.data.images import MAX_ASPECT, ArraySource, FileSource, ImageSet, array_fingerprint
from pretrain.data.stores import Store, open_store
from pretrain.errors import DinobenchError, UsageError, unknown_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "val", "test")
MAX_HASHED_BYTES = 512 << 20
"""Sets up to this size are identified by the content of every file, larger ones by names and sizes."""
MAX_CLASSES = 1_000_000
"""Of labels in an array; ImageNet-22k has 21,841."""
MAX_UNPACKED_BYTES = 4 << 30
"""Of the compressed arrays of an archive, which are unpacked into memory."""
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_FIX = (
    "move each image into a folder named as its class in train/, like {split}/<class>/{image} (for ImageNet-1k the "
    "script valprep.sh of soumith/imagenetloader.torch does it; for tiny-imagenet val_annotations.txt has the classes)"
)
_LAYOUTS = "<split>/<class>/<image>, <class>/<image> or <image>"


def open_folder(path: Path, split: str, name: str, *, needs_splits: bool = False) -> ImageSet:
    """The images of one split of a folder or archive.

    Args:
        path: Folder, or .tar, .tar.gz, .zip.
        split: "train" for everything where there are no split folders; "test" may be called "val" and the reverse.
        name: What the set is called in receipts.
        needs_splits: Whether folders train/ and val/ must be there, and the images of this split in class folders.

    Raises:
        DinobenchError: no images, or not the folders that are needed; the message says what to move where.
        UsageError: there is no such split.
    """
    store = open_store(path)
    names = sorted(n for n in store.sizes if n.lower().endswith(IMAGE_SUFFIXES) and not _hidden(n))
    if not names:
        raise DinobenchError(f"{path} holds no images; expected {_LAYOUTS} ({', '.join(IMAGE_SUFFIXES)})")
    prefix = _common_folder(names)
    found = _splits(names, prefix)
    if needs_splits and not {"train", "val"} <= set(found):
        raise DinobenchError(
            f"{path}: expected the folders train/ and val/, one folder per class in each; found {found}"
        )
    # Classes of all splits together, so that a class missing from one does not shift the labels there.
    everything = {s: [n for n in names if n.startswith(f"{prefix}{s}/")] for s in found} or {"train": names}
    if split not in everything and not found:
        raise UsageError(
            f"{path} has no split folders: all of it is 'train' and there is no {split!r}. "
            f"Use 'train[:0.8]' and 'train[0.8:]', or put the images in folders train/ and val/."
        )
    split = choose_split(split, list(everything), name)
    relative = {s: [n[len(prefix) + len(f"{s}/" if found else "") :] for n in of] for s, of in everything.items()}
    folders = {s: _class_folders(of) for s, of in relative.items()}
    if needs_splits:
        _refuse_unlabelled(path, split, relative[split], set(folders["train"]))
    classes = tuple(sorted({folder for of in folders.values() for folder in of}))
    number = {folder: k for k, folder in enumerate(classes)}
    labels = torch.tensor([number[folder] for folder in folders[split]]) if folders[split] else None
    return ImageSet(
        name,
        split,
        files_fingerprint(store, everything[split], relative[split]),
        FileSource(store, everything[split], str(path)),
        labels=labels,
        classes=classes if labels is not None else (),
    )


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/") if part != ".")


def _common_folder(names: list[str]) -> str:
    """The folders around everything: "pack/" of "pack/train/a.png"; a split folder is not looked through."""
    prefix = ""
    while True:
        firsts = {n[len(prefix) :].partition("/")[:2] for n in names}
        first, slash = firsts.pop()
        if firsts or not slash or first in SPLITS:
            return prefix
        prefix += f"{first}/"


def choose_split(split: str, found: list[str], name: str) -> str:
    """The split of that name; "test" may be called "val" and the reverse."""
    if split in found:
        return split
    other = {"val": "test", "test": "val"}.get(split)
    if other in found:
        return other
    raise unknown_name(f"split of {name}", split, found)


def _splits(names: list[str], prefix: str) -> list[str]:
    """The split folders below the prefix; a single one among others is a class of that name."""
    tops = {top for n in names for top, slash, _ in [n[len(prefix) :].partition("/")] if slash}
    found = sorted(tops & set(SPLITS))
    return found if len(found) > 1 or len(tops) == 1 else []


def _class_folders(relative: list[str]) -> list[str]:
    """The first folder of each image, if every image is in one, else nothing."""
    return [n.partition("/")[0] for n in relative] if all("/" in n for n in relative) else []


def _refuse_unlabelled(path: Path, split: str, relative: list[str], known: set[str]) -> None:
    """Refuse a split whose labels cannot be told, as ImageNet's val/ right after unpacking.

    Args:
        relative: names of the split's images below it.
        known: classes of train; empty where it has none itself.
    """
    flat = [n for n in relative if "/" not in n]
    if flat:
        number = f"all {len(flat)}" if len(flat) == len(relative) else f"{len(flat)} of {len(relative)}"
        raise DinobenchError(
            f"{path}: {number} images of {split}/ lie in no class folder (first: {split}/{flat[0]}), so their labels "
            f"are not known: {_FIX.format(split=split, image=flat[0])}"
        )
    strange = sorted({n.partition("/")[0] for n in relative} - known)
    if strange and split != "train":
        raise DinobenchError(
            f"{path}: {split}/ has {len(strange)} folders that train/ has not (first: {split}/{strange[0]}/): expected "
            f"the class folders of train/; {_FIX.format(split=split, image='<image>')}"
        )


def files_fingerprint(store: Store, names: list[str], relative: list[str]) -> str:
    """Hash of the files' relative names and contents; of names and sizes where there is too much to read."""
    hashed = sum(store.sizes[n] for n in names) <= MAX_HASHED_BYTES
    digest = hashlib.sha256(b"contents" if hashed else b"sizes")
    for name, short in zip(names, relative, strict=True):
        digest.update(f"\0{short}\0{store.sizes[name]}\0".encode("utf-8", "surrogateescape"))
        if hashed:
            digest.update(_content(store, name))
    return digest.hexdigest()


def _content(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    # A damaged archive member: found and reported where the image is decoded.
    except Exception:
        return b"unreadable"


def open_npz(path: Path, split: str, name: str) -> ImageSet:
    """Images (uint8, gray or RGB) and labels of a NumPy archive; object arrays are refused."""
    try:
        if not path.is_file():
            raise DinobenchError(f"no such file: {path}")
        if not zipfile.is_zipfile(path):
            raise DinobenchError(f"{path} is not a NumPy archive: is the download complete?")
        _check_npz_sizes(path)
        with np.load(path, allow_pickle=False) as archive:
            images_key, labels_key = _npz_keys(path, split, archive.files)
            images = np.asarray(archive[images_key])
            labels = np.asarray(archive[labels_key]) if labels_key else None
            all_labels = (np.asarray(archive[key]) for key in archive.files if key.endswith("labels"))
            num_classes = 1 + max((int(array.max()) for array in all_labels if array.size), default=-1)
    except DinobenchError:
        raise
    # Damaged archives, and arrays of other types, make the readers raise errors of every kind.
    except Exception as error:
        raise DinobenchError(
            f"cannot read {str(path)!r} ({error}); expected a NumPy archive of numbers, without objects"
        ) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DinobenchError(
            f"{path}: {images_key} is {images.dtype} {images.shape}; "
            f"expected uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W]"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] not in (1, 3):
        raise DinobenchError(f"{path}: {images_key} {images.shape} has no axis of 1 or 3 colours")
    if not 0 < max(images.shape[2:]) <= MAX_ASPECT * min(images.shape[2:]):
        raise DinobenchError(f"{path}: {images_key} has images of {images.shape[3]} x {images.shape[2]} pixels")
    if num_classes > MAX_CLASSES:
        raise DinobenchError(f"{path}: the largest label is {num_classes - 1}, expected 0, 1, ... for the classes")
    targets = None if labels is None else _npz_labels(path, labels, len(images))
    classes = tuple(map(str, range(num_classes))) if targets is not None else ()
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return ImageSet(
        name, split, array_fingerprint(pixels, targets), ArraySource(pixels), labels=targets, classes=classes
    )


def _check_npz_sizes(path: Path) -> None:
    """Refuse arrays that declare more than the archive holds, and an archive that unpacks to more than fits in memory.

    NumPy sets memory aside for an array before it finds out how much there is of it.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED)
        if unpacked > MAX_UNPACKED_BYTES:
            raise DinobenchError(
                f"{path} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB: write it with np.savez, not compressed"
            )
        for member in (member for member in members if member.filename.endswith(".npy")):
            with archive.open(member) as file:
                read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
                shape, _, kind = read_header(file)
            if kind.itemsize * math.prod(shape) > min(member.file_size, max(path.stat().st_size, unpacked)):
                raise DinobenchError(f"{path}: {member.filename} declares {kind} {shape}, more than the file holds")


def _npz_keys(path: Path, split: str, keys: list[str]) -> tuple[str, str | None]:
    """The names of the images and labels of a split."""
    if split == "train" and "images" in keys:
        return "images", "labels" if "labels" in keys else None
    found = sorted(k.removesuffix("_images") for k in keys if k.endswith("_images"))
    if not found:
        raise UsageError(
            f"{path} holds {sorted(keys)}: expected `images` (and `labels`), which are its train split, "
            f"or `train_images`, `test_images`, ..."
        )
    split = choose_split(split, found, path.name)
    return f"{split}_images", f"{split}_labels" if f"{split}_labels" in keys else None


def _npz_labels(path: Path, labels: np.ndarray, count: int) -> torch.Tensor:
    one_each = labels.size == count and labels.shape[:1] == (count,)
    if not one_each or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise DinobenchError(
            f"{path}: labels {labels.dtype} {labels.shape} for {count} images; expected one whole number >= 0 each"
        )
    return torch.from_numpy(labels.reshape(count).astype(np.int64))
