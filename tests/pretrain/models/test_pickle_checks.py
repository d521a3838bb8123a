"""Files of a kilobyte that take the memory or the time of a machine: refused before torch reads them."""

from __future__ import annotations

import io
import pickle
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.clipped_file import ClippedFile
from pretrain.errors import DinobenchError
from pretrain.models.checkpoint_file import read
from pretrain.models.pickle_checks import check_pickle


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def in_a_list(program: bytes) -> bytes:
    """{"a": [...]} of what the program leaves on the stack."""
    return b"\x80\x02}" + text("a") + b"](" + program + b"es."


def doubled_by_hex(times: int) -> bytes:
    program = b"c_codecs\nencode\nq\0h\0" + text("x" * 1000) + text("latin1") + b"\x86Rq\1"
    for number in range(times):
        program += b"h\0h" + bytes([number + 1]) + text("hex") + b"\x86Rq" + bytes([number + 2])
    return in_a_list(program)


def nested_tuples(levels: int) -> bytes:
    """((..), (..)), each level twice the one below: 2^levels, in a few bytes each."""
    program = b")q\0"
    for number in range(levels):
        program += b"h" + bytes([number]) * 1 + b"h" + bytes([number]) + b"\x86q" + bytes([number + 1])
    return program


def copied_by(name: str, times: int) -> bytes:
    numbers = b"".join(b"J" + struct.pack("<i", number) for number in range(times))
    return in_a_list(b"]q\0(" + numbers + b"ec" + name.encode() + b"\nq\1" + b"h\1h\0\x85R" * times)


def copy_of_a_repeated_number() -> bytes:
    """torch lets a file call what copies a tensor to another type."""
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n)Rs."


BOMBS = {
    "bytes doubled 40 times by hex": (doubled_by_hex(40), r"_codecs\.encode to something else than latin1"),
    "a key of 2^60 tuples": (in_a_list(nested_tuples(60))[:-2] + b"eh\x3cK\1s.", "repeats its values"),
    "5000 sets of 5000 numbers": (copied_by("__builtin__\nset", 5000), "repeats its values"),
    "5000 counters of 5000 numbers": (copied_by("collections\nCounter", 5000), "repeats its values"),
    "5000 sizes of 5000 numbers": (copied_by("torch\nSize", 5000), "repeats its values"),
    "a copy of an expanded tensor": (copy_of_a_repeated_number(), "_rebuild_device_tensor_from_cpu_tensor"),
}


def legacy(program: bytes) -> bytes:
    """The program where a file of the time before torch 1.6 has its payload."""
    file = io.BytesIO()
    torch.save({}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    for _ in range(3):
        pickle.load(file)
    return file.getvalue()[: file.tell()] + program


def zipped(program: bytes, *, decoy: bool = False) -> bytes:
    """The program as the pickle of a zip, behind a harmless one that torch does not read."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/version", b"3\n")
        if decoy:
            archive.writestr("decoy/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data.pkl", program)
    return file.getvalue()


@pytest.mark.promise(
    "pickle of a kilobyte that unfolds to more than a machine holds", "refused within a second; exit code 3"
)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_are_read(tmp_path: Path, bomb: str) -> None:
    program, told = BOMBS[bomb]
    for content in (legacy(program), zipped(program), zipped(program, decoy=True)):
        (tmp_path / "a.pt").write_bytes(content)
        started = time.process_time()
        with pytest.raises(DinobenchError, match=told) as caught:
            read(tmp_path / "a.pt")
        assert caught.value.exit_code == 3
        assert time.process_time() - started < 1


def test_what_real_files_hold_is_no_bomb(tmp_path: Path) -> None:
    shared = (0.9, 0.999)
    weights = OrderedDict((f"blocks.{number}.weight", torch.zeros(2)) for number in range(2000))
    payload = {
        "teacher": weights,
        "student": weights,
        "optimizer": {"param_groups": [{"betas": shared, "lr": np.float64(0.1)} for _ in range(2000)]},
        "milestones": Counter({30: 1, 60: 1}),
        "flags": {1, 2, 3},
        "hash": b"\0\xff" * 100,
    }
    for new in (True, False):
        torch.save(payload, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        check_pickle(tmp_path / "a.pt")
        assert len(read(tmp_path / "a.pt")["teacher"]) == 2000


def test_no_more_is_read_than_there_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345\n678")
    with ClippedFile(tmp_path / "a") as file:
        assert (file.readline(), file.read(1 << 62), file.read(5)) == (b"12345\n", b"678", b"")
        file.seek(1)
        assert file.read() == b"2345\n678"
