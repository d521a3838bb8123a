"""Checkpoint files: written whole or not at all, read without running code from the file.

A file of ours is a dict of tensors and plain values:

    format  recipe  step  images_seen  epoch  seed  teacher_temperature      where it comes from
    student  teacher                                                         state dicts, `backbone.*` and `head.*`
    target  optimizer  rng                                                   the rest of what resuming needs
"""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import DinobenchError

FORMAT = "dinobench-checkpoint-1"


def save(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, whatever happens in between.

    Raises:
        DinobenchError: the file cannot be written.
        TypeError: the payload holds something that could not be read back without unpickling a class.
    """
    path = Path(path)
    plain = _plain(payload, "payload")
    # One name per target: what a killed process leaves behind is overwritten by the next save.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DinobenchError(
            f"cannot write {path} ({error}): check the free space and the permissions there"
        ) from error


def read(path: str | Path, map_location: str | torch.device = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """The dict in a checkpoint file of any layout; classes are never unpickled.

    Args:
        path: the file.
        map_location: device of the tensors.
        mmap: read tensors only when they are used; for taking a part of a large file.

    Raises:
        DinobenchError: missing, truncated, not a checkpoint, or made of classes that would have to be unpickled.
    """
    path = Path(path)
    _check_file(path)
    is_zip = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # said of files that are no checkpoints
            payload = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        classes = _classes_asked_for(path)
        if not classes:
            raise _unreadable(path, error) from error
        raise DinobenchError(
            f"{path} asks to unpickle {', '.join(classes)}; expected tensors and plain values only. It is refused "
            "because unpickling runs code from the file: save its state dicts alone in a new file and give that"
        ) from error
    except Exception as error:  # a damaged file fails anywhere in the parser
        raise _unreadable(path, error) from error
    if not isinstance(payload, dict):
        raise DinobenchError(f"{path} holds a {type(payload).__name__}; expected a dict with a network's weights")
    return payload


def _plain(value: Any, where: str) -> Any:
    """`value` with containers turned into plain ones; refuses what weights_only could not read."""
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, str, int, float, bool, None, list, dict"
    )


def _check_file(path: Path) -> None:
    if not path.exists():
        here = sorted(other.name for other in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        hint = f"; beside it: {', '.join(here[:5])}" if here else ""
        raise DinobenchError(f"no checkpoint at {path}: check the path{hint}")
    if path.is_dir():
        inside = sorted(str(other.relative_to(path)) for other in _checkpoints_below(path))
        hint = f"give one of {', '.join(inside[:5])}" if inside else "give a checkpoint file"
        raise DinobenchError(f"{path} is a folder; expected a checkpoint file: {hint}")


def _checkpoints_below(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.pt")
    yield from folder.glob("checkpoints/*.pt")


def _classes_asked_for(path: Path) -> list[str]:
    """Names of the classes and functions a file wants to unpickle; empty where they cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or a pickle of the time before torch 1.6
        return []


def _unreadable(path: Path, error: Exception) -> DinobenchError:
    if isinstance(error, PermissionError):
        return DinobenchError(f"{path} may not be read by this user: change its permissions")
    with open(path, "rb") as file:
        start = file.read(4)
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    if start[:2] == b"PK":
        return DinobenchError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes; {reason}): copy it again or take another one"
        )
    return DinobenchError(f"{path} is not a checkpoint ({path.stat().st_size} bytes; {reason}): expected a torch file")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; Windows cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
