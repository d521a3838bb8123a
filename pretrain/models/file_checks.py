"""What is checked around the reading of a checkpoint that somebody else made.

Before: the file is no web page, no Git LFS pointer, no other format and no zip that unpacks to more than it holds; of
its pickle see pickle_checks. After: the tensors are not larger than the file they came from.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import DinobenchError

MAX_DIRECTORY_BYTES = 2**24
"""Of a zip's list of records, some 80 bytes each; listing a million of them takes a minute."""
_OTHER_FORMATS = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it first"),
    b"\x93NUMPY": ("a NumPy array", "save a network's state dict with torch.save"),
    b"\x89HDF": ("an HDF5 file (Keras)", "convert it to a state dict of torch"),
    b"{": ("JSON", "give the weights, or the index `*.safetensors.index.json` of a file in parts under its own name"),
}
"""First bytes -> what the file is and what to do."""


def check_start(path: Path) -> None:
    """Refuse what a failed download leaves behind.

    Raises:
        DinobenchError: a web page, a Git LFS pointer or a file of another format.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    start = head[:256].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")
    if start.startswith(b"<"):
        raise DinobenchError(
            f"{path} is a web page ({path.stat().st_size} bytes, it begins with {_quoted(start)}), expected a torch or "
            "safetensors file: the link answered with a page; download the file itself, for example with curl -L"
        )
    if start.startswith(b"version https://git-lfs"):
        raise DinobenchError(
            f"{path} is a Git LFS pointer, expected a torch or safetensors file: run `git lfs pull` beside it"
        )
    known = next((told for magic, told in _OTHER_FORMATS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        known = "a tar archive", "unpack it and give the file in it"
    if known is not None:
        raise DinobenchError(f"{path} is {known[0]}, expected a torch or safetensors file: {known[1]}")


def check_zip(path: Path) -> None:
    """Refuse an archive that would unpack to more than the file holds; torch stores its records uncompressed.

    Raises:
        DinobenchError: compressed or overlapping records, very many of them, or those of another kind of file.
    """
    if (listed := _directory_bytes(path)) > MAX_DIRECTORY_BYTES:
        raise DinobenchError(
            f"{path} lists its records on {listed} bytes, expected {MAX_DIRECTORY_BYTES} at most: no network has so "
            "many tensors. It is refused because such a file can keep a reader busy for minutes; take another one"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # torch says what is wrong with it
    names = [record.filename for record in records]
    if any(name.endswith("/constants.pkl") for name in names):
        raise DinobenchError(
            f"{path} is a TorchScript program, expected weights: save the state_dict of the module "
            "(torch.save(torch.jit.load(path).state_dict(), new_path)) where you trust it"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise DinobenchError(f"{path} holds NumPy arrays (npz), expected a torch or safetensors file: save it as one")
    declared, size = sum(record.file_size for record in records), path.stat().st_size
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or declared > size:
        raise DinobenchError(
            f"{path} ({size} bytes) unpacks to {declared} bytes, expected the uncompressed records that torch.save "
            "writes. It is refused because such a file can fill the memory: if you trust it, unpack it and pack it "
            "again with `zip -0`"
        )


def check_records(path: Path) -> None:
    """Refuse a file of ours that is cut short, or whose bytes are not those that were written.

    Raises:
        DinobenchError: a record does not have its checksum, or the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DinobenchError(f"{path} is truncated or damaged ({error}): copy it again or take another one") from error
    if record is not None:
        raise DinobenchError(
            f"{path} is damaged: the checksum of its record {record} does not match; copy it again or take another one"
        )


def unpickling_refused(path: Path, names: list[str]) -> DinobenchError:
    """The error for a file that asks for these classes or functions."""
    return DinobenchError(
        f"{path} asks to unpickle {', '.join(names)}; expected tensors, plain values and argparse.Namespace only. It "
        "is refused because unpickling runs code from the file: where it was made, save its state dicts alone in a "
        "new file (torch.save({'teacher': network.state_dict()}, path)) and give that"
    )


def check_sizes(payload: Any, path: Path) -> None:
    """Refuse tensors that claim more than the file can hold (a view that repeats one number a trillion times).

    Raises:
        DinobenchError: names the sizes.
    """
    size = path.stat().st_size
    views = {
        (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape)): tensor.numel() * tensor.element_size()
        for tensor in _tensors_in(payload, path)
    }
    # Twice: a tensor and a part of it may both be there under names of their own.
    if sum(views.values()) > 2 * size:
        raise DinobenchError(
            f"the tensors in {path} claim {sum(views.values())} bytes, the file has {size}: it is damaged or made to "
            "fill the memory; take another one"
        )


def _directory_bytes(path: Path) -> int:
    """Bytes of the list of records of a zip, by the larger of what its ends say; 0 where there is none."""
    end, locator, wide = b"PK\5\6", b"PK\6\7", b"PK\6\6"
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 2**16 - 100))
        tail = file.read()
        place = tail.rfind(end)
        if place < 0 or len(tail) < place + 22:
            return 0
        found = [struct.unpack_from("<I", tail, place + 12)[0]]
        if found[0] == 0xFFFFFFFF:  # a placeholder: the number is in the wide record
            found = [0]
        where = tail.rfind(locator, 0, place)
        if 0 <= where == place - 20:
            starts = (struct.unpack_from("<Q", tail, where + 8)[0], size - len(tail) + where - 56)
            for start in starts:
                if 0 <= start <= size - 56:
                    file.seek(start)
                    record = file.read(56)
                    found += [struct.unpack_from("<Q", record, 40)[0]] if record.startswith(wide) else []
    return max(found)


def _tensors_in(payload: Any, path: Path) -> list[Tensor]:
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [payload]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise DinobenchError(f"{path} holds sparse, quantised or empty tensors: save dense ones")
            found.append(value)
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found


def _quoted(start: bytes) -> str:
    return repr(start[:20].decode("ascii", "replace"))
