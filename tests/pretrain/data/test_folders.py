from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.data.folders import open_folder, open_npz
from pretrain.errors import DinobenchError, UsageError

Write = Callable[..., Path]


def test_split_folders_with_classes(write_images: Write) -> None:
    root = write_images("data", ["train/cat/1.png", "train/dog/2.png", "train/dog/deep/3.jpg", "val/dog/4.png"])
    train, val = open_folder(root, "train", "x"), open_folder(root, "val", "x")
    assert train.classes == val.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 1] and train.split == "train"
    # A class missing from a split does not shift the labels there.
    assert val.labels.tolist() == [1]
    assert open_folder(root, "test", "x").split == "val"


def test_class_folders_without_splits_are_the_train_split(write_images: Write) -> None:
    root = write_images("data", ["bus/1.png", "car/2.png", "train/3.png"])
    images = open_folder(root, "train", "x")
    assert images.classes == ("bus", "car", "train") and images.labels.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match=r"no split folders.*train\[:0.8\]"):
        open_folder(root, "val", "x")


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["1.png", "cat/2.png"], ["pack/1.png", "pack/2.png"]])
def test_flat_folders_have_no_labels(write_images: Write, names: list[str]) -> None:
    images = open_folder(write_images("data", names), "train", "x")
    assert images.labels is None and images.classes == () and len(images) == 2


def test_the_folder_around_everything_is_looked_through(write_images: Write) -> None:
    inner = ["train/a/1.png", "train/b/2.png", "val/a/3.png"]
    plain = write_images("plain", inner)
    wrapped = write_images("wrapped", [f"pack/v1/{n}" for n in inner])
    a, b = open_folder(plain, "train", "x"), open_folder(wrapped, "train", "x")
    assert a.fingerprint == b.fingerprint and a.classes == b.classes


def test_the_fingerprint_follows_names_and_contents(write_images: Write) -> None:
    root = write_images("data", ["a/1.png", "b/2.png"])
    before = open_folder(root, "train", "x").fingerprint
    assert open_folder(root, "train", "other name").fingerprint == before
    content = (root / "a/1.png").read_bytes()
    (root / "a/1.png").write_bytes(content[:-1] + b"x")
    changed = open_folder(root, "train", "x").fingerprint
    (root / "a/1.png").write_bytes(content)
    (root / "a/1.png").rename(root / "a/3.png")
    assert len({before, changed, open_folder(root, "train", "x").fingerprint}) == 3


def test_imagenet_needs_both_split_folders(write_images: Write) -> None:
    root = write_images("data", ["train/a/1.png", "train/b/2.png"])
    with pytest.raises(DinobenchError, match=r"train/ and val/.*found \['train'\]"):
        open_folder(root, "train", "imagenet", needs_splits=True)


TRAIN = ["train/a/1.png", "train/b/2.png"]


@pytest.mark.parametrize(
    ("val", "told"),
    [
        (["val/3.png", "val/4.png"], r"all 2 images of val/ lie in no class folder \(first: val/3\.png\)"),
        (["val/a/3.png", "val/4.png"], r"1 of 2 images of val/ lie in no class folder \(first: val/4\.png\)"),
        (["val/images/3.png", "val/images/4.png"], r"val/ has 1 folders that train/ has not \(first: val/images/\)"),
        (["val/a/3.png", "val/A/4.png"], r"val/ has 1 folders that train/ has not \(first: val/A/\)"),
    ],
    ids=["flat", "partly flat", "tiny-imagenet", "another class"],
)
def test_imagenet_without_class_folders_is_refused_with_what_to_move_where(
    write_images: Write, val: list[str], told: str
) -> None:
    root = write_images("data", [*TRAIN, *val])
    with pytest.raises(DinobenchError, match=rf"{told}.*move each image into .* like val/<class>/.*valprep\.sh"):
        open_folder(root, "val", "imagenet", needs_splits=True)
    # the images to train on are there all the same
    assert len(open_folder(root, "train", "imagenet", needs_splits=True)) == 2


def test_imagenet_with_flat_training_images_is_refused_too(write_images: Write) -> None:
    root = write_images("data", ["train/1.png", "val/a/2.png"])
    with pytest.raises(DinobenchError, match="all 1 images of train/ lie in no class folder"):
        open_folder(root, "train", "imagenet", needs_splits=True)


def test_imagenet_may_lack_a_class_in_val(write_images: Write) -> None:
    root = write_images("data", [*TRAIN, "val/b/3.png"])
    assert open_folder(root, "val", "imagenet", needs_splits=True).labels.tolist() == [1]


def test_a_folder_without_images_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DinobenchError, match="holds no images; expected <split>/<class>/<image>"):
        open_folder(tmp_path, "train", "x")


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 3), (6, 3, 5, 4), (6, 5, 4, 1)])
def test_npz_images_in_any_usual_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(6) % 3)
    found = open_npz(tmp_path / "x.npz", "train", "x")
    assert found.array.shape == (6, 3, 5, 4) and found.classes == ("0", "1", "2")
    first = images[0] if images.ndim == 3 else images[0].transpose(2, 0, 1) if shape[-1] in (1, 3) else images[0]
    assert torch.equal(found.array[0], torch.from_numpy(first.copy()).expand(3, 5, 4))


def test_npz_splits_and_column_labels(tmp_path: Path) -> None:
    arrays = {f"{s}_images": np.zeros((n, 4, 4), np.uint8) for s, n in (("train", 5), ("test", 3))}
    np.savez(tmp_path / "x.npz", **arrays, train_labels=np.arange(5)[:, None])
    assert open_npz(tmp_path / "x.npz", "train", "x").labels.tolist() == [0, 1, 2, 3, 4]
    assert open_npz(tmp_path / "x.npz", "test", "x").labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.array([{"a": 1}], object)}, "without objects"),
        ({"images": np.zeros((2, 4, 4), np.float32)}, r"float32 \(2, 4, 4\).*expected uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "for 2 images"),
        ({"images": np.zeros((2, 4, 4, 5), np.uint8)}, "axis of 1 or 3 colours"),
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, r"\['pictures'\].*expected `images`"),
    ],
)
def test_other_npz_contents_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DinobenchError, match=message):
        open_npz(tmp_path / "x.npz", "train", "x")


@pytest.mark.promise("a damaged .npz of images", "named; exit 3")
def test_a_damaged_npz_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(DinobenchError, match=r"x\.npz"):
        open_npz(tmp_path / "x.npz", "train", "x")
