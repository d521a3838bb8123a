from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.stores import open_store
from pretrain.errors import DinobenchError

NAMES = ["train/a/1.png", "train/b/2.png", "val/a/3.jpg"]


def pack(root: Path, target: Path) -> Path:
    """The folder as an archive of the target's kind."""
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(root.rglob("*.*")):
                archive.write(path, path.relative_to(root))
    else:
        mode = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}[target.suffix]
        with tarfile.open(target, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for path in sorted(root.rglob("*.*")):
                archive.add(path, str(path.relative_to(root)))
    return target


@pytest.mark.parametrize("kind", ["folder", "pack.tar", "pack.tar.gz", "pack.tar.xz", "pack.zip"])
def test_every_kind_of_store_holds_the_same_files(write_images: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    root = write_images("data", NAMES)
    store = open_store(root if kind == "folder" else pack(root, tmp_path / kind))
    assert sorted(store.sizes) == NAMES
    # As in a worker process: what was open stays behind.
    for reader in (store, pickle.loads(pickle.dumps(store))):
        for name in reversed(NAMES):
            assert reader.read(name) == (root / name).read_bytes()
            assert store.sizes[name] == (root / name).stat().st_size


@pytest.mark.promise("an archive of images cut short", "named; exit 3")
@pytest.mark.parametrize("kind", ["pack.tar", "pack.tar.gz", "pack.zip"])
def test_a_truncated_archive_is_named(write_images: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    archive = pack(write_images("data", NAMES), tmp_path / kind)
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(DinobenchError, match=f"{kind}.*"):
        open_store(archive)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match="no such folder or archive"):
        open_store(tmp_path / "missing")
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(DinobenchError, match=r"neither a folder nor an archive \(.tar"):
        open_store(tmp_path / "x.rar")


def test_hidden_files_and_links_in_archives_are_left_out(write_images: Callable[..., Path], tmp_path: Path) -> None:
    root = write_images("data", ["a.png", ".cache/b.png", ".c.png"])
    assert list(open_store(root).sizes) == ["a.png"]
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        archive.add(root / "a.png", "a.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert list(open_store(tmp_path / "links.tar").sizes) == ["a.png"]
