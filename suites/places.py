"""Where the files of benchmarks lie that are more than labelled images: queries and database, copies, videos.

`--data folder:/path` names the folder (or archive, for those that are read from one); otherwise it is looked for under
the data root, the environment variable DINOBENCH_DATA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.data.datasets import DATA_ROOT_VARIABLE, data_root
from pretrain.data.folders import IMAGE_SUFFIXES, files_fingerprint
from pretrain.data.images import FileSource, Source, UnreadableImage
from pretrain.data.stores import Store
from pretrain.errors import DinobenchError, UsageError

UNDER_DATA_ROOT = {
    "roxford5k": ("roxford5k",),
    "rparis6k": ("rparis6k",),
    "coil20": ("coil20/coil20.tar", "coil20"),
    "camvid": ("CamVid", "camvid", "camvid-180/camvid180.tar"),
    "ade20k": ("ADEChallengeData2016", "ade20k"),
    "voc2012": ("VOCdevkit/VOC2012", "VOC2012", "voc2012"),
    "copydays": ("copydays",),
    "davis2016": ("DAVIS", "davis-2016", "davis2016-val4/davis2016_val4_480p.tar"),
    "davis2017": ("DAVIS", "davis-2017"),
}
"""Folders or archives in which a benchmark is looked for, best first."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files in one role of a benchmark; unlike the images of a data set, none may be missing or unreadable."""

    benchmark: str
    role: str
    source: Source
    fingerprint: str

    def __len__(self) -> int:
        return len(self.source)

    def read(self, number: int) -> Any:
        """Image `number` as PIL RGB.

        Raises:
            DinobenchError: it cannot be decoded; without it the score would be another one.
        """
        try:
            return self.source.read(number)
        except UnreadableImage as error:
            raise DinobenchError(f"{self.benchmark}: unreadable image {error}: replace the file") from error

    def receipt(self) -> dict[str, Any]:
        """Name, role, number and fingerprint."""
        return {"name": self.benchmark, "split": self.role, "n": len(self), "fingerprint": self.fingerprint}


def image_files(store: Store, names: Sequence[str], where: Path, benchmark: str, role: str) -> ImageFiles:
    """The named files of a store, in that order."""
    names = list(names)
    return ImageFiles(benchmark, role, FileSource(store, names, str(where)), files_fingerprint(store, names, names))


def images_below(store: Store, folder: str) -> list[str]:
    """Names of all images in a folder of the store ("" for all of it), in alphabetical order."""
    prefix = f"{folder}/" if folder else ""
    return sorted(name for name in store.sizes if name.startswith(prefix) and name.lower().endswith(IMAGE_SUFFIXES))


def find_benchmark(name: str | None, data: str | None, needs: str) -> tuple[str, Path]:
    """The name of a benchmark and where its files lie.

    Args:
        name: of the benchmark, or folder:/path.
        data: folder:/path in place of the usual place, or None.
        needs: what belongs there, for the message.

    Raises:
        UsageError: `data` is no such path, or there is neither a name nor a path.
        DinobenchError: nothing is found.
    """
    place = data or name or ""
    scheme, _, text = place.partition(":")
    if text:
        if scheme != "folder":
            raise UsageError(f"{place}: this suite reads a folder of its own layout ({needs}): give folder:/path")
        path = Path(text).expanduser()
        if not path.exists():
            raise DinobenchError(f"no such folder or archive: {path}")
        benchmark = path.stem if name is None or ":" in name else name
        return benchmark, path / benchmark if (path / benchmark).is_dir() else path
    if data or not name:
        raise UsageError(f"expected --data folder:/path with {needs}, found {data!r}")
    root = data_root()
    for candidate in UNDER_DATA_ROOT.get(name, (name,)) if root else ():
        assert root is not None
        if (root / candidate).exists():
            return name, root / candidate
    where = f"not found under {DATA_ROOT_VARIABLE}={root}" if root else f"{DATA_ROOT_VARIABLE} is not set"
    raise DinobenchError(f"{name}: {where}: put {needs} there, or add --data folder:/path")
