"""A folder of computed values under content-addressed keys: features as safetensors, small scores as JSON.

    <folder>/features/ab/<key>.safetensors     tensors; the header holds their checksum and what made them
    <folder>/scores/ab/<key>.json              scores of baselines
    <folder>/locks/ab.lock                     one lock per first two digits of the key

A key is a hash of everything the value depends on, so an entry is never out of date, only unused: the folder is kept
under `max_bytes` (`DINOBENCH_CACHE_GB`) by removing the features that were read longest ago. Who reads an entry that is
removed keeps what it has mapped; between machines that share the folder only where their file system keeps open files
of others, which NFS does not: give each machine a folder of its own there. Files are written under a temporary name and
renamed; a reader sees a whole file or none, and maps it into memory. Two processes that want the same features compute
them once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.errors import UsageError
from suites.rows import checksum

MAX_GB = 20.0
"""Default bound in GiB: ImageNet features of four ViT-S checkpoints with 4 blocks and mean patch token."""
ABANDONED_SECONDS = 24 * 3600
"""A file that nobody has written to for so long is what a killed process has left."""


def content_key(**parts: Any) -> str:
    """SHA-256 of named parts, which must be plain values (str, numbers, lists, dicts)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def default_folder() -> Path:
    """`DINOBENCH_CACHE`, else ~/.cache/dinobench; below the temporary folder for a user who has no home."""
    if named := os.environ.get("DINOBENCH_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "dinobench"
    except RuntimeError:  # an unlisted user in a container
        return Path(tempfile.gettempdir()) / f"dinobench-{os.getuid()}"


def default_max_bytes() -> int:
    """`DINOBENCH_CACHE_GB` in GiB, else 20.

    Raises:
        UsageError: it is no positive number.
    """
    text = os.environ.get("DINOBENCH_CACHE_GB") or str(MAX_GB)
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise UsageError(f"DINOBENCH_CACHE_GB={text!r}: expected the largest size of the cache in GiB, like 50 or 0.5")
    return int(size * 2**30)


@dataclass(frozen=True)
class Entry:
    """Tensors with what is known about them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    from_cache: bool


class FeatureCache:
    """See the module. The arguments default to `default_folder()` and `default_max_bytes()`."""

    def __init__(self, folder: Path | None = None, *, max_bytes: int | None = None):
        self.folder = folder or default_folder()
        self.max_bytes = default_max_bytes() if max_bytes is None else max_bytes

    def get_or_compute(self, key: str, compute: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]) -> Entry:
        """The entry under `key`, computed by at most one process at a time and stored.

        Args:
            key: from `content_key`.
            compute: gives tensors (moved to the CPU here) and string metadata.
        """
        found = self.read(key)
        if found is not None:
            return found
        with self._lock(key[:2]):
            found = self.read(key)  # another process may have been faster
            if found is not None:
                return found
            tensors, metadata = compute()
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            self._store(key, tensors, metadata)
        return Entry(tensors, metadata, from_cache=False)

    def get_or_write(
        self,
        key: str,
        write: Callable[[Path, dict[str, str]], None],
        accept: Callable[[dict[str, str]], bool] = lambda metadata: True,
    ) -> Entry | None:
        """The entry under `key`, for values that need not fit in memory; None when it could not be written.

        Args:
            key: from `content_key`.
            write: gets a name to write a safetensors file to (as suites.rows does, with its checksum) and the metadata
                of an entry that was not accepted, which it replaces.
            accept: whether an entry with this metadata will do.
        """
        found = self.read(key, accept)
        if found is not None:
            return found
        path = self._path("features", key, ".safetensors")
        with self._lock(key[:2]):
            found = self.read(key, accept)  # another process may have been faster
            if found is not None:
                return found
            with _tolerate_full_disk(self.folder):
                with _replacing(path) as temporary:
                    write(temporary, self._metadata(path))
                self._evict(keep=path)
                tensors, metadata = _open(path)
                metadata.pop("checksum")
                return Entry(tensors, metadata, from_cache=False)
        return None

    def read(self, key: str, accept: Callable[[dict[str, str]], bool] = lambda metadata: True) -> Entry | None:
        """The entry, or None. A damaged one is removed with a warning."""
        path = self._path("features", key, ".safetensors")
        try:
            if not path.exists():
                return None
            tensors, metadata = _open(path)
            stated = metadata.pop("checksum", "")
            if not accept(metadata):
                return None
            if stated != checksum(tensors):
                raise ValueError("its checksum does not match")
        except FileNotFoundError:
            return None  # removed by another process meanwhile
        except (SafetensorError, ValueError, OSError) as error:
            _remove_damaged(path, error)
            return None
        with contextlib.suppress(OSError):  # of another user, or on a disk that is read-only
            os.utime(path)  # read now: last to be removed
        return Entry(tensors, metadata, from_cache=True)

    def read_scores(self, key: str) -> dict[str, float] | None:
        """Scores stored under `key`, or None; a damaged file is removed with a warning."""
        path = self._path("scores", key, ".json")
        try:
            stored = json.loads(path.read_text())
            return {str(name): float(value) for name, value in stored.items()}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
            _remove_damaged(path, error)
            return None

    def write_scores(self, key: str, scores: dict[str, float]) -> None:
        """Store scores under `key`."""
        with _tolerate_full_disk(self.folder), _replacing(self._path("scores", key, ".json")) as temporary:
            temporary.write_text(json.dumps(scores, indent=1))

    def size(self) -> int:
        """Bytes of all features."""
        return sum(size for _, size, _ in self._features())

    def _store(self, key: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        path = self._path("features", key, ".safetensors")
        with _tolerate_full_disk(self.folder):
            with _replacing(path) as temporary:
                save_file(tensors, temporary, {**metadata, "checksum": checksum(tensors)})
            self._evict(keep=path)

    def _metadata(self, path: Path) -> dict[str, str]:
        """Of the entry in a file; nothing when there is none."""
        try:
            return _open(path)[1]
        except (SafetensorError, ValueError, OSError):
            return {}

    def _evict(self, keep: Path) -> None:
        """Remove the features read longest ago until the rest fits; the one just written stays."""
        with self._lock("evict"):
            for modified, _, path in self._files("*/.*"):  # also what safetensors calls a file until it is whole
                if time.time() - modified > ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)
            features = sorted(self._features())
            total = sum(size for _, size, _ in features)
            for _, size, path in features:
                if total <= self.max_bytes:
                    break
                if path != keep and self._remove(path, keep.parent.name):
                    total -= size

    def _remove(self, path: Path, ours: str) -> bool:
        """Remove an entry, unless a process holds its lock: it may have just written it and not opened it yet.

        Args:
            ours: name of the lock that we hold.
        """
        lock = FileLock(self.folder / "locks" / f"{path.parent.name}.lock")
        try:
            if path.parent.name != ours:
                lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            path.unlink(missing_ok=True)
        finally:
            lock.release()
        return True

    def _features(self) -> Iterator[tuple[float, int, Path]]:
        return self._files("*/*.safetensors")

    def _files(self, pattern: str) -> Iterator[tuple[float, int, Path]]:
        """When it was modified, bytes and path of each."""
        for path in (self.folder / "features").glob(pattern):
            try:
                state = path.stat()
            except FileNotFoundError:
                continue
            yield state.st_mtime, state.st_size, path

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        path = self.folder / "locks" / f"{name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            lock.acquire()
        except OSError:  # a read-only cache still serves what it holds; see _tolerate_full_disk
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _path(self, kind: str, key: str, suffix: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}{suffix}"


def _remove_damaged(path: Path, error: Exception) -> None:
    warnings.warn(f"damaged cache entry {path} is removed and computed again ({error})", stacklevel=3)
    with contextlib.suppress(OSError):  # a read-only disk; or there is no such folder, a file is in its place
        path.unlink()


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped into memory, and metadata of a file.

    Raises:
        OSError: it cannot be read; FileNotFoundError where it is gone.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, dict(file.metadata() or {})
    except RuntimeError as error:  # torch opens it once more, by its name, which may have been removed in between
        gone = errno.ENOENT if not path.exists() else errno.EIO
        raise OSError(gone, str(error)) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` when the block ends well: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and a cache may be shared.
    temporary = path.parent / f".writing-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _tolerate_full_disk(folder: Path) -> Iterator[None]:
    """A cache that cannot be written costs time, not the result."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has one class for all of its failures
        warnings.warn(f"the cache {folder} could not be written ({error}); set DINOBENCH_CACHE", stacklevel=4)
