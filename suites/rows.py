"""A file of features written row by row, by one process or several, without holding them in memory.

It is a safetensors file of two tensors, so that reading it maps it into memory:

    features  [K, W] float32 or float16
    index     [K] int64: the number of each row in the set it was made from, ascending

The file is created at its full size, N >= K rows; the header is written last. Until then no reader takes it for whole,
even under its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

HEADER_BYTES = 2**16
"""Reserved for the header, in which the length takes the first 8 bytes."""
COPY_BYTES = 2**24
"""Bytes that are moved at a time."""
_NAMES = {torch.float32: "F32", torch.float16: "F16"}


class RowFile:
    """A file of N rows of W values that is being written. At the end of a `with` block it is closed."""

    def __init__(self, path: Path, num_rows: int, width: int, dtype: torch.dtype):
        """The file must exist, see `create`; every process that writes opens it for itself."""
        self.path, self.num_rows, self.width, self.dtype = path, num_rows, width, dtype
        self._file: BinaryIO = path.open("r+b")

    @classmethod
    def create(cls, path: Path, num_rows: int, width: int, dtype: torch.dtype) -> RowFile:
        """A new file with its room on the disk taken.

        Raises:
            OSError: the folder cannot be written, or the disk has no such room: now, and not after hours.
        """
        size = HEADER_BYTES + num_rows * (width * dtype.itemsize + 8)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        return cls(path, num_rows, width, dtype)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, start: int, values: Tensor) -> None:
        """Rows `start`, `start + 1`, ... from values [B, W]."""
        assert values.shape[1] == self.width and start + len(values) <= self.num_rows, (values.shape, start)
        self._file.seek(self._place(start))
        self._file.write(_bytes(values.to(self.dtype)))

    def close(self) -> None:
        """What was written is then in the file, for other processes too."""
        self._file.close()

    def finish(self, dropped: list[int], metadata: dict[str, str]) -> None:
        """Leave out the rows `dropped`, then write index, checksum and header: the file is whole.

        By one process, after all others have closed it.
        """
        kept = torch.ones(self.num_rows, dtype=torch.bool)
        kept[dropped] = False
        index = kept.nonzero().flatten()
        if dropped:
            self._close_gaps(kept)
        self._file.seek(self._place(len(index)))
        self._file.write(_bytes(index))
        self._file.truncate()
        self._write_header(len(index), {**metadata, "checksum": ""})
        self._file.flush()
        with safe_open(self.path, framework="pt") as file:
            found = checksum({name: file.get_tensor(name) for name in ("features", "index")})
        self._write_header(len(index), {**metadata, "checksum": found})
        self._file.flush()

    def _place(self, row: int) -> int:
        return HEADER_BYTES + row * self.width * self.dtype.itemsize

    def _close_gaps(self, kept: Tensor) -> None:
        """Move the rows that are kept [N] together; rows move forward only, so blocks can be moved in place."""
        size = self.width * self.dtype.itemsize
        block, place = max(1, COPY_BYTES // max(size, 1)), 0
        for start in range(0, self.num_rows, block):
            self._file.seek(self._place(start))
            number = min(block, self.num_rows - start)
            rows = torch.frombuffer(bytearray(self._file.read(number * size)), dtype=torch.uint8).view(number, size)
            rows = rows[kept[start : start + number]]
            self._file.seek(self._place(place))
            self._file.write(_bytes(rows))
            place += len(rows)

    def _write_header(self, num_rows: int, metadata: dict[str, str]) -> None:
        middle = num_rows * self.width * self.dtype.itemsize
        header = {
            "__metadata__": metadata,
            "features": {
                "dtype": _NAMES[self.dtype],
                "shape": [num_rows, self.width],
                "data_offsets": [0, middle],
            },
            "index": {"dtype": "I64", "shape": [num_rows], "data_offsets": [middle, middle + 8 * num_rows]},
        }
        text = json.dumps(header).encode()
        room = HEADER_BYTES - 8
        assert len(text) <= room, f"metadata of {len(text)} bytes"
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + text.ljust(room))


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values; of a file mapped into memory without holding it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview | bytes:
    return tensor.contiguous().numpy().data.cast("B") if tensor.numel() else b""
