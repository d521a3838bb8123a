"""Videos in the layout of DAVIS, with one mask per frame (Perazzi et al. 2016; Pont-Tuset et al., arXiv 1704.00675).

    JPEGImages/480p/<sequence>/<frame>.jpg      frames
    Annotations/480p/<sequence>/<frame>.png     2016: one object, any value above 0
                                                2017: palette images, value = object, 255 = not to be judged
    ImageSets/<year>/<split>.txt                names of the sequences (2016 also: ImageSets/480p/<split>.txt, and
                                                ImageSets/2016/sequences.txt for a part of the data)

In a folder, or in an archive that is read without unpacking. Shapes: H x W pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.data.folders import files_fingerprint
from pretrain.data.images import decode
from pretrain.data.stores import Store, open_store
from pretrain.errors import DinobenchError

Year = Literal[2016, 2017]
NUM_SEQUENCES = {(2016, "train"): 30, (2016, "val"): 20, (2017, "train"): 60, (2017, "val"): 30}
IGNORED = 255


@dataclass(frozen=True)
class Video:
    """File names of the frames of a sequence and of their masks, in order."""

    name: str
    frames: tuple[str, ...]
    masks: tuple[str, ...]


@dataclass(frozen=True)
class Davis:
    """The sequences of a split."""

    name: str
    split: str
    year: Year
    store: Store
    where: str
    videos: tuple[Video, ...]
    fingerprint: str

    def frame(self, video: Video, number: int) -> Image.Image:
        """Frame `number` as PIL RGB.

        Raises:
            DinobenchError: it cannot be decoded.
        """
        return self._decoded(video.frames[number], decode)

    def mask(self, video: Video, number: int) -> NDArray[np.uint8]:
        """Objects of frame `number`: [H, W], 0 = background, objects from 1.

        Raises:
            DinobenchError: it cannot be decoded, or is no image of one channel.
        """
        values = self._decoded(video.masks[number], _read_values)
        if self.year == 2016:
            return (values > 0).astype(np.uint8)
        return np.where(values == IGNORED, 0, values).astype(np.uint8)

    def receipt(self) -> dict[str, dict[str, Any]]:
        """By role: name, split, number of frames, fingerprint."""
        frames = sum(len(video.frames) for video in self.videos)
        return {"videos": {"name": self.name, "split": self.split, "n": frames, "fingerprint": self.fingerprint}}

    def _decoded(self, name: str, read: Any) -> Any:
        try:
            return read(self.store.read(name))
        # Damaged files make the decoders raise errors of every kind.
        except Exception as error:
            raise DinobenchError(f"{self.where}/{name} cannot be read ({error}): replace the file") from error


def open_davis(path: Path, name: str, year: Year, split: str) -> Davis:
    """The sequences of a split.

    Raises:
        DinobenchError: the layout is another one, or a frame has no mask.
    """
    store = open_store(path)
    prefix = next((n.partition("JPEGImages/480p/")[0] for n in store.sizes if "JPEGImages/480p/" in n), None)
    if prefix is None:
        raise DinobenchError(f"{path} is not in the layout of DAVIS: it has no JPEGImages/480p/<sequence>/<frame>.jpg")
    videos = tuple(_video(store, path, prefix, sequence) for sequence in _sequences(store, path, prefix, year, split))
    files = [file for video in videos for file in (*video.frames, *video.masks)]
    relative = [file.removeprefix(prefix) for file in files]
    return Davis(name, split, year, store, str(path), videos, files_fingerprint(store, files, relative))


def _sequences(store: Store, path: Path, prefix: str, year: Year, split: str) -> list[str]:
    lists = [f"ImageSets/{year}/{split}.txt"]
    if year == 2016:
        lists += [f"ImageSets/480p/{split}.txt", "ImageSets/2016/sequences.txt"]
    found = next((name for name in lists if prefix + name in store.sizes), None)
    if found is None:
        raise DinobenchError(f"{path} has no list of sequences: expected {' or '.join(lists)}")
    lines = store.read(prefix + found).decode("utf-8", "replace").split("\n")
    # A line is a sequence, or (480p lists) a frame and its mask: /JPEGImages/480p/<sequence>/<frame>.jpg ...
    firsts = [line.split()[0] for line in lines if line.split()]
    return list(dict.fromkeys(PurePosixPath(f).parent.name if "/" in f else f for f in firsts))


def _video(store: Store, path: Path, prefix: str, sequence: str) -> Video:
    frames = sorted(n for n in store.sizes if n.startswith(f"{prefix}JPEGImages/480p/{sequence}/"))
    masks = [f"{prefix}Annotations/480p/{sequence}/{PurePosixPath(frame).stem}.png" for frame in frames]
    missing = [mask for mask in masks if mask not in store.sizes]
    if missing or len(frames) < 3:
        problem = f"no mask {missing[0]}" if missing else f"{len(frames)} frames, needs 3 (the ends are not judged)"
        raise DinobenchError(f"{path}: sequence {sequence} has {problem}: is the download complete?")
    return Video(sequence, tuple(frames), tuple(masks))


def _read_values(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"mode {image.mode}, expected a palette or one channel")
        return np.asarray(image).astype(np.uint8)
