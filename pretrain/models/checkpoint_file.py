"""Checkpoint files: written whole or not at all, read without running code from the file.

A file of ours is a dict of tensors and plain values:

    format  recipe  step  images_seen  epoch  seed  teacher_temperature      where it comes from
    student  teacher                                                         state dicts, `backbone.*` and `head.*`
    target  optimizer  rng                                                   the rest of what resuming needs

A backbone that is exported for other programs is a safetensors file under timm's names, and its header says how to
build the network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.models.file_checks import check_pickle, check_sizes, check_start, check_zip, unpickling_refused

FORMAT = "dinobench-checkpoint-1"
SAFETENSORS = "safetensors"
"""What `read` puts under `format` for such a file; its tensors are under `state_dict`, its header under `metadata`."""


def save(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, whatever happens in between.

    Raises:
        DinobenchError: the file cannot be written.
        TypeError: the payload holds something that could not be read back without unpickling a class.
    """
    plain = _plain(payload, "payload")
    _write(Path(path), lambda file: torch.save(plain, file))


def save_safetensors(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and a header of strings, whole or not at all as `save` does.

    Raises:
        DinobenchError: the file cannot be written.
    """
    from safetensors.torch import save as as_bytes

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _write(Path(path), lambda file: file.write(as_bytes(own, dict(metadata))))


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
    try:
        check_start(path)
        if _is_safetensors(path):
            return _read_safetensors(path, map_location)
        payload = _read_torch(path, map_location, mmap)
    except DinobenchError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the parser
        raise _unreadable(path, error) from error
    if not isinstance(payload, dict):
        raise DinobenchError(f"{path} holds a {type(payload).__name__}; expected a dict with a network's weights")
    check_sizes(payload, path)
    return payload


def _read_torch(path: Path, map_location: str | torch.device, mmap: bool) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        check_zip(path)
    check_pickle(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # said of files that are no checkpoints
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL ([\w.]+) was not an allowed", str(error))
        raise (unpickling_refused(path, names) if names else _unreadable(path, error)) from error


def _is_safetensors(path: Path) -> bool:
    """Also without the suffix, as in the cache of a hub: a length, then that many bytes of JSON."""
    with open(path, "rb") as file:
        length, first = int.from_bytes(file.read(8), "little"), file.read(1)
    return path.suffix == ".safetensors" or (first == b"{" and 8 + length <= path.stat().st_size)


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt", device=str(map_location)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {"format": SAFETENSORS, "metadata": file.metadata() or {}, "state_dict": tensors}


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    # One name per target: what a killed process leaves behind is overwritten by the next save.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
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
        if any(path.glob("*.distcp")):
            raise DinobenchError(
                f"{path} is a distributed checkpoint (DINOv3 trains with them), expected one file: convert it with "
                f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE`, or give the eval dump"
            )
        inside = sorted(str(other.relative_to(path)) for other in _checkpoints_below(path))
        hint = f"give one of {', '.join(inside[:5])}" if inside else "give a checkpoint file"
        raise DinobenchError(f"{path} is a folder; expected a checkpoint file: {hint}")


def _checkpoints_below(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.pt")
    yield from folder.glob("checkpoints/*.pt")


def _unreadable(path: Path, error: Exception) -> DinobenchError:
    if isinstance(error, PermissionError):
        return DinobenchError(f"{path} may not be read by this user: change its permissions")
    with open(path, "rb") as file:
        start = file.read(4)
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    if "TorchScript" in reason:
        return DinobenchError(f"{path} is a TorchScript program, expected weights: save the state_dict of the module")
    if start[:2] == b"PK" or _is_safetensors(path):
        return DinobenchError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes; {reason}): copy it again or take another one"
        )
    return DinobenchError(
        f"{path} is not a checkpoint ({path.stat().st_size} bytes; {reason}): expected a torch or safetensors file"
    )


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; Windows cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
