"""Small files written whole or not at all, and folders checked before work is put into them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pretrain.errors import DinobenchError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room: on the disk, within the user's quota, within the process's limit."""


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
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a file may be in the way of the folder
            temporary.unlink()
        raise not_writable(path, error) from error


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The document in a JSON file.

    Raises:
        DinobenchError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DinobenchError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DinobenchError(f"{path} is not a JSON document: it was altered or damaged; move it away") from error


def make_folder(path: Path) -> Path:
    """The folder, made if need be and found writable.

    Raises:
        DinobenchError: a file is in the way, or we may not write there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(path, error) from error
    return path


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
