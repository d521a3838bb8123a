"""NumPy's numbers in the pickle of an optimiser, read without NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.errors import DinobenchError
from pretrain.models.checkpoint_file import read
from pretrain.models.numpy_numbers import NumberType, number

TYPES = (
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_plain_number_comes_back(tmp_path: Path, order: str, zipped: bool) -> None:
    values = {name: np.array(1.0).astype(np.dtype(name).newbyteorder(order))[()] for name in TYPES}
    values["lr"] = np.linspace(0, 1, 7)[2]
    values["negative"] = np.int64(-5)
    torch.save({"optimizer": values}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "a.pth")["optimizer"]
    assert found == {name: value.item() for name, value in values.items()}
    assert all(type(value) in (bool, int, float) for value in found.values())


@pytest.mark.parametrize(
    "value", [np.zeros(2), np.complex64(1), np.datetime64("2020-01-01"), np.str_("x"), np.void(b"x")]
)
def test_everything_else_of_numpy_stays_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"w": value}, tmp_path / "a.pth")
    with pytest.raises(DinobenchError, match=r"asks to unpickle numpy|no plain number"):
        read(tmp_path / "a.pth")


def test_number_of_bytes_and_type_are_checked() -> None:
    big_endian = NumberType("i2", False, True)
    big_endian.__setstate__((3, ">", None))
    assert number(big_endian, b"\x01\x00") == 256
    for kind, content in ((NumberType("f8"), b"1234"), (NumberType("O"), b"12345678"), ("f8", b"12345678")):
        with pytest.raises(ValueError, match="no plain number"):
            number(kind, content)  # type: ignore[arg-type]
