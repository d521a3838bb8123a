"""The headers read in place say what Python's reader says; what is damaged is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pretrain.data import tar_index
from pretrain.data.tar_index import read_index

LONG = "/".join(["a" * 60] * 3) + ".jpg"


def _write(path: Path, names: list[str], *, form: int = tarfile.PAX_FORMAT, mtime: float = 1.5) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 400 * number, mtime
            archive.addfile(info, io.BytesIO(bytes([number % 256]) * info.size))
    return path


def _by_tarfile(path: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(path) as archive:
        return {member.name: (member.offset_data, member.size) for member in archive if member.isreg()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", [["0.jpg", "x/1.cls", "./2.json"], ["0.jpg", LONG], ["ä.jpg", "b" * 100], []])
def test_every_format_gives_what_tarfile_gives(tmp_path: Path, names: list[str], form: int) -> None:
    path = _write(tmp_path / "x.tar", names, form=form)
    found = read_index(path)
    assert list(found.items()) == list(_by_tarfile(path).items()) and len(found) == len(names)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_usual_archives_are_read_in_place(tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "x.tar", ["0.jpg", "x/1.cls"], form=form)
    monkeypatch.setattr(tar_index, "_any_index", None)
    assert list(read_index(path)) == ["0.jpg", "x/1.cls"]


def test_links_are_no_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("a.png"))
    assert list(read_index(tmp_path / "x.tar")) == ["a.png"]


# Of five files of 0, 400, ... bytes after a folder: in a header, in a file, between two files, before the end.
@pytest.mark.parametrize("length", [100, 800, 512 * 5 + 20, 512 * 7, 512 * 8])
def test_an_archive_that_ends_too_early_is_refused(tmp_path: Path, length: int) -> None:
    path = _write(tmp_path / "x.tar", [f"{k}.jpg" for k in range(5)], form=tarfile.USTAR_FORMAT)
    assert len(path.read_bytes().rstrip(b"\0")) > length
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(tarfile.TarError):
        read_index(path)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tar", [f"{k}.jpg" for k in range(5)], form=tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    place = content.index(b"3.jpg")
    content[place] = ord("7")
    path.write_bytes(content)
    with pytest.raises(tarfile.TarError, match=f"at byte {place}"):
        read_index(path)
