from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pretrain.data.images import ImageSet
from pretrain.errors import DinobenchError, UsageError
from suites.labelled import LabelledData, check_labelled, open_labelled
from suites.suite import SuiteDataset

MakeImages = Callable[..., ImageSet]


def test_splits_open_by_name_or_by_what_takes_its_place() -> None:
    data = open_labelled(SuiteDataset(name="digits"), None)
    assert (data.name, data.num_classes, len(data.train), len(data.test)) == ("digits", 10, 1297, 500)
    part = open_labelled(SuiteDataset(train="train[:0.5]", test="test"), "digits")
    assert part.fingerprint != data.fingerprint
    receipt = data.receipt()
    assert {role: (entry["split"], entry["n"]) for role, entry in receipt.items()} == {
        "train": ("train", 1297),
        "test": ("test", 500),
    }
    assert receipt["train"]["fingerprint"] == data.train.fingerprint


@pytest.mark.parametrize(("name", "hint"), [(None, "folder:/path"), ("imagenet:", "imagenet:/path")])
def test_a_suite_without_images_asks_for_them(name: str | None, hint: str) -> None:
    with pytest.raises(UsageError, match=f"does not know where its images are: add --data {hint}"):
        open_labelled(SuiteDataset(name=name), None)


def test_labels_that_teach_nothing_are_refused(make_images: MakeImages) -> None:
    good, none = make_images(), make_images(labelled=False, split="test")
    several = make_images(split="test")
    several.labels = torch.zeros(60, 3)
    one, fewer = make_images(num_classes=1), make_images(num_classes=2, split="test")
    for train, test, message in (
        (good, none, "patterns test has no labels"),
        (good, several, "one label per image, but those of patterns test may have several"),
        (good, fewer, r"classes of train \(3\) and test \(2\) differ, for example 'class2'"),
        (one, one, "at least two classes, but patterns train has one"),
    ):
        with pytest.raises(DinobenchError, match=message):
            check_labelled(LabelledData(train, test))
    check_labelled(LabelledData(good, make_images(split="test", seed=1)))
