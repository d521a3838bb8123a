"""A file of which nobody reads more than there is."""

from __future__ import annotations

import io
import os
from pathlib import Path


class ClippedFile(io.BufferedReader):
    """For the readers of formats that state their lengths: Python sets memory aside for as much as is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, max(0, self._size - self.tell())))
