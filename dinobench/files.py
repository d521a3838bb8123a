"""Small files written whole or not at all, and folders checked before work is put into them."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

from pretrain.errors import DinobenchError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room: on the disk, within the user's quota, within the process's limit."""
ABANDONED_SECONDS = 600.0
"""A temporary file that nobody has written to for so long was left by a killed process; a live one takes seconds."""


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, sync, rename: a reader or a crash never sees half a file.

    Raises:
        DinobenchError: the disk is full, or we may not write there; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent, f".{glob.escape(path.name)}.*.tmp")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a file may be in the way of the folder
            temporary.unlink()
        if isinstance(error, OSError):
            raise not_writable(path, error) from error
        raise


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The document in a JSON file.

    Raises:
        DinobenchError: the file is missing or is not JSON, which has neither NaN nor numbers beyond 1e308.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise DinobenchError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DinobenchError(f"{path} is not a JSON document: it was altered or damaged; move it away") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return value


def make_folder(path: Path) -> Path:
    """The folder, made if need be and found writable.

    Raises:
        DinobenchError: a file is in the way, or we may not write there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path, ".write-test-*")
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(path, error) from error
    return path


def _remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove what processes left behind that were killed as they wrote."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # of another user, or gone meanwhile
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


def not_writable(path: Path, error: OSError) -> DinobenchError:
    """The error for a place that cannot be written."""
    way_out = "free some space there" if error.errno in FULL else "change its permissions"
    return DinobenchError(
        f"cannot write {path}: {(error.strerror or str(error)).lower()}; "
        f"choose another folder with --output, or {way_out}"
    )


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        DinobenchError: there is no such file.
    """
    if path.is_dir():
        raise DinobenchError(f"{path} is a folder, a checkpoint file was expected, like {path}/checkpoints/last.pt")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DinobenchError(f"cannot read the checkpoint {path}: {(error.strerror or str(error)).lower()}") from error


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_")
