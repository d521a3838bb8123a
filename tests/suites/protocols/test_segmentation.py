from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

from pretrain.errors import DinobenchError
from pretrain.models.checkpoint import LoadedModel
from suites.cache import FeatureCache
from suites.extractor import Extractor
from suites.label_maps import IGNORED, MapLayout
from suites.measure import measure
from suites.protocols import segmentation
from suites.protocols.protocol import Context
from suites.protocols.segmentation import Parameters, held_out_images, input_size, open_data, prepare_image, select
from suites.suite import Suite, SuiteDataset, load_suite

PACK = Path(os.environ.get("DINOBENCH_DATA", "")) / "camvid-180" / "camvid180.tar"
COLOURS = np.array([(230, 20, 20), (20, 230, 20), (20, 20, 230)], dtype=np.uint8)
SMALL = Parameters(
    layout=MapLayout(classes=("red", "green", "blue"), ignored=9),
    validation="val",
    short_side=None,
    learning_rates=(0.01, 0.1),
    iterations=100,
    warmup_iterations=5,
    batch_size=4,
    stride=2,
    colour_patch=4,
)
DATASET = SuiteDataset(name="stripes")


def stripes(folder: Path, split: str, number: int, seed: int, sizes: tuple[int, ...] = (24,)) -> None:
    """Images of upright stripes, 4 px wide, whose colour is their class; the last two rows are not judged."""
    generator = np.random.default_rng(seed)
    for place in (folder / split, folder / f"{split}annot"):
        place.mkdir(parents=True, exist_ok=True)
    for one in range(number):
        blocks = generator.permutation(np.arange(sizes[one % len(sizes)] // 4) % 3)
        labels = np.tile(blocks.repeat(4).astype(np.uint8), (16, 1))
        Image.fromarray(COLOURS[labels]).save(folder / split / f"{one}.png")
        labels[-2:] = 9
        Image.fromarray(labels).save(folder / f"{split}annot" / f"{one}.png")


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "stripes"
    for seed, (split, number) in enumerate((("train", 8), ("val", 3), ("test", 4))):
        stripes(place, split, number, seed, sizes=(24, 36))
    return place


def opened(folder: Path, parameters: Parameters = SMALL) -> segmentation.SegmentationData:
    return open_data(DATASET, f"folder:{folder}", parameters)


def test_colours_tell_the_classes_without_fault(folder: Path, seeing_colours: Extractor) -> None:
    found = segmentation.run(opened(folder), seeing_colours, SMALL, Context(0))
    assert found.scores["miou"] == found.scores["pixel_accuracy"] == found.scores["class_accuracy"] == 100
    assert found.interval == (100, 100)
    assert found.n == 4 and found.scores["learning_rate"] in SMALL.learning_rates
    assert list(found.samples["index"]) == [0, 1, 2, 3] and list(found.samples["image"]) == ["0", "1", "2", "3"]
    # Two of 16 rows are not judged; images 24 and 36 px wide in turn.
    assert list(found.samples["pixels"]) == [14 * 24, 14 * 36] * 2
    classes = found.tables["classes"]
    assert list(classes["name"]) == ["red", "green", "blue"] and (classes["iou"] == 100).all()
    assert classes["labelled_pixels"].sum() == found.samples["pixels"].sum()


def test_features_that_say_nothing_give_one_class_everywhere(folder: Path, seeing_colours: Extractor) -> None:
    backbone: Any = seeing_colours.model.backbone
    backbone.norm.weight.data.zero_()
    found = segmentation.run(opened(folder), seeing_colours, SMALL, Context(0))
    predicted = found.tables["classes"]["predicted_pixels"]
    assert (predicted > 0).sum() == 1
    # One class is right on its share of the pixels and the others 0.
    assert found.scores["miou"] == pytest.approx(found.scores["pixel_accuracy"] / 3)


def test_pixels_that_are_not_judged_change_nothing(folder: Path, seeing_colours: Extractor) -> None:
    """Neither in training nor in the score: what the image shows there may be anything its patches do not see."""
    data = opened(folder)
    before = segmentation.run(data, seeing_colours, SMALL, Context(0))
    for path in sorted(folder.glob("*annot/*.png")):
        labels = read(path).copy()
        labels[-4:] = 9
        Image.fromarray(labels).save(path)
    after = segmentation.run(opened(folder), seeing_colours, SMALL, Context(0))
    assert (after.samples["pixels"] == before.samples["pixels"] * 12 // 14).all()
    assert after.scores["miou"] == 100


def test_the_test_split_decides_nothing(folder: Path, seeing_colours: Extractor) -> None:
    rates = SMALL.model_copy(update={"learning_rates": (1e-5, 0.1, 1e-4)})
    before = segmentation.run(opened(folder), seeing_colours, rates, Context(0)).scores
    assert before["learning_rate"] == 0.1 and before["validation_miou"] == 100
    for path in sorted((folder / "testannot").glob("*.png")):
        labels = read(path)
        Image.fromarray(np.where(labels == 9, 9, (labels + 1) % 3).astype(np.uint8)).save(path)
    after = segmentation.run(opened(folder), seeing_colours, rates, Context(0)).scores
    assert after["miou"] == 0
    assert all(after[name] == before[name] for name in ("learning_rate", "validation_miou"))


def test_without_validation_split_a_part_of_train_chooses_and_all_of_it_trains(
    monkeypatch: pytest.MonkeyPatch, folder: Path, seeing_colours: Extractor
) -> None:
    fitted: list[tuple[int, int]] = []
    original = segmentation.fit_heads

    def watched(data: Any, images: Any, rates: Any, *others: Any, **named: Any) -> Any:
        fitted.append((len(images), len(rates)))
        return original(data, images, rates, *others, **named)

    monkeypatch.setattr(segmentation, "fit_heads", watched)
    parameters = SMALL.model_copy(update={"validation": None, "held_out": 0.25})
    data = opened(folder, parameters)
    assert set(data.receipt()) == {"train", "test"}
    found = segmentation.run(data, seeing_colours, parameters, Context(0))
    assert fitted == [(6, 2), (8, 1)]
    assert found.scores["miou"] == 100
    assert "chosen among 2 by mIoU on 2 images of train" in found.notes[0]


@pytest.mark.parametrize(("number", "share"), [(20, 0.1), (3, 0.01), (2, 0.99)])
def test_held_out_images_are_others_than_those_trained_on(number: int, share: float) -> None:
    fit, held = held_out_images(number, share, seed=3)
    assert sorted(fit + held) == list(range(number)) and fit and held
    assert held_out_images(number, share, seed=3) == (fit, held)
    if number == 20:
        assert len(held) == 2 and held_out_images(number, share, seed=4)[1] != held
    with pytest.raises(DinobenchError, match="needs two train images"):
        held_out_images(1, share, seed=0)


def test_the_best_head_that_did_not_diverge_is_chosen() -> None:
    assert select([0.3, 0.5, 0.5, 0.9], [True, True, True, False]) == 1
    assert select([float("nan"), 0.0], [True, True]) == 1
    with pytest.raises(DinobenchError, match="every learning rate of the segmentation head diverged"):
        select([0.5, float("nan")], [False, True])


def test_a_test_split_without_labels_is_refused(folder: Path, seeing_colours: Extractor) -> None:
    for path in sorted((folder / "testannot").glob("*.png")):
        Image.fromarray(np.full_like(read(path), 9)).save(path)
    with pytest.raises(DinobenchError, match="no pixel of test has a label that is judged"):
        segmentation.run(opened(folder), seeing_colours, SMALL, Context(0))


def test_classes_that_the_test_images_do_not_show_are_named(folder: Path, seeing_colours: Extractor) -> None:
    for path in sorted((folder / "testannot").glob("*.png")):
        labels = read(path)
        Image.fromarray(np.where(labels == 2, 9, labels).astype(np.uint8)).save(path)
    found = segmentation.run(opened(folder), seeing_colours, SMALL, Context(0))
    assert any("the test images show no blue" in note for note in found.notes)
    assert np.isnan(found.tables["classes"]["iou"][2]) or found.tables["classes"]["iou"][2] == 0


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((240, 180), 180, None, (240, 180)),
        ((480, 360), 180, None, (240, 180)),
        ((683, 512), 512, 2048, (683, 512)),
        ((500, 375), 512, 2048, (683, 512)),
        ((6000, 600), 512, 2048, (2048, 205)),
        ((30, 50), None, None, (30, 50)),
    ],
)
def test_inputs_keep_their_shape(
    size: tuple[int, int], short: int | None, long: int | None, expected: tuple[int, int]
) -> None:
    parameters = SMALL.model_copy(update={"short_side": short, "long_side": long})
    assert input_size(*size, parameters) == expected
    if max(size) < 1000:
        assert prepare_image(Image.new("RGB", size), parameters).shape == (3, expected[1], expected[0])


def suite(**changes: Any) -> Suite:
    parameters = {**SMALL.model_dump(mode="json"), "iterations": 8}
    definition = {"name": "stripes", "version": 1, "protocol": "segmentation", "headline": "miou", "baseline_seeds": 2}
    return Suite.model_validate(
        {**definition, "dataset": {"name": "stripes"}, "parameters": parameters, "paper": "none", **changes}
    )


def test_a_measurement_has_receipt_baselines_and_cache(folder: Path, model: LoadedModel, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    first, second = (measure(suite(), model, data=f"folder:{folder}", cache=cache) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert (first.scores, first.interval, first.baselines) == (second.scores, second.interval, second.baselines)
    pd.testing.assert_frame_equal(first.samples, second.samples)
    assert first.n == 4 and first.interval[0] <= first.scores["miou"] <= first.interval[1]
    receipt = first.receipt
    assert json.loads(json.dumps(receipt)) == receipt
    assert {role: part["n"] for role, part in receipt["dataset"].items()} == {"train": 8, "validation": 3, "test": 4}
    assert len(receipt["features"]) == 3
    assert list(first.baselines) == ["raw_pixels", "random_init"]
    assert {"miou", "miou_seed_sd"} <= set(first.baselines["random_init"])


def test_the_mean_colour_is_a_floor_that_sees_colours(folder: Path) -> None:
    scores = segmentation.pixel_scores(opened(folder), SMALL, Context(0))
    assert scores["miou"] == 100
    gray = SMALL.model_copy(update={"colour_patch": 16})
    # Patches of four stripes cannot tell them apart.
    assert segmentation.pixel_scores(opened(folder), gray, Context(0))["miou"] < 60


def test_label_maps_of_twice_the_size_are_judged_at_their_own(folder: Path, seeing_colours: Extractor) -> None:
    """Images are brought to the input size, label maps stay as they are."""
    for path in sorted(folder.glob("*/*.png")):
        with Image.open(path) as image:
            large = image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)
        large.save(path)
    parameters = SMALL.model_copy(update={"short_side": 16})
    found = segmentation.run(opened(folder, parameters), seeing_colours, parameters, Context(0))
    assert list(found.samples["pixels"]) == [28 * 48, 28 * 72] * 2
    assert found.scores["miou"] > 95


@pytest.mark.skipif(not PACK.is_file(), reason="DINOBENCH_DATA has no pack camvid-180")
def test_a_few_iterations_on_the_pack_find_sky_and_road(make_model: Callable[..., LoadedModel]) -> None:
    kwargs = {"img_size": 60, "patch_size": 20, "embed_dim": 32, "depth": 1, "num_heads": 2}
    camvid = load_suite("camvid_segmentation")
    parameters = camvid.resolved_parameters().model_copy(
        update={"learning_rates": (0.03,), "iterations": 40, "batch_size": 8}
    )
    data = open_data(camvid.dataset, f"folder:{PACK}", parameters)
    found = segmentation.run(data, Extractor(make_model(kwargs=kwargs)), parameters, Context(0))
    assert found.n == 233 and found.scores["pixel_accuracy"] > 40
    classes = found.tables["classes"].set_index("name")
    assert classes["iou"]["sky"] > 40 and classes["iou"]["road"] > 30
    assert classes["labelled_pixels"].sum() == found.samples["pixels"].sum()
    assert IGNORED not in classes["class"].to_list()


@pytest.fixture
def seeing_colours(make_model: Callable[..., LoadedModel]) -> Extractor:
    """Patches of 4 px whose features are their mean colours: blocks that add nothing, no positions."""
    kwargs = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = make_model(kwargs=kwargs)
    backbone: Any = model.backbone
    backbone.pos_embed.data.zero_()
    projection = backbone.patch_embed.proj
    projection.weight.data.zero_()
    projection.bias.data.zero_()
    for channel in range(3):
        projection.weight.data[channel, channel] = 1
    for block in backbone.blocks:
        block.attn.proj.weight.data.zero_()
        block.mlp.fc2.weight.data.zero_()
    return Extractor(replace(model, backbone=backbone.eval()))
