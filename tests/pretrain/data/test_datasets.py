from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pretrain.data.datasets import DataConfig, dataset_label, dataset_names, open_dataset
from pretrain.data.torchvision_sets import SETS
from pretrain.errors import DinobenchError, UsageError

Write = Callable[..., Path]


def test_parts_of_a_split_are_disjoint_complete_and_stratified() -> None:
    whole, first, rest = (open_dataset("digits", f"train{part}") for part in ("", "[:0.8]", "[0.8:]"))
    assert len(first) + len(rest) == len(whole)
    together = torch.cat([first.array, rest.array]).flatten(1).float() @ torch.arange(1.0, 193.0)
    assert torch.equal(
        together.sort().values, (whole.array.flatten(1).float() @ torch.arange(1.0, 193.0)).sort().values
    )
    share = first.labels.bincount() / whole.labels.bincount()
    assert (share - 0.8).abs().max() < 0.01
    assert first.split == "train[:0.8]" and len({whole.fingerprint, first.fingerprint, rest.fingerprint}) == 3
    middle = open_dataset("digits", "train[0.4:0.6]")
    assert abs(len(middle) - 0.2 * len(whole)) < 6


def test_parts_are_the_same_every_time() -> None:
    # Pinned: presets were tuned on this part.
    assert open_dataset("digits", "train[0.8:]").fingerprint.startswith("6ed9aa2d")


@pytest.mark.parametrize("split", ["train[0.8]", "train[80:]", "train[0.5:0.5]", "train[-1:]", "", "train[:0.8", "a b"])
def test_splits_that_cannot_be_read_are_refused(split: str) -> None:
    with pytest.raises(UsageError, match=r"expected a name, or a part such as 'train\[:0.8\]'"):
        open_dataset("digits", split)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        open_dataset("digit")
    with pytest.raises(UsageError, match=r"unknown split of digits 'val'.*Known: test, train"):
        open_dataset("digits", "val")
    with pytest.raises(UsageError, match="unknown dataset 'floder:/x'"):
        open_dataset("floder:/x")


def test_uris_open_folders_archives_and_npz(write_images: Write, tmp_path: Path) -> None:
    root = write_images("my set", ["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"])
    assert open_dataset(f"folder:{root}").name == "folder-my_set"
    assert open_dataset(f"imagenet:{root}", "val").name == "imagenet"
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 4, 4), np.uint8))
    assert open_dataset(f"npz:{tmp_path / 'x.npz'}").name == "npz-x"
    with pytest.raises(UsageError, match="names no path; expected folder:/path"):
        open_dataset("folder:")
    with pytest.raises(DinobenchError, match="no such folder"):
        open_dataset(f"imagenet:{tmp_path / 'missing'}")


def test_labels_of_datasets_are_fit_for_file_names() -> None:
    assert dataset_label("cifar10") == "cifar10"
    assert dataset_label("imagenet:/data/in1k") == "imagenet"
    assert dataset_label("folder:/data/My pictures.v2.tar.gz") == "folder-My_pictures.v2"
    assert dataset_label("folder:/data/flowers/") == "folder-flowers"
    assert DataConfig(name="npz:/x/pneumonia.npz").label == "npz-pneumonia"


def test_an_unlabelled_folder_can_be_split_and_resized(write_images: Write) -> None:
    root = write_images("flat", [f"{k}.png" for k in range(10)])
    config = DataConfig(name=f"folder:{root}", split="train[:0.5]", resize=6)
    images = config.open()
    assert len(images) == 5 and images.labels is None and images.pixels(0).shape == (3, 7, 6)


def test_the_limit_of_unreadable_images_is_the_configs(write_images: Write) -> None:
    root = write_images("flat", [f"{k}.png" for k in range(10)])
    (root / "3.png").write_bytes(b"")
    assert len(DataConfig(name=f"folder:{root}", max_bad_images=0.1).open()) == 9
    with pytest.raises(DinobenchError, match="max_bad_images=0.05"):
        DataConfig(name=f"folder:{root}", max_bad_images=0.05).open()


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        DataConfig(path="x")


def test_the_catalogue_names_every_kind_of_dataset() -> None:
    infos = {info.name: info for info in dataset_names()}
    embedded = {"digits", "fashion_mnist", "cifar10"}
    assert set(infos) == embedded | set(SETS) | {"imagenet:/path", "folder:/path", "npz:/path"} | {
        "wds:/path/{000..146}.tar"
    }
    assert infos["digits"].available and infos["digits"].splits == ("train", "test")
