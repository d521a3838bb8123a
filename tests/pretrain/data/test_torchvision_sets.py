"""Each set in its own layout on disk, made small: true file names and formats, a few images of noise."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from pretrain.data.datasets import dataset_names, open_dataset
from pretrain.data.torchvision_sets import SETS, draw_per_class, open_set
from pretrain.errors import DinobenchError, UsageError

Write = Callable[..., Path]
Content = dict[str, tuple[list[str], list[int]]]
"""Split -> names of its images below the folder of images, and their labels."""


def lines(path: Path, text: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def flowers102(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    names = [f"image_{k:05d}.jpg" for k in range(1, 9)]
    folder = write("root/flowers-102/jpg", names).parent
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 77, 1, 2, 3, 4, 102, 5]], np.uint8)})
    ids = {"trnid": [[8, 1, 2]], "valid": [[3, 4]], "tstid": [[5, 6, 7]]}
    savemat(folder / "setid.mat", {key: np.array(value, np.uint16) for key, value in ids.items()})
    files = {kind: (f, md5(folder / f)) for kind, f in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    patch.setattr(datasets.Flowers102, "_file_dict", files)
    train, val = ([names[7], names[0], names[1]], [4, 76, 76]), ([names[2], names[3]], [0, 1])
    both = (train[0] + val[0], train[1] + val[1])
    return {"train": train, "val": val, "trainval": both, "test": (names[4:7], [2, 3, 101])}


def oxford_iiit_pet(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    names = ["Abyssinian_1", "american_bulldog_20", "Abyssinian_3", "american_bulldog_4"]
    write("root/oxford-iiit-pet/images", [f"{name}.jpg" for name in names])
    annotations = root / "oxford-iiit-pet" / "annotations"
    lines(annotations / "trainval.txt", ["american_bulldog_20 2 2 1", "Abyssinian_1 1 1 1"])
    lines(annotations / "test.txt", ["Abyssinian_3 1 1 1", "american_bulldog_4 2 2 1"])
    return {
        "trainval": (["american_bulldog_20.jpg", "Abyssinian_1.jpg"], [1, 0]),
        "test": (["Abyssinian_3.jpg", "american_bulldog_4.jpg"], [0, 1]),
    }


def dtd(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    names = [f"{texture}/{texture}_{k:04d}.jpg" for k in range(3) for texture in ("dotted", "woven")]
    write("root/dtd/dtd/images", names)
    parts = {"train": names[:2], "val": names[2:4], "test": names[4:]}
    for split, files in parts.items():
        lines(root / f"dtd/dtd/labels/{split}1.txt", files)
        lines(root / f"dtd/dtd/labels/{split}2.txt", ["dotted/other.jpg"])
    return {split: (files, [0, 1]) for split, files in parts.items()} | {"trainval": (names[:4], [0, 1, 0, 1])}


def fgvc_aircraft(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    names = [f"{k:07d}" for k in range(4)]
    write("root/fgvc-aircraft-2013b/data/images", [f"{name}.jpg" for name in names])
    data = root / "fgvc-aircraft-2013b" / "data"
    lines(data / "variants.txt", ["707-320", "Cessna 172"])
    lists = {"train": [(0, 1)], "val": [(1, 0)], "trainval": [(0, 1), (1, 0)], "test": [(2, 0), (3, 1)]}
    for split, items in lists.items():
        lines(
            data / f"images_variant_{split}.txt",
            [f"{names[k]} {['707-320', 'Cessna 172'][label]}" for k, label in items],
        )
    return {
        split: ([f"{names[k]}.jpg" for k, _ in items], [label for _, label in items]) for split, items in lists.items()
    }


def stanford_cars(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    folder = root / "stanford_cars"
    write("root/stanford_cars/cars_train", ["00001.jpg", "00002.jpg"])
    write("root/stanford_cars/cars_test", ["00001.jpg", "00002.jpg"])
    (folder / "devkit").mkdir()
    record = [("bbox_x1", "u2"), ("class", "u1"), ("fname", "O")]

    def annotations(labels: list[int]) -> dict[str, np.ndarray]:
        return {"annotations": np.array([(9, y, f"{k:05d}.jpg") for k, y in enumerate(labels, 1)], dtype=record)}

    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Audi A5"], object)})
    savemat(folder / "devkit" / "cars_train_annos.mat", annotations([2, 1]))
    savemat(folder / "cars_test_annos_withlabels.mat", annotations([1, 2]))
    return {
        "train": (["cars_train/00001.jpg", "cars_train/00002.jpg"], [1, 0]),
        "test": (["cars_test/00001.jpg", "cars_test/00002.jpg"], [0, 1]),
    }


def food101(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    names = ["apple_pie/1", "apple_pie/2", "waffles/3", "waffles/4"]
    write("root/food-101/images", [f"{name}.jpg" for name in names])
    parts = {"train": {"waffles": ["waffles/3"], "apple_pie": ["apple_pie/2"]}}
    parts["test"] = {"apple_pie": ["apple_pie/1"], "waffles": ["waffles/4"]}
    for split, content in parts.items():
        lines(root / f"food-101/meta/{split}.json", [json.dumps(content)])
    return {
        "train": (["waffles/3.jpg", "apple_pie/2.jpg"], [1, 0]),
        "test": (["apple_pie/1.jpg", "waffles/4.jpg"], [0, 1]),
    }


def caltech101(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    numbers = {"Faces": 33, "anchor": 32, "BACKGROUND_Google": 1}
    write(
        "root/caltech101/101_ObjectCategories",
        [f"{c}/image_{k:04d}.jpg" for c in numbers for k in range(1, numbers[c] + 1)],
    )
    # The draw is pinned: another one would be another test set.
    out = {"Faces": [1, 4, 28], "anchor": [20, 30]}
    everything = {c: range(1, numbers[c] + 1) for c in out}
    parts = {"train": {c: [k for k in everything[c] if k not in out[c]] for c in out}, "test": out}
    return {
        split: (
            [f"{c}/image_{k:04d}.jpg" for c, ks in chosen.items() for k in ks],
            [label for label, ks in enumerate(chosen.values()) for _ in ks],
        )
        for split, chosen in parts.items()
    }


def sun397(root: Path, write: Write, patch: pytest.MonkeyPatch) -> Content:
    names = [f"a/{scene}/sun_{k}.jpg" for k in "abc" for scene in ("abbey", "apartment_building/outdoor")]
    write("root/SUN397", names)
    lines(root / "SUN397/ClassName.txt", ["/a/abbey", "/a/apartment_building/outdoor"])
    lines(root / "SUN397/Training_01.txt", [f"/{name}" for name in (names[1], names[0])])
    lines(root / "SUN397/Testing_01.txt", [f"/{name}" for name in names[2:4]])
    return {"train": ([names[1], names[0]], [1, 0]), "test": (names[2:4], [0, 1])}


BUILDERS = {
    make.__name__: make
    for make in (flowers102, oxford_iiit_pet, dtd, fgvc_aircraft, stanford_cars, food101, caltech101, sun397)
}
CLASSES = {
    "flowers102": tuple(datasets.Flowers102.classes),
    "oxford_iiit_pet": ("Abyssinian", "American Bulldog"),
    "dtd": ("dotted", "woven"),
    "fgvc_aircraft": ("707-320", "Cessna 172"),
    "stanford_cars": ("AM General Hummer", "Audi A5"),
    "food101": ("apple_pie", "waffles"),
    "caltech101": ("Faces", "anchor"),
    "sun397": ("abbey", "apartment_building/outdoor"),
}


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    folder = tmp_path / "root" / "cifar-100-python"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = {split: random.integers(0, 256, (4, 3072), dtype=np.uint8) for split in ("train", "test")}
    for split, values in pixels.items():
        content = {"data": values, "fine_labels": [3, 0, 2, 1], "coarse_labels": [0, 0, 1, 1]}
        (folder / split).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(datasets.CIFAR100, f"{split}_list", [[split, md5(folder / split)]])
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "baby", "bear", "bed"]}))
    meta = {**datasets.CIFAR100.meta, "md5": md5(folder / "meta")}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    return pixels


def test_every_set_is_in_the_catalogue() -> None:
    assert set(SETS) == {*BUILDERS, "cifar100", "voc2007"}
    assert set(SETS) <= {info.name for info in dataset_names()}


@pytest.mark.parametrize("name", BUILDERS)
def test_splits_labels_and_classes_are_those_of_the_lists(
    name: str, tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    expected = BUILDERS[name](root, write_images, monkeypatch)
    assert set(expected) == set(SETS[name].splits)
    for split, (names, labels) in expected.items():
        images = open_dataset(name, split, root=root)
        assert (images.name, images.split, images.classes) == (name, split, CLASSES[name])
        assert [images.path(k) for k in range(len(images))] == [str(root / SETS[name].images / n) for n in names]
        assert images.labels.tolist() == labels and images.labels.dtype == torch.int64
        assert images.pixels(0).shape == (3, 12, 10)
    found = {info.name: info for info in dataset_names(root)}[name]
    assert found.available and found.where == str(root / SETS[name].images)
    with pytest.raises(UsageError, match=f"unknown split of {name}"):
        open_dataset(name, "other", root=root)


@pytest.mark.parametrize("name", BUILDERS)
def test_opening_decodes_no_image_and_an_absent_one_is_named(
    name: str, tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    split, (names, labels) = next(iter(BUILDERS[name](root, write_images, monkeypatch).items()))
    folder = root / SETS[name].images
    for file in names:
        (folder / file).write_bytes(b"not an image")
    assert len(open_set(name, split, root)) == len(labels)
    (folder / names[-1]).unlink()
    if name == "caltech101":  # torchvision counts the files of a folder
        (folder / names[-1]).with_name("odd.jpg").write_bytes(b"")
    with pytest.raises(
        DinobenchError, match=rf"lacks 1 of the {len(names)} images of {split} \(first: .*jpg\): is the"
    ):
        open_set(name, split, root)


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_not_there_says_what_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        DinobenchError, match=rf"{name}: not found under DINOBENCH_DATA={tmp_path}\. It needs {SETS[name].parts[0]}"
    ):
        open_dataset(name, SETS[name].splits[0], root=tmp_path)
    info = {info.name: info for info in dataset_names(tmp_path)}[name]
    assert not info.available and "in DINOBENCH_DATA (" in info.where
    assert os.listdir(tmp_path) == []  # torchvision's Caltech101 would make a folder


@pytest.mark.parametrize("name", SETS)
def test_without_a_data_root_the_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOBENCH_DATA", raising=False)
    with pytest.raises(DinobenchError, match=rf"{name}: no data root: set DINOBENCH_DATA"):
        open_dataset(name, SETS[name].splits[0])


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("flowers102", "flowers-102/setid.mat", b"MATLAB 5.0 MAT-file"),
        ("oxford_iiit_pet", "oxford-iiit-pet/annotations/trainval.txt", b"Abyssinian_1 1\n"),
        ("dtd", "dtd/dtd/labels/train1.txt", b"dotted_0000.jpg\n"),
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data/images_variant_train.txt", b"0000000 Boeing\n"),
        ("stanford_cars", "stanford_cars/devkit/cars_train_annos.mat", b"MATLAB 5.0"),
        ("food101", "food-101/meta/train.json", b'{"apple_pie": ["apple'),
        ("sun397", "SUN397/Training_01.txt", b"/x/unknown/sun_a.jpg\n"),
    ],
)
def test_damaged_lists_are_told_with_what_the_set_needs(
    name: str, file: str, content: bytes, tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    split = next(iter(BUILDERS[name](root, write_images, monkeypatch)))
    (root / file).write_bytes(content)
    with pytest.raises(
        DinobenchError, match=rf"{name}: torchvision cannot read {split} .*is the download complete.*It nee"
    ):
        open_dataset(name, split, root=root)


def test_a_list_that_is_missing_is_named(tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    sun397(tmp_path / "root", write_images, monkeypatch)
    (tmp_path / "root/SUN397/Testing_01.txt").unlink()
    with pytest.raises(DinobenchError, match=r"no SUN397/Testing_01\.txt\. It needs .*lists of Partitions\.zip"):
        open_dataset("sun397", "train", root=tmp_path / "root")


def test_partitions_of_dtd_whose_classes_differ_are_refused(
    tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtd(tmp_path / "root", write_images, monkeypatch)
    lines(tmp_path / "root/dtd/dtd/labels/val1.txt", ["woven/woven_0001.jpg"])
    with pytest.raises(DinobenchError, match="train and val have different classes"):
        open_dataset("dtd", "trainval", root=tmp_path / "root")


def test_the_fingerprint_follows_images_and_labels_not_the_place(
    tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    oxford_iiit_pet(root, write_images, monkeypatch)
    first = open_dataset("oxford_iiit_pet", "trainval", root=root).fingerprint
    root.rename(tmp_path / "moved")
    root = tmp_path / "moved"
    assert open_dataset("oxford_iiit_pet", "trainval", root=root).fingerprint == first
    assert open_dataset("oxford_iiit_pet", "test", root=root).fingerprint != first
    annotations = root / "oxford-iiit-pet/annotations/trainval.txt"
    lines(annotations, ["american_bulldog_20 1 2 1", "Abyssinian_1 2 1 1"])
    swapped = open_dataset("oxford_iiit_pet", "trainval", root=root).fingerprint
    image = root / "oxford-iiit-pet/images/Abyssinian_1.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert len({first, swapped, open_dataset("oxford_iiit_pet", "trainval", root=root).fingerprint}) == 3


def test_cifar100_is_in_memory(tmp_path: Path, cifar100: dict[str, np.ndarray]) -> None:
    for split, pixels in cifar100.items():
        images = open_dataset("cifar100", split, root=tmp_path / "root")
        np.testing.assert_array_equal(images.array, pixels.reshape(4, 3, 32, 32))
        assert images.labels.tolist() == [3, 0, 2, 1] and images.classes == ("apple", "baby", "bear", "bed")


def test_pickles_other_than_the_official_ones_are_not_read(tmp_path: Path, cifar100: dict[str, np.ndarray]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "root/cifar-100-python/train").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DinobenchError, match="cifar100: torchvision cannot read train .*are its lists the originals"):
        open_dataset("cifar100", "train", root=tmp_path / "root")
    assert not (tmp_path / "exploded").exists()


def test_the_draw_takes_as_many_of_each_class_always_the_same() -> None:
    labels = torch.tensor([0, 1, 2] * 40 + [1] * 20)
    chosen = draw_per_class(labels, 30)
    assert labels[chosen].bincount().tolist() == [30, 30, 30]
    assert torch.equal(chosen, draw_per_class(labels, 30))
    with pytest.raises(DinobenchError, match="class 0 has 40 images: expected more than 40 of each"):
        draw_per_class(labels, 40)
