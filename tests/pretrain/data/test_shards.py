"""Tar shards in WebDataset's naming: the batches of the same images in folders, and errors that name shard and file."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from pretrain.data import shards
from pretrain.data.datasets import dataset_label, open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.loader import Batch, Loader
from pretrain.data.shards import open_shards, shard_paths
from pretrain.data.views import ViewsConfig
from pretrain.errors import DinobenchError, UsageError
from tests.pretrain.data.conftest import encoded

Write = Callable[..., Path]
VIEWS = ViewsConfig(backend="batched", global_size=16, local=1, local_size=8)
CLASSES = ["ant", "bee", "cat"]


def _shard(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _samples(numbers: range, label: str = "cls") -> dict[str, bytes]:
    """Images with a label each, which is their number modulo 3."""
    files = {}
    for k in numbers:
        files[f"{k:04}.png"] = encoded(k, size=(12 + k, 10))
        files[f"{k:04}.{label}"] = b"%d\n" % (k % 3) if label == "cls" else json.dumps({"label": k % 3}).encode()
    return files


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Three shards of 4, 4 and 3 images."""
    for number, numbers in enumerate([range(4), range(4, 8), range(8, 11)]):
        _shard(tmp_path / f"train-{number:06}.tar", _samples(numbers))
    return f"{tmp_path}/train-{{000000..000002}}.tar"


@pytest.fixture
def folder(tmp_path: Path) -> ImageSet:
    """The same images in class folders, in the order of the shards."""
    for k in range(11):
        path = tmp_path / "folder" / CLASSES[k % 3] / f"{k:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k, size=(12 + k, 10)))
    images = open_dataset(f"folder:{tmp_path / 'folder'}")
    return images.subset(sorted(range(11), key=lambda number: Path(images.path(number)).name))


def _batches(images: ImageSet, start: int = 0, **options: int) -> list[Batch]:
    return list(itertools.islice(Loader(images, VIEWS, batch_size=4, seed=3, **options).batches(start), 6 - start))


def _assert_same(a: list[Batch], b: list[Batch]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.epoch == y.epoch and torch.equal(x.index, y.index)
        assert all(map(torch.equal, x.views, y.views))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_batches_of_the_same_images_in_folders(pattern: str, folder: ImageSet, workers: int) -> None:
    images = open_dataset(f"wds:{pattern}")
    assert images.labels.tolist() == folder.labels.tolist() and images.classes == ("0", "1", "2")
    _assert_same(_batches(folder), _batches(images, workers=workers))


def test_each_rank_has_its_part_of_the_batch(pattern: str, folder: ImageSet) -> None:
    for rank in range(2):
        ours, theirs = (
            _batches(images, rank=rank, world_size=2) for images in (open_dataset(f"wds:{pattern}"), folder)
        )
        _assert_same(ours, theirs)


def test_resuming_at_any_step_equals_not_stopping(pattern: str) -> None:
    images = open_dataset(f"wds:{pattern}")
    whole = _batches(images)
    for start in (1, 3):
        _assert_same(whole[start:], _batches(images, start))


def test_labels_lie_in_json_too_or_nowhere(tmp_path: Path) -> None:
    _shard(tmp_path / "a" / "0.tar", _samples(range(4), "json"))
    assert open_shards(f"{tmp_path}/a", "train", "x").labels.tolist() == [0, 1, 2, 0]
    files = {"0.png": encoded(0), "0.json": b'{"caption": "a dog"}', "1.png": encoded(1), ".2.png": b"", "2.txt": b""}
    _shard(tmp_path / "b" / "0.tar", files)
    images = open_shards(f"{tmp_path}/b", "train", "x")
    assert images.labels is None and images.classes == () and len(images) == 2


def test_what_follows_the_first_dot_tells_an_image(tmp_path: Path) -> None:
    files = {"d.1/x.JPG": encoded(0, "jpg"), "d.1/x.cls": b"1", "d.1/x.seg.png": encoded(1), "d.1/x.depth.png": b""}
    _shard(tmp_path / "0.tar", files)
    images = open_shards(str(tmp_path), "train", "x")
    assert images.path(0) == f"{tmp_path}/0.tar/d.1/x.JPG" and len(images) == 1 and images.labels.tolist() == [1]


def test_the_fingerprint_follows_contents_and_labels(tmp_path: Path) -> None:
    prints = []
    for change in ({}, {"0001.cls": b"0"}, {"0001.png": encoded(7)}, {}):
        _shard(tmp_path / "0.tar", _samples(range(3)) | change)
        prints.append(open_shards(str(tmp_path), "train", "x").fingerprint)
        shards._open.cache_clear()
    assert len(set(prints)) == 3 and prints[0] == prints[3]


def test_the_split_is_in_the_names_of_the_shards(tmp_path: Path) -> None:
    for name, numbers in [("in1k-train-0", range(3)), ("in1k-train-1", range(3, 5)), ("in1k-validation-0", range(2))]:
        _shard(tmp_path / f"{name}.tar", _samples(numbers))
    assert len(open_dataset(f"wds:{tmp_path}")) == 5
    for split in ("val", "test"):
        val = open_dataset(f"wds:{tmp_path}", split)
        assert len(val) == 2 and val.split == "val"
    assert len(open_dataset(f"wds:{tmp_path}/in1k-{{train,validation}}-0.tar", "val")) == 2
    assert len(open_dataset(f"wds:{tmp_path}/*train*.tar", "train[:0.4]")) == 2
    with pytest.raises(UsageError, match=r"unknown split of wds-in1k-train 'val'.*Known: train"):
        open_dataset(f"wds:{tmp_path}/in1k-train-{{0..1}}.tar", "val")
    _shard(tmp_path / "trainer.tar", _samples(range(1)))
    with pytest.raises(DinobenchError, match=r"1 shards have no split in their names.*trainer\.tar"):
        open_dataset(f"wds:{tmp_path}")
    with pytest.raises(UsageError, match=r"all of it is 'train' and there is no 'val'"):
        open_dataset(f"wds:{tmp_path}/trainer.tar", "val")


def test_braces_are_those_of_a_shell(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10"):
        (tmp_path / f"{name}.tar").touch()
    assert [path.stem for path in shard_paths(f"{tmp_path}/{{b,a}}-{{08..10}}.tar")] == [
        "b-08", "b-09", "b-10", "a-08", "a-09", "a-10",
    ]  # fmt: skip
    assert [path.stem for path in shard_paths(f"{tmp_path}/a-*.tar")] == ["a-08", "a-09", "a-10"]


def test_shards_that_are_not_there_are_named(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match=r"2 of 5 shards of .* are missing \(first: .*train-000003\.tar\)"):
        open_dataset(f"wds:{pattern.replace('000002', '000004')}")
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "x-*.tar", "x-{3..1}.tar"):
        with pytest.raises(DinobenchError, match="names no shards: expected .tar files like"):
            open_dataset(f"wds:{tmp_path}/{nothing}")
    (tmp_path / "train-0.tar.gz").touch()
    with pytest.raises(DinobenchError, match=r"train-0\.tar\.gz is no \.tar.*unpack it"):
        open_dataset(f"wds:{tmp_path}/train-0.tar.gz")
    with pytest.raises(UsageError, match=r"names no path; expected wds:/path/"):
        open_dataset("wds:")


@pytest.mark.parametrize("length", [700, 1024])
def test_a_shard_that_ends_too_early_is_named(pattern: str, tmp_path: Path, length: int) -> None:
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(DinobenchError, match=r"is the download complete\?\) .*train-000001\.tar"):
        open_dataset(f"wds:{pattern}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0009.jpg": encoded(9, "jpg")}, r"1 of 9 images have no label \(first: .*/train-000001\.tar/0009\.jpg\)"),
        ({"0004.cls": b"bee"}, r"train-000001\.tar/0004\.cls gives no label: expected a whole .*, found b'bee'"),
        ({"0004.cls": b"-1"}, r"0004\.cls gives no label.*found b'-1'"),
        ({"0009.jpg": encoded(9, "jpg"), "0009.json": b'{"cls": [1]}'}, r"0009\.json gives no label.*found b'\[1\]'"),
        ({"0009.jpg": encoded(9, "jpg"), "0009.json": b"{"}, r"0009\.json gives no label"),
    ],
)  # fmt: skip
def test_a_member_without_a_label_is_named(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    _shard(tmp_path / "train-000000.tar", _samples(range(4)))
    _shard(tmp_path / "train-000001.tar", _samples(range(4, 8)) | change)
    with pytest.raises(DinobenchError, match=message):
        open_dataset(f"wds:{tmp_path}")


def test_an_image_that_cannot_be_read_is_left_out_by_name(tmp_path: Path) -> None:
    _shard(tmp_path / "0.tar", _samples(range(8)) | {"0005.png": b"no picture"})
    images = open_dataset(f"wds:{tmp_path}", max_bad_images=0.2)
    assert len(images) == 7 and images.skipped[0].startswith(f"{tmp_path}/0.tar/0005.png")


def test_few_shards_are_open_at_a_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    images = open_dataset(f"wds:{pattern}")
    store = images.source.store  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(store, shards.ShardStore)
    for number in (0, 5, 10, 0, 9, 4):
        assert images.pixels(number).shape == (3, 12 + number, 10)
        assert sum(shard._descriptor is not None for shard in store._shards) <= 2
    # As in a worker process: what was open stays behind.
    assert torch.equal(pickle.loads(pickle.dumps(images)).pixels(7), images.pixels(7))


def test_labels_of_shards_are_fit_for_file_names() -> None:
    assert dataset_label("wds:/data/train-{000000..000146}.tar") == "wds-train"
    assert dataset_label("wds:/data/in1k-*.tar") == "wds-in1k"
    assert dataset_label("wds:/data/{train,val}-{0..3}.tar") == "wds-data"
    assert dataset_label("wds:/data/flowers") == "wds-flowers"
