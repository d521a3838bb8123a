"""Numbers of NumPy in a pickle, read without NumPy.

The official training code of DINO and iBOT takes learning rate and weight decay of the optimiser from an array, so its
checkpoints hold `numpy.float64` objects: a pickle that calls `numpy.core.multiarray.scalar(numpy.dtype(...), bytes)`.
Both names are answered by the stand-ins below, which can do nothing but turn up to 8 bytes into a Python number.
Arrays stay refused.
"""

from __future__ import annotations

import struct
from typing import Any

_FORMATS = {
    "b1": "?",
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}


class NumberType:
    """In place of numpy.dtype: a name such as `f8`, then a state with the byte order."""

    def __init__(self, name: str, *_: Any):
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """`state` = (version, byte order, ...)."""
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


def number(kind: NumberType, content: bytes) -> bool | int | float:
    """In place of numpy's `scalar`.

    Raises:
        ValueError: not a plain number, or not its number of bytes.
    """
    form = _FORMATS.get(str(kind.name)) if isinstance(kind, NumberType) else None
    if form is None or not isinstance(content, bytes) or len(content) != struct.calcsize(f"={form}"):
        raise ValueError(f"a NumPy scalar of type {getattr(kind, 'name', kind)!r} is no plain number")
    return struct.unpack(f"{kind.order}{form}", content)[0]


STAND_INS: tuple[tuple[Any, str], ...] = (
    (number, "numpy.core.multiarray.scalar"),
    (number, "numpy._core.multiarray.scalar"),
    (NumberType, "numpy.dtype"),
)
"""What answers to which name."""
