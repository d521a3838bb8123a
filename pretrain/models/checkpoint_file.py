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
import hashlib
import json
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pretrain.clipped_file import ClippedFile
from pretrain.errors import DinobenchError
from pretrain.models.file_checks import (
    check_records,
    check_sizes,
    check_start,
    check_zip,
)
from pretrain.models.numpy_numbers import STAND_INS
from pretrain.models.pickle_checks import check_pickle, unpickling_refused

FORMAT = "dinobench-checkpoint-1"
MAX_INDEX_BYTES = 2**26
NEWER_INSTRUCTIONS = range(0x8C, 0x99)
"""Of pickle protocols 4 and 5, none of which torch's safe reader knows."""
INDEX = ".safetensors.index.json"
"""Suffix of the list of the parts of a large file (transformers)."""
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
        if path.name.endswith(INDEX):
            return _read_parts(path, map_location)
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
    if payload.get("format") == FORMAT:  # ours have checksums, and torch reads past a flipped bit
        check_records(path)
    return payload


def read_own(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The dict in a checkpoint of ours, from which a training goes on.

    Raises:
        DinobenchError: as for `read`, or it is of another format.
    """
    payload = read(path, map_location)
    if payload.get("format") != FORMAT or not isinstance(payload.get("step"), int):
        raise DinobenchError(
            f"{path} has the format {payload.get('format')!r}, expected {FORMAT}: a newer version of dinobench wrote "
            "it, or another program; use that one, or move the file away"
        )
    return payload


def file_sha256(path: str | Path) -> str:
    """Hash of a checkpoint file; of the files that it names, one after the other, for an index."""
    path, digest = Path(path), hashlib.sha256()
    for part in _parts_of(path, _weight_map(path)) if path.name.endswith(INDEX) else [path]:
        with open(part, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _read_torch(path: Path, map_location: str | torch.device, mmap: bool) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        check_zip(path)
    check_pickle(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace, *STAND_INS]):
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # said of files that are no checkpoints
            if is_zip:
                return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
            with ClippedFile(path) as file:
                return torch.load(file, map_location=map_location, weights_only=True)
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


def _read_parts(index: Path, map_location: str | torch.device) -> dict[str, Any]:
    """The tensors of all the files that an index names, which lie beside it."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise DinobenchError(
            f"{index} has {index.stat().st_size} bytes, expected {MAX_INDEX_BYTES} at most for an index"
        )
    places = _weight_map(index)
    state: dict[str, Tensor] = {}
    for part in _parts_of(index, places):
        check_start(part)
        try:
            state |= _read_safetensors(part, map_location)["state_dict"]
        except Exception as error:
            raise _unreadable(part, error) from error
    absent = sorted(places.keys() - state.keys())
    if absent:
        raise DinobenchError(
            f"the parts that {index} names lack {len(absent)} of its tensors, for example {absent[0]}: copy them again"
        )
    return {"format": SAFETENSORS, "metadata": {}, "state_dict": state}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file."""
    content = json.loads(index.read_text())
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise DinobenchError(f"{index} has no weight_map of tensor names to files: take the index again")
    return places


def _parts_of(index: Path, places: Mapping[str, str]) -> list[Path]:
    """The files beside an index that hold its tensors."""
    parts = [index.parent / name for name in sorted(set(places.values()))]
    for part, name in zip(parts, sorted(set(places.values())), strict=True):
        if Path(name).name != name or not part.is_file():
            raise DinobenchError(f"{index} names the part {name!r}, which is not beside it: copy all parts there")
    return parts


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
        raise not_writable(path, error) from error


def not_writable(path: Path, error: Exception) -> DinobenchError:
    """The error for a checkpoint that cannot be written."""
    return DinobenchError(f"cannot write {path} ({error}): check the free space and the permissions there")


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
        inside = [str(other.relative_to(path)) for other in _checkpoints_below(path)]
        hint = f"give one of {', '.join(inside[:5])}" if inside else "give a checkpoint file"
        raise DinobenchError(f"{path} is a folder; expected a checkpoint file: {hint}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DinobenchError(f"{path} is a device or a pipe, expected a checkpoint file: save it to a file first")
    part = re.search(r"-(\d+)-of-(\d+)\.(safetensors|bin)$", path.name)
    if part is not None and int(part[2]) > 1:
        index = path.with_name(f"{path.name[: part.start()]}{INDEX}")
        raise DinobenchError(
            f"{path} is part {int(part[1])} of {int(part[2])} of a network, expected all of them: give "
            f"{index if index.exists() else f'the list of the parts, {index.name}, with the parts beside it'}"
        )


def _checkpoints_below(folder: Path) -> Iterator[Path]:
    for pattern in ("*.pt", "*.pth", "*.pth.tar", "*.ckpt", f"*{INDEX}", "*.safetensors", "checkpoints/*.pt"):
        yield from folder.glob(pattern)


def _unreadable(path: Path, error: Exception) -> DinobenchError:
    if isinstance(error, PermissionError):
        return DinobenchError(f"{path} may not be read by this user: change its permissions")
    with open(path, "rb") as file:
        start = file.read(4)
    # torch puts its advice, which is about unsafe loading, before the reason.
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    reason = reason.splitlines()[0][:120]
    operand = re.fullmatch(r"Unsupported operand (\d+)", reason)
    if operand is not None and int(operand[1]) in NEWER_INSTRUCTIONS and start[:1] in (b"P", b"\x80"):
        return DinobenchError(
            f"{path} was pickled by a protocol that torch does not read safely ({reason}), expected protocol 2 or a "
            "safetensors file: load it where it was made and write it with torch.save's defaults"
        )
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
