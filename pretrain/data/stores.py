"""Where image files lie: a folder, or an archive read without unpacking it.

A store lists file names with sizes and reads one file's bytes. Stores travel to worker processes: what a process must
open for itself (file descriptors) is opened on first use there.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pretrain.data.tar_index import read_index
from pretrain.errors import DinobenchError

ARCHIVE_SUFFIXES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DECOMPRESSORS = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAX_FILE_BYTES = 256 << 20
"""No image file is larger; a member that claims to be is a decompression bomb and counts as unreadable."""
MAX_COMPRESSED_TAR_BYTES = 4 << 30
"""A compressed tar has no random access and is kept in memory; beyond this it must be unpacked."""


class Store(Protocol):
    """Named files and their bytes."""

    sizes: dict[str, int]
    """Bytes of each file by its name relative to the root, `/` between folders."""

    def read(self, name: str) -> bytes: ...


class FolderStore:
    """The files under a folder; links are followed, but not to a folder that holds them; hidden files are left out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes: dict[str, int] = {}
        self._scan(str(root), "", ())

    def _scan(self, folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        state = os.stat(folder)
        here = state.st_dev, state.st_ino
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    self._scan(entry.path, f"{prefix}{entry.name}/", (*above, here))
                elif entry.is_file():
                    self.sizes[prefix + entry.name] = entry.stat().st_size

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class TarStore:
    """An uncompressed tar: each file is a range of bytes of the archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = read_index(path)
        self.sizes = {name: size for name, (_, size) in index.items()}
        self._offsets = {name: offset for name, (offset, _) in index.items()}
        self._descriptor: int | None = None

    def read(self, name: str) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        # pread: processes forked with the descriptor share its position, so nothing may depend on it.
        return os.pread(self._descriptor, self.sizes[name], self._offsets[name])

    def close(self) -> None:
        """Give the file descriptor back; the next read opens another."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # not where the archive could not be read
            self.close()


class ZipStore:
    """A zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.sizes = {m.filename: m.file_size for m in archive.infolist() if not m.is_dir()}
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def read(self, name: str) -> bytes:
        # One handle per process: forked processes would share the position in the file.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        with self._opened[1].open(name) as file:
            return file.read(MAX_FILE_BYTES + 1)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


class MemoryStore:
    """The files of a compressed tar, unpacked into memory."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, bytes] = {}
        total = 0
        with _Unpacked(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                if not member.isreg():
                    continue
                total += member.size
                if total > MAX_COMPRESSED_TAR_BYTES:
                    raise _too_large(path)
                file = archive.extractfile(member)
                assert file is not None
                self._files[member.name] = file.read()
        self.sizes = {name: len(content) for name, content in self._files.items()}

    def read(self, name: str) -> bytes:
        return self._files[name]


class _Unpacked:
    """The bytes of a compressed tar, in order, up to the largest that is kept."""

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, 2 * MAX_COMPRESSED_TAR_BYTES
        self._file: BinaryIO = _DECOMPRESSORS[path.suffix.lower()](path)

    def __enter__(self) -> Any:  # all that tarfile asks of a stream is `read`
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:  # also what is in no file: headers of any length
            raise _too_large(self._path)
        return content


def _too_large(path: Path) -> DinobenchError:
    return DinobenchError(
        f"{path} unpacks to more than {MAX_COMPRESSED_TAR_BYTES >> 30} GiB, too much to keep in memory "
        "(a compressed tar allows no access to single files). Unpack it, or repack it as .tar or .zip."
    )


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that `open_store` reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def open_store(path: Path) -> Store:
    """The store at a path: a folder, or an archive by its suffix."""
    try:
        if not path.exists():
            raise DinobenchError(f"no such folder or archive: {path}")
        if path.is_dir():
            return FolderStore(path)
        if not is_archive(path) or not path.is_file():
            raise DinobenchError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})")
        return _open_archive(path, path.stat().st_size, path.stat().st_mtime_ns)
    except DinobenchError:
        raise
    # Damaged archives and names with half a character make the readers raise errors of every kind.
    except Exception as error:
        what = "folder or archive (is the download complete?)"
        raise DinobenchError(f"cannot read the {what} {str(path)!r}: {error}") from error


@functools.lru_cache(maxsize=2)
def _open_archive(path: Path, size: int, changed: int) -> Store:
    """Kept between calls, because reading the table of a large archive takes seconds and its splits share it."""
    name = path.name.lower()
    if name.endswith(".zip"):
        return ZipStore(path)
    return TarStore(path) if name.endswith(".tar") else MemoryStore(path)
