"""Shards: the images of a set in many tar archives, whose files are named in WebDataset's way.

WebDataset (github.com/webdataset/webdataset) is a convention for plain tars: files whose names agree up to the first
dot belong to one sample, so the label of `0001.jpg` is the number in `0001.cls`, or in `0001.json` under `cls` or
`label`. The headers of all shards are read once and every image is then a range of bytes of its shard. So such a set is
shuffled exactly, shared by any number of ranks and resumed at any step, like every other; the library `webdataset`
streams shards through a shuffle buffer, which promises none of it, and is not needed here. The price is that images are
read in random order: where the disk is slow at that, copy the shards to a local one or set data.cache=device.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from pretrain.data.folders import IMAGE_SUFFIXES, choose_split, files_fingerprint
from pretrain.data.images import FileSource, ImageSet
from pretrain.data.stores import TarStore, open_store
from pretrain.errors import DinobenchError, UsageError

MAX_OPEN = 256
"""Shards that a process holds open at a time; systems allow 1024 files or more."""
_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")
_BRACES = re.compile(r"\{([^{}]*)\}")
_EXAMPLE = "/path/train-{000000..000146}.tar"


def open_shards(pattern: str, split: str, name: str) -> ImageSet:
    """The images of one split of a sharded set, shard by shard.

    Args:
        pattern: Shards as `/path/train-{000000..000146}.tar`, with braces or `*`, or the folder they lie in.
        split: Chooses the shards that have it in their file name; "train" for all where none has a split there.
        name: What the set is called in receipts.

    Raises:
        DinobenchError: a shard is missing or damaged, holds no images, or an image lacks the label that others have.
        UsageError: there is no such split.
    """
    chosen, paths = _shards_of(shard_paths(pattern), split, pattern, name)
    store = _open(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))
    images = [n for n in store.sizes if _extension(n) in IMAGE_SUFFIXES]
    if not images:
        raise DinobenchError(
            f"{pattern} holds no images; expected samples like 0001.jpg with 0001.cls ({', '.join(IMAGE_SUFFIXES)})"
        )
    labels = _labels(store, images)
    fingerprint = files_fingerprint(store, images, images)
    if labels is not None:
        fingerprint = hashlib.sha256(fingerprint.encode() + labels.numpy().astype("<i8").tobytes()).hexdigest()
    classes = () if labels is None else tuple(map(str, range(1 + int(labels.max()))))
    return ImageSet(name, chosen, fingerprint, FileSource(store, images, store.where), labels=labels, classes=classes)


class ShardStore:
    """The files of several uncompressed tars, each under the path of its shard."""

    def __init__(self, paths: list[Path]) -> None:
        self.where = os.path.commonpath([path.parent for path in paths])
        self.sizes: dict[str, int] = {}
        self._shards: list[TarStore] = []
        self._prefixes = [f"{os.path.relpath(path, self.where)}/" for path in paths]
        self._shard_of: dict[str, int] = {}
        for number, (path, prefix) in enumerate(zip(paths, self._prefixes, strict=True)):
            shard = open_store(path)
            assert isinstance(shard, TarStore), path
            self._shards.append(shard)
            names = {f"{prefix}{name}": size for name, size in shard.sizes.items()}
            self.sizes |= names
            self._shard_of |= dict.fromkeys(names, number)
        self._open: dict[int, None] = {}

    def read(self, name: str) -> bytes:
        number = self._shard_of[name]
        self._open.pop(number, None)
        self._open[number] = None  # the one used last comes last
        if len(self._open) > MAX_OPEN:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self._shards[oldest].close()
        return self._shards[number].read(name[len(self._prefixes[number]) :])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def shard_paths(pattern: str) -> list[Path]:
    """The shards that a pattern names, in its order.

    Raises:
        DinobenchError: one of them is not there, or is no uncompressed tar.
    """
    named = [Path(text).expanduser() for text in _expand(pattern)]
    paths = [path for one in named for path in _existing(one)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise DinobenchError(f"{len(missing)} of {len(paths)} shards of {pattern} are missing (first: {missing[0]})")
    if not paths:
        raise DinobenchError(f"{pattern} names no shards: expected .tar files like {_EXAMPLE}, or their folder")
    packed = [path for path in paths if path.suffix != ".tar"]
    if packed:
        raise DinobenchError(
            f"{packed[0]} is no .tar: expected shards like {_EXAMPLE}. A compressed one allows no access to single "
            "images: unpack it to .tar"
        )
    return paths


def _existing(path: Path) -> list[Path]:
    """The path itself, the tars of a folder, or what matches `*`."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(str(path)) else [path]


def _expand(pattern: str) -> Iterator[str]:
    """`a-{08..10}` -> a-08, a-09, a-10, and `{a,b}` -> a, b, as in a shell."""
    ends: list[list[str]] = []
    for number, part in enumerate(_BRACES.split(pattern)):
        first, dots, last = part.partition("..")
        if number % 2 == 0:
            ends.append([part])
        elif dots and first.isdigit() and last.isdigit():
            ends.append([str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)])
        else:
            ends.append(part.split(","))
    return map("".join, itertools.product(*ends))


def _shards_of(paths: list[Path], split: str, pattern: str, name: str) -> tuple[str, list[Path]]:
    """The split as the shards call it, and its shards."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        words = _SPLIT.findall(path.name.lower())
        found.setdefault(_SPLITS[words[0]] if words else "", []).append(path)
    if found.keys() == {""}:
        if split != "train":
            raise UsageError(
                f"{pattern}: no shard has a split in its name, so all of it is 'train' and there is no {split!r}. Use "
                "'train[:0.8]' and 'train[0.8:]', or name the shards train-000000.tar, val-000000.tar, ..."
            )
        return split, paths
    if "" in found:
        raise DinobenchError(
            f"{pattern}: {len(found[''])} shards have no split in their names and the others have (first: "
            f"{found[''][0].name}): expected train, val or test in all of them, or in none"
        )
    split = choose_split(split, list(found), name)
    return split, found[split]


@functools.lru_cache(maxsize=2)
def _open(shards: tuple[tuple[Path, int, int], ...]) -> ShardStore:
    """Kept between calls, because reading the headers takes seconds; size and time tell a shard that changed."""
    return ShardStore([path for path, _, _ in shards])


def _extension(name: str) -> str:
    """From the first dot of the file name on; of hidden files all of it, which is no image's."""
    _, dot, extension = name.rpartition("/")[2].partition(".")
    return f"{dot}{extension.lower()}"


def _labels(store: ShardStore, images: list[str]) -> torch.Tensor | None:
    """The label of every image, or None where no image has one."""
    labels = [_label(store, name) for name in images]
    unlabelled = [name for name, label in zip(images, labels, strict=True) if label is None]
    if len(unlabelled) == len(images):
        return None
    if unlabelled:
        raise DinobenchError(
            f"{len(unlabelled)} of {len(images)} images have no label (first: {store.where}/{unlabelled[0]}): expected "
            "the class as a number in a .cls file beside each, or in a .json under 'cls' or 'label', or beside none"
        )
    return torch.tensor(labels)


def _label(store: ShardStore, image: str) -> int | None:
    key = image[: len(image) - len(_extension(image))]
    for file, parse in ((f"{key}.cls", _number), (f"{key}.json", _json_label)):
        if file not in store.sizes:
            continue
        try:
            label = parse(store.read(file))
        except ValueError as error:
            where = f"{store.where}/{file}"
            raise DinobenchError(f"{where} gives no label: expected a whole number >= 0, found {error}") from error
        if label is not None:
            return label
    return None


def _number(content: bytes) -> int:
    text = content.strip()
    if not text.isdigit():
        raise ValueError(repr(text[:40]))
    return int(text)


def _json_label(content: bytes) -> int | None:
    sample = json.loads(content)
    found = [sample.get(key) for key in ("cls", "label")] if isinstance(sample, dict) else []
    labels = [label for label in found if label is not None]
    return _number(json.dumps(labels[0]).encode()) if labels else None
