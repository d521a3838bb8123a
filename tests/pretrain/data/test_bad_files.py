"""Files that once ended with a traceback, without end, or with the memory of the machine: found by generated input."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data import embedded, stores
from pretrain.data.datasets import open_dataset
from pretrain.data.embedded import read_idx
from pretrain.data.folders import open_npz
from pretrain.data.images import decode
from pretrain.data.stores import FolderStore, open_store
from pretrain.errors import DinobenchError


def npz(path: Path, **arrays: np.ndarray | bytes) -> Path:
    """An archive of arrays, or of the bytes of such."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            content = io.BytesIO()
            if isinstance(value, bytes):
                content.write(value)
            else:
                np.lib.format.write_array(content, value)
            archive.writestr(f"{name}.npy", content.getvalue())
    return path


@contextmanager
def taking_at_most(size: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def header(shape: str, kind: str = "|u1") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


IMAGES = np.zeros((4, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.array([0, 1, 0, 2**60]), "the largest label is 1152921504606846976"),
        (np.array(3), "expected one whole number >= 0 each"),
        (np.zeros((4, 2), int), "expected one whole number >= 0 each"),
        (np.zeros(0, int), "expected one whole number >= 0 each"),
        (np.array(["a"] * 4), "expected a NumPy archive of numbers"),
        (np.zeros(4, "M8[s]"), "expected a NumPy archive of numbers|whole number"),
        (np.zeros(4, complex), "expected a NumPy archive of numbers|whole number"),
        (header("(1000000000000,)"), "declares uint8 .1000000000000,., more than the file holds"),
        (header("(40000, 40000)"), "more than the file holds"),
        (header("(2**99,)"), "expected a NumPy archive of numbers"),
        (header("(4,)", "|O"), "expected a NumPy archive of numbers|more than the file holds"),
        (b"", "expected a NumPy archive of numbers"),
    ],
    ids=lambda value: "" if isinstance(value, (np.ndarray, bytes)) else None,
)
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: np.ndarray | bytes, told: str) -> None:
    with pytest.raises(DinobenchError, match=told):
        open_npz(npz(tmp_path / "a.npz", images=IMAGES, labels=labels), "train", "a")


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "u8", ">i4"])
def test_labels_of_any_whole_numbers_are_read(tmp_path: Path, kind: str) -> None:
    """MedMNIST has uint8, of which no maximum begins at -1."""
    labels = np.array([0, 1, 9, 3], kind)
    found = open_npz(npz(tmp_path / "a.npz", images=IMAGES, labels=labels), "train", "a")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 9, 3]
    assert len(found.classes) == 10


@pytest.mark.parametrize("shape", [(4, 0, 0), (4, 1, 900), (4, 900, 1)])
def test_images_without_pixels_and_strips_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DinobenchError, match="has images of"):
        open_npz(npz(tmp_path / "a.npz", images=np.zeros(shape, np.uint8)), "train", "a")


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images", b"raw bytes")
    with pytest.raises(DinobenchError, match="images is"):
        open_npz(tmp_path / "a.npz", "train", "a")


@pytest.mark.parametrize(
    "content",
    [
        bytes([0, 0, 8, 100]) + struct.pack(">I", 1) * 100 + b"\0",
        bytes([0, 0, 8, 0]),
        bytes([0, 0, 8, 4]) + struct.pack(">IIII", 2**31, 2**31, 4, 0),
        bytes([0, 0, 8, 2]) + struct.pack(">II", 2**32 - 1, 2**32 - 1),
    ],
    ids=["100 axes", "no axis", "an overflow", "more than there is"],
)
def test_idx_files_of_strange_shapes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DinobenchError, match="announces"):
        read_idx(tmp_path / "a")


def test_an_idx_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_MAX_IDX_BYTES", 1 << 20)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(50 << 20)))
    with taking_at_most(8 << 20), pytest.raises(DinobenchError, match="more than 1 MiB"):
        read_idx(tmp_path / "a.gz")


def test_a_strip_is_no_image() -> None:
    """1 x 65,535 pixels are a few bytes; with the short side at 256 they would be four billion."""
    content = io.BytesIO()
    Image.new("1", (1, 65535)).save(content, "PNG")
    with pytest.raises(ValueError, match="1 x 65535 pixels: a side is over 200 times the other"):
        decode(content.getvalue(), 256)


def test_a_part_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES[:1])
    with pytest.raises(DinobenchError, match=r"1 images in 'train', too few for the part 'train\[:0\.3\]'"):
        open_dataset(f"npz:{tmp_path / 'a.npz'}", "train[:0.3]")


def test_links_to_the_folders_around_them_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").write_bytes(b"")
    for name in ("one", "two", "three"):  # three: 3^40 paths
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to("a")
    assert sorted(FolderStore(tmp_path).sizes) == ["a/b/x.png", "elsewhere/b/x.png"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_a_pipe_is_no_archive(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(DinobenchError, match="neither a folder nor an archive"):
        open_store(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300], ids=ascii)
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    for uri in (f"folder:/nowhere/{name}.zip", f"npz:/nowhere/{name}.npz"):
        with pytest.raises(DinobenchError):
            open_dataset(uri)


def test_headers_of_a_compressed_tar_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files may be of any length, and are read before any size is known."""
    monkeypatch.setattr(stores, "MAX_COMPRESSED_TAR_BYTES", 1 << 20)
    info = tarfile.TarInfo("x" * (20 << 20))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
    with taking_at_most(12 << 20), pytest.raises(DinobenchError, match="too much to keep in memory"):
        open_store(tmp_path / "a.tar.gz")


def test_a_tar_that_states_a_length_is_not_believed(tmp_path: Path) -> None:
    """Of its next header: eight exbibytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("x" * 200))
    content = bytearray(buffer.getvalue())
    content[124:136] = b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "a.tar").write_bytes(bytes(content))
    try:
        assert open_store(tmp_path / "a.tar").sizes == {}
    except DinobenchError as error:
        assert "cannot read" in str(error)
