from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinobench.figures import inputs
from dinobench.figures.inputs import Picture
from pretrain.data.datasets import open_dataset
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from suites.suite import load_suite


def test_images_come_from_files_and_from_data_sets(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 5), "red").save(tmp_path / folder / "cat.1.png")
    names = [str(tmp_path / "a/cat.1.png"), "digits:test[3]", str(tmp_path / "b/cat.1.png")]
    file, entry, same = inputs.open_pictures(names)
    assert (file.label, file.name, file.image.size) == ("cat.1.png", "cat-1-png", (9, 5))
    assert (entry.label, entry.name) == ("digits:test[3]", "digits-test-3")
    assert entry.image.tobytes() == open_dataset("digits", "test").image(3).tobytes()
    assert same.name == "cat-1-png-2"


def test_an_entry_of_a_folder_is_found_by_its_path(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            path = tmp_path / "data" / split / "cats" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (100 * number, 0, 0)).save(path)
    (picture,) = inputs.open_pictures([f"folder:{tmp_path}/data:val[1]"])
    assert picture.image.getpixel((0, 0)) == (100, 0, 0)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("missing.png", DinobenchError, "no image file missing.png.*like 'digits:test\\[3\\]'"),
        ("digits:test[500]", UsageError, "has the images 0 to 499"),
        ("digit:test[0]", UsageError, "did you mean 'digits'"),
        ("digits:tset[0]", UsageError, "did you mean 'test'"),
    ],
)
def test_what_is_no_image_is_said(name: str, error: type[DinobenchError], said: str) -> None:
    with pytest.raises(error, match=said):
        inputs.open_pictures([name])


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(DinobenchError, match=r"x\.png cannot be read as an image"):
        inputs.open_pictures([str(tmp_path / "x.png")])


def test_the_transform_is_the_one_of_the_suites_on_the_same_data() -> None:
    recipe = {"data": {"name": "digits"}, "views": {"global_size": 32}}
    assert inputs.evaluation_transform(recipe) == load_suite("digits_knn").transform


def test_other_data_are_cut_as_the_network_was_trained() -> None:
    views = {"global_size": 112, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    found = inputs.evaluation_transform({"data": {"name": "folder:/images"}, "views": views})
    assert found == EvalTransform(resize=128, crop=112, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    resized = inputs.evaluation_transform({"data": {"name": "folder:/images", "resize": 120}, "views": views})
    assert resized.resize == 120


def test_a_recipe_that_cannot_be_read_is_said() -> None:
    with pytest.raises(DinobenchError, match="the section 'views' of the checkpoint's recipe cannot be read"):
        inputs.evaluation_transform({"data": {"name": "folder:/images"}, "views": {"global_sise": 3}})


def test_a_checkpoint_without_recipe_gets_the_official_transform() -> None:
    assert inputs.evaluation_transform({}) == EvalTransform.model_validate({})


def test_pixels_are_whole_patches_of_the_centre_and_can_be_shown_again(make_subject: Callable) -> None:
    subject = make_subject(size=18)
    image = Image.effect_noise((60, 36), 80).convert("RGB")
    x = subject.pixels(image)
    assert x.shape == (3, 16, 28)
    transform = load_suite("digits_knn").transform.model_copy(update={"resize": 18, "crop": None})
    assert torch.equal(x, transform(image)[:, 1:17, 1:29])
    shown = subject.shown(x)
    assert shown.shape == (16, 28, 3)
    assert torch.allclose(shown, x.permute(1, 2, 0) * 0.5 + 0.5)


def test_names_tell_steps_and_networks_apart(make_subject: Callable) -> None:
    teacher, student = make_subject(), make_subject(network="student", step=20)
    assert teacher.stem("features", "cat") == "features_cat_step7"
    assert student.stem("features") == "features_step20_student"
    assert teacher.title.startswith("teacher of dino-vit-d24l2p4-digits, step 7")
    assert not torch.equal(teacher.model.backbone.cls_token, student.model.backbone.cls_token)


def test_the_data_are_the_training_split_or_those_named(make_subject: Callable) -> None:
    subject = make_subject(recipe={"data": {"name": "digits", "split": "train[:0.5]"}})
    assert subject.data().fingerprint == open_dataset("digits", "train[:0.5]").fingerprint
    assert len(subject.data("digits")) == 1297
    pictures = inputs.training_pictures(subject, 3)
    total = len(subject.data())
    assert [picture.label for picture in pictures] == [
        f"digits:train[:0.5][{number}]" for number in (0, total // 3, 2 * total // 3)
    ]
    with pytest.raises(UsageError, match="does not say which images it was trained on: name a data set with --data"):
        make_subject(recipe={"data": {}}).data()


def test_few_images_are_spread_over_the_set() -> None:
    images = open_dataset("digits", "test")
    assert inputs.spread(images, 1000) is images
    few = inputs.spread(images, 4)
    assert [few.path(number) for number in range(4)] == [images.path(number) for number in (0, 125, 250, 375)]


def test_pictures_keep_letters_of_every_alphabet() -> None:
    assert Picture("größe (2).png", Image.new("RGB", (1, 1))).name == "größe-2-png"
