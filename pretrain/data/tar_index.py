"""Where each file of an uncompressed tar lies, so that it is read without unpacking the archive.

Format: POSIX.1-1988 (ustar), one header of 512 bytes before the content of each file, and a block of zeros at the end.
The headers are read in place, because Python's `tarfile` takes several times as long and a large set of shards has
millions of them. `tarfile` reads what is rare: long names, links, sparse files, sizes of 8 GiB and more.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from pathlib import Path

from pretrain.clipped_file import ClippedFile

BLOCK = 512
_KINDS = (b"0", b"5", b"x")
"""A file, a folder, an extended header."""
_OTHER = (b"path=", b"size=", b"GNU.sparse")
"""What an extended header says of the file behind it where the plain header has no room for it."""
Index = dict[str, tuple[int, int]]
"""Name of a file -> its first byte in the archive, and its size."""


def read_index(path: Path) -> Index:
    """The regular files of an archive, in its order.

    Raises:
        tarfile.TarError: it is no tar, damaged, or ends too early.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size >= BLOCK:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                index = _plain_index(content)
                if index is not None:
                    return index
    return _any_index(path)


def _plain_index(content: mmap.mmap) -> Index | None:
    """The index of an archive of plain files and folders only; None for any other."""
    index: Index = {}
    place, end = 0, len(content)
    while place + BLOCK <= end:
        header = content[place : place + BLOCK]
        if not any(header):
            return index
        size, start = _size(header), place + BLOCK
        if size is None:
            return None
        place = start + -(-size // BLOCK) * BLOCK
        if place > end:
            return None
        kind = header[156:157]
        if kind == b"0":
            index[header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")] = start, size
        # An extended header of times and owners leaves name and size to the plain one.
        elif size and (kind == b"5" or any(word in content[start:place] for word in _OTHER)):
            return None
    return None


def _size(header: bytes) -> int | None:
    """The size in the undamaged header of a file, folder or extended header with its name in one piece, else None."""
    if header[156:157] not in _KINDS or header[257:262] != b"ustar" or header[135] > ord(" ") or header[345]:
        return None
    try:
        size, checksum = int(header[124:135], 8), int(header[148:154], 8)
    except ValueError:
        return None
    # The sum of all bytes, those of the checksum counted as blanks.
    return size if checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ") else None


def _any_index(path: Path) -> Index:
    index: Index = {}
    with ClippedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isreg() and not member.issparse():
                index[member.name] = member.offset_data, member.size
        end = archive.offset
    # Python's reader takes a damaged header, or the end of the file, for the end of the archive.
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(BLOCK)
    if len(block) < BLOCK or any(block):
        raise tarfile.ReadError(f"no header and no end of the archive at byte {end}")
    return index
