from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pretrain.errors import DinobenchError
from suites.label_maps import IGNORED, MapLayout, open_label_maps
from suites.suite import load_suite

PACK = Path(os.environ.get("DINOBENCH_DATA", "")) / "camvid-180" / "camvid180.tar"
ROAD = MapLayout(classes=("sky", "road", "car"), ignored=3)


def write(folder: Path, images: str, labels: str, names: tuple[str, ...] = ("a", "b"), first: int = 0) -> Path:
    """Images of 6 x 4 px; the map of each counts up along its rows, 4 numbers from `first` on, in turn."""
    (folder / images).mkdir(parents=True)
    (folder / labels).mkdir(parents=True)
    values = (np.arange(24).reshape(4, 6) % 4 + first).astype(np.uint8)
    for shade, name in enumerate(names):
        Image.new("RGB", (6, 4), (shade, 0, 0)).save(folder / images / f"{name}.jpg")
        Image.fromarray(values).save(folder / labels / f"{name}.png")
    return folder


def test_numbers_become_classes_and_pixels_that_are_not_judged(tmp_path: Path) -> None:
    maps = open_label_maps(write(tmp_path / "roads", "train", "trainannot"), "roads", "train", ROAD)
    assert len(maps) == 2 and maps.name(1) == "b"
    np.testing.assert_array_equal(maps.labels(0)[0], [0, 1, 2, IGNORED, 0, 1])
    assert maps.images.read(1).size == (6, 4)
    assert maps.receipt() == {"name": "roads", "split": "train", "n": 2, "fingerprint": maps.fingerprint}


def test_ade20k_counts_from_one_and_does_not_judge_zero(tmp_path: Path) -> None:
    layout = MapLayout(images="images/{split}", labels="annotations/{split}", classes=("a", "b", "c"), first_label=1)
    layout = layout.model_copy(update={"ignored": 0})
    folder = write(tmp_path / "ADE", "images/training", "annotations/training")
    maps = open_label_maps(folder, "ade20k", "training", layout)
    np.testing.assert_array_equal(maps.labels(1)[0], [IGNORED, 0, 1, 2, IGNORED, 0])


def test_pascal_lists_its_images_and_has_palettes(tmp_path: Path) -> None:
    layout = load_suite("voc2012_segmentation").resolved_parameters().layout
    folder = write(tmp_path / "VOC2012", "JPEGImages", "SegmentationClass", ("a", "b", "c"))
    Image.new("RGB", (6, 4)).save(folder / "JPEGImages" / "unlabelled.jpg")
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/val.txt").write_text("c\na\n")
    values = np.full((4, 6), 20, dtype=np.uint8)
    values[0] = 255
    mask = Image.frombytes("P", (6, 4), values.tobytes())
    mask.putpalette(list(range(256)) * 3)  # a short palette would be saved with fewer bits
    mask.save(folder / "SegmentationClass/c.png")
    maps = open_label_maps(folder, "voc2012", "val", layout)
    assert [maps.name(number) for number in range(len(maps))] == ["c", "a"]
    np.testing.assert_array_equal(maps.labels(0), np.where(values == 255, IGNORED, 20))
    with pytest.raises(DinobenchError, match=r"no list of images: expected ImageSets/Segmentation/test\.txt"):
        open_label_maps(folder, "voc2012", "test", layout)
    (folder / "ImageSets/Segmentation/val.txt").write_text("c\nunlabelled\n")
    with pytest.raises(DinobenchError, match="1 of 2 names have no label map in SegmentationClass/.*unlabelled"):
        open_label_maps(folder, "voc2012", "val", layout)


def test_an_archive_reads_as_the_folder_and_content_and_meaning_make_the_fingerprint(tmp_path: Path) -> None:
    folder = write(tmp_path / "roads", "train", "trainannot")
    with tarfile.open(tmp_path / "pack.tar", "w") as archive:
        archive.add(folder, "somewhere/roads")
    whole, packed = (open_label_maps(path, "roads", "train", ROAD) for path in (folder, tmp_path / "pack.tar"))
    assert whole.fingerprint == packed.fingerprint
    np.testing.assert_array_equal(whole.labels(1), packed.labels(1))
    other = ROAD.model_copy(update={"classes": ("road", "sky", "car")})
    assert open_label_maps(folder, "roads", "train", other).fingerprint != whole.fingerprint
    Image.new("L", (6, 4)).save(folder / "trainannot/b.png")
    assert open_label_maps(folder, "roads", "train", ROAD).fingerprint != whole.fingerprint


def test_the_split_test_is_not_found_in_the_name_of_another_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "roads", "test", "testannot", ("c",))
    write(folder / "latest", "test", "testannot", ("x", "y"))
    maps = open_label_maps(folder, "roads", "test", ROAD)
    assert [maps.name(number) for number in range(len(maps))] == ["c"]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("trainannot/b.png", r"1 of 2 names have no label map in trainannot/, for example b"),
        ("train/a.jpg", r"1 of 2 names have no image in train/, for example a"),
    ],
)
def test_images_without_map_and_maps_without_image_are_named(tmp_path: Path, gone: str, message: str) -> None:
    folder = write(tmp_path / "roads", "train", "trainannot")
    (folder / gone).unlink()
    with pytest.raises(DinobenchError, match=message):
        open_label_maps(folder, "roads", "train", ROAD)


def test_an_absent_split_is_told_with_the_layout(tmp_path: Path) -> None:
    folder = write(tmp_path / "roads", "train", "trainannot")
    with pytest.raises(DinobenchError, match=r"no images in val/: expected val/<name>\.jpg with valannot/<name>\.png"):
        open_label_maps(folder, "roads", "val", ROAD)


def test_a_name_with_two_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "roads", "train", "trainannot")
    Image.new("RGB", (6, 4)).save(folder / "train/a.png")
    with pytest.raises(DinobenchError, match="two images named a"):
        open_label_maps(folder, "roads", "train", ROAD)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (4, 6)), r"trainannot/b\.png has 4 x 6 px, its image .*train/b\.jpg 6 x 4"),
        (Image.new("L", (6, 4), 7), r"trainannot/b\.png holds the labels 7: expected 0 to 2, or 3 for pixels"),
        (Image.new("RGB", (6, 4)), r"trainannot/b\.png cannot be read \(mode RGB, expected a palette or one channel"),
        (None, r"trainannot/b\.png cannot be read .*: replace the file"),
    ],
)
def test_a_map_that_does_not_fit_is_named(tmp_path: Path, image: Any, message: str) -> None:
    folder = write(tmp_path / "roads", "train", "trainannot")
    if image is None:
        (folder / "trainannot/b.png").write_text("<html>not found</html>")
    else:
        image.save(folder / "trainannot/b.png")
    maps = open_label_maps(folder, "roads", "train", ROAD)
    maps.labels(0)
    with pytest.raises(DinobenchError, match=message):
        maps.labels(1)


def test_a_broken_image_is_told_apart_from_its_map(tmp_path: Path) -> None:
    folder = write(tmp_path / "roads", "train", "trainannot")
    (folder / "train/a.jpg").write_text("<html>not found</html>")
    with pytest.raises(DinobenchError, match=r"train/a\.jpg cannot be read"):
        open_label_maps(folder, "roads", "train", ROAD).labels(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ignored": 1}, "ignored=1 is the number of class 1"),
        ({"first_label": 254}, "3 classes from 254 on do not fit in 8 bits"),
        ({"classes": ("sky",)}, "at least 2"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MapLayout.model_validate({"classes": ("a", "b", "c"), **fields})


@pytest.mark.skipif(not PACK.is_file(), reason="DINOBENCH_DATA has no pack camvid-180")
def test_the_pack_of_camvid_has_its_three_splits() -> None:
    layout = load_suite("camvid_segmentation").resolved_parameters().layout
    splits = {split: open_label_maps(PACK, "camvid", split, layout) for split in ("train", "val", "test")}
    assert {split: len(maps) for split, maps in splits.items()} == {"train": 367, "val": 101, "test": 233}
    labels = splits["test"].labels(0)
    assert labels.shape == (180, 240) and splits["test"].images.read(0).size == (240, 180)
    assert {0, 1, 3} < set(labels.flatten().tolist()) <= {*range(11), IGNORED}
