from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.errors import DinobenchError, UsageError
from suites.image_lists import list_digest, read_list

PATHS = [f"data/train/{folder}/{folder}_{i}.JPEG" for folder in ("n01", "n02") for i in range(3)]
LABELS = torch.tensor([0, 0, 0, 1, 1, 1])


def write(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text)
    return path


def read(path: Path, paths: list[str] = PATHS) -> list[int]:
    return read_list(path, paths.__getitem__, LABELS, ("n01", "n02")).tolist()


@pytest.mark.parametrize(
    "text",
    ["n02_1.JPEG\nn01_2.JPEG\n", "n02/n02_1.JPEG\r\n\nn01/n01_2.JPEG", "/train/n02/n02_1.JPEG\ntrain/n01/n01_2.JPEG"],
    ids=["file names, as MSN and SimCLR", "class folders", "more folders"],
)
def test_lines_name_images_from_any_of_their_folders_on(tmp_path: Path, text: str) -> None:
    assert read(write(tmp_path, text)) == [2, 4]


def test_a_name_that_two_classes_share_needs_its_folder(tmp_path: Path) -> None:
    paths = [f"train/{folder}/{i}.png" for folder in ("a", "b") for i in range(3)]
    assert read(write(tmp_path, "a/1.png\nb/1.png"), paths) == [1, 4]
    with pytest.raises(DinobenchError, match="'1.png' names 2 images of train, expected one"):
        read(write(tmp_path, "1.png"), paths)


def test_the_end_of_a_folder_name_is_no_folder(tmp_path: Path) -> None:
    paths = [f"train/{folder}/{i}.png" for folder in ("xa", "a") for i in range(3)]
    assert read(write(tmp_path, "a/1.png\nxa/0.png"), paths) == [0, 4]


def test_a_list_for_another_data_set_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "n01_0.JPEG\nn07_5.JPEG\nn08_1.JPEG")
    with pytest.raises(DinobenchError, match="'n07_5.JPEG' names 0 images .*2 of 3 lines name none"):
        read(path)


def test_a_class_without_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match="names no image of 1 classes, for example 'n02'"):
        read(write(tmp_path, "n01_0.JPEG"))


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the list of images"):
        list_digest(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="is empty"):
        list_digest(write(tmp_path, "\n\n"))


def test_digest_is_that_of_the_images_and_not_of_their_order(tmp_path: Path) -> None:
    first = list_digest(write(tmp_path, "a\nb\n"))
    assert list_digest(write(tmp_path, "b\r\na\n\n")) == first
    assert list_digest(write(tmp_path, "a\nc\n")) != first
