"""Files made to do harm, or no files at all: refused within seconds, with what to do."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.errors import DinobenchError
from pretrain.models import file_checks, pickle_checks
from pretrain.models.checkpoint_file import read, save, save_safetensors


@pytest.fixture(autouse=True)
def _within_seconds() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", r"is a web page.*'<!DOCTYPE html>.*curl -L"),
        (b"\n <HTML>Sign in</HTML>", r"is a web page"),
        (b"\xef\xbb\xbf<html>", r"is a web page"),
        ("<html>".encode("utf-16"), r"is a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', r"is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"Git LFS pointer.*git lfs pull"),
    ],
)
def test_failed_download_is_told_as_such(tmp_path: Path, content: bytes, told: str) -> None:
    for name in ("dino_deitsmall16_pretrain.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DinobenchError, match=told) as caught:
            read(tmp_path / name)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x1f\x8b\x08\0rest", r"compressed with gzip.*unpack it first"),
        (b"\x93NUMPY\x01\0", r"is a NumPy array.*state dict"),
        (b'{"error": "not found"}', r"is JSON.*index"),
        (b"a.pth".ljust(257, b"\0") + b"ustar\x0000", r"is a tar archive.*unpack it"),
        (b"\xff\xd8\xff\xe0 JFIF", r"is not a checkpoint \(9 bytes"),
    ],
)
def test_files_of_other_formats_are_told_as_such(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(DinobenchError, match=told) as caught:
        read(tmp_path / "a.pth")
    assert caught.value.exit_code == 3


def test_zips_of_other_programs_are_told_as_such(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", weights=np.zeros(3))
    with pytest.raises(DinobenchError, match=r"holds NumPy arrays \(npz\)"):
        read(tmp_path / "a.npz")
    program = zipfile.ZipFile(tmp_path / "a.pt", "w")
    with program:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            program.writestr(f"a/{name}", b"")
    with pytest.raises(DinobenchError, match=r"TorchScript program.*state_dict of the module"):
        read(tmp_path / "a.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    for path in (tmp_path / "a.pth", Path(os.devnull)):
        with pytest.raises(DinobenchError, match="is a device or a pipe"):
            read(path)


def many_records(path: Path, number: int, wide: bool) -> None:
    """A zip whose list has this many records, all of one empty entry."""
    entry = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 8, 0) + b"arc/data"
    record = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0) + b"arc/data"
    listed = len(record) * number
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, number & 0xFFFF, number & 0xFFFF, listed, len(entry), 0)
    if wide:
        place = len(entry) + listed
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, listed, len(entry))
        end += struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)
        end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(entry + record * number + end)


@pytest.mark.parametrize("wide", [False, True], ids=["zip", "zip64"])
def test_zip_with_a_million_records_is_refused_before_it_is_listed(tmp_path: Path, wide: bool) -> None:
    many_records(tmp_path / "a.pt", 1_000_000, wide)
    started = time.monotonic()
    with pytest.raises(DinobenchError, match=r"lists its records on 54000000 bytes.*busy for minutes"):
        read(tmp_path / "a.pt")
    assert time.monotonic() - started < 2


def test_every_zip_of_torch_tells_the_size_of_its_list(tmp_path: Path) -> None:
    torch.save({str(number): torch.zeros(1) for number in range(300)}, tmp_path / "a.pt")
    assert 300 * 50 < file_checks._directory_bytes(tmp_path / "a.pt") < 300 * 200
    (tmp_path / "b.pt").write_bytes(b"no zip")
    assert file_checks._directory_bytes(tmp_path / "b.pt") == 0


def test_newer_pickle_protocol_is_told_as_such(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(DinobenchError, match="pickled by a protocol that torch does not read safely"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("part", [0.2, 0.9])
def test_truncated_safetensors_are_told_as_such(tmp_path: Path, part: float) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"w": torch.randn(1000)}, {"format": "pt"})
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DinobenchError, match="truncated or damaged"):
        read(path)


def test_safetensors_that_declare_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(DinobenchError, match="truncated or damaged"):
        read(tmp_path / "a.safetensors")


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """The same archive with its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(path, {"w": torch.zeros(4)})
    rewritten(path, lambda name, content: bytes(300_000_000) if "/data/" in name else content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    for mmap in (False, True):
        with pytest.raises(DinobenchError, match=r"unpacks to 3\d{8} bytes.*can fill the memory.*zip -0"):
            read(path, mmap=mmap)


def test_records_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Many entries of the directory at one place in the file: nothing is compressed, yet it unpacks to a lot."""
    path = tmp_path / "a.pt"
    save(path, {"w": torch.zeros(25_000)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    buffer = io.BytesIO(whole)
    with zipfile.ZipFile(buffer, "a") as archive:
        for number in range(50):
            twin = zipfile.ZipInfo(f"{record.filename}{number}")
            twin.file_size, twin.compress_size, twin.CRC = record.file_size, record.compress_size, record.CRC
            twin.header_offset = record.header_offset
            archive.filelist.append(twin)
        archive._didModify = True
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DinobenchError, match="unpacks to"):
        read(path)


class Repeated:
    """Unpickles as a tensor of a trillion numbers, all of them one stored number."""

    def __init__(self, shape: tuple[int, ...]):
        self.tensor, self.shape = torch.zeros(1), shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = (0,) * len(self.shape)
        storage = self.tensor.storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, stride, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("zipped", [True, False])
def test_tensor_larger_than_its_file_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"teacher": {"w": Repeated((10**6, 10**6))}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DinobenchError, match=r"claim 4000000000000 bytes, the file has \d+"):
        read(path)


def test_storage_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    small, large = (b"M" + struct.pack("<H", 1_000), b"J" + struct.pack("<i", 2_000_000_000))
    for name, zipped in (("new.pt", True), ("old.pt", False)):
        path = tmp_path / name
        torch.save({"w": torch.zeros(1_000)}, path, _use_new_zipfile_serialization=zipped)
        if zipped:
            rewritten(path, lambda record, content: content.replace(small, large) if "pkl" in record else content)
        else:
            path.write_bytes(path.read_bytes().replace(small, large))
        with pytest.raises(DinobenchError, match="truncated or damaged|not a checkpoint|claim"):
            read(path, mmap=zipped)


def test_memory_asked_for_by_a_number_is_refused(tmp_path: Path) -> None:
    """bytearray(n) is among what torch lets a file call."""

    class Zeros:
        def __reduce__(self) -> tuple[Any, ...]:
            return bytearray, (1 << 40,)

    for name, zipped in (("new.pt", True), ("old.pt", False)):
        torch.save({"w": Zeros()}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(DinobenchError, match=r"asks to unpickle (builtins|__builtin__)\.bytearray"):
            read(tmp_path / name)


def test_endless_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_checks, "MAX_OPCODES", 1000)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(list(range(2000)), protocol=2))
    with pytest.raises(DinobenchError, match="more than 1000 pickle instructions"):
        read(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(DinobenchError, match="save dense ones"):
        read(tmp_path / "a.pt")


def test_tied_and_nested_tensors_are_no_bomb(tmp_path: Path) -> None:
    """iBOT's shared prototypes have two names; a list may hold itself."""
    tied = torch.randn(1000)
    loop: list[Any] = [tied]
    loop.append(loop)
    torch.save({"a": tied, "b": tied, "c": tied[:10], "d": loop}, tmp_path / "a.pt")
    assert torch.equal(read(tmp_path / "a.pt")["b"], tied)
    many = {str(number): torch.randn(()) for number in range(100)}
    torch.save(many, tmp_path / "b.pt")
    assert len(read(tmp_path / "b.pt")) == 100
