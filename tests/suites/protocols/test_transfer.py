from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from pretrain.data.images import ImageSet
from pretrain.data.multi_label import VOC_CLASSES, MultiLabelSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.checkpoint import LoadedModel
from suites.cache import FeatureCache
from suites.eleven_point import average_precision
from suites.extractor import Extractor
from suites.measure import measure
from suites.protocols import transfer
from suites.protocols.linear import held_out_split
from suites.protocols.logistic import Parameters as LogisticParameters
from suites.protocols.protocol import Context
from suites.protocols.transfer import Parameters, Part, TransferData, score_features
from suites.suite import Suite, SuiteDataset, load_suite, suite_names

SHORT = LogisticParameters(first_exponent=-3, last_exponent=3, num_penalties=7, held_out=0.2, tolerance=1e-8)
GRID = 10.0 ** np.arange(-3, 4)
SMALL = EvalTransform(resize=16, crop=16)
NAMES = ("a", "b", "c", "d")
needs_packs = pytest.mark.skipif(not os.environ.get("DINOBENCH_DATA"), reason="DINOBENCH_DATA is not set")


def labelled(num: int, seed: int) -> Part:
    """Four classes of unequal size whose features overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.5, 0.3, 0.15, 0.05]), num, replacement=True, generator=generator)
    means = 1.2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return Part(means[labels] + torch.randn(num, 6, generator=generator), labels, torch.arange(num))


def several(num: int, seed: int) -> Part:
    """Presence of four classes, some of it difficult."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, 6, generator=generator)
    signal = features[:, :4] + torch.randn(num, 4, generator=generator)
    presence = (signal > 0.7).long()
    presence[torch.rand(num, 4, generator=generator) < 0.1] = -1
    return Part(features, presence, torch.arange(num))


def oracle_scores(fit: Part, c: float, queries: Part) -> tuple[np.ndarray, float]:
    """scikit-learn's decisions and their cross-entropy."""
    x, y, q, t = (v.double().numpy() if v.is_floating_point() else v.numpy() for v in (*_xy(fit), *_xy(queries)))
    if y.ndim == 1:
        model = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x, y)
        return model.decision_function(q), -np.log(model.predict_proba(q)[np.arange(len(t)), t]).mean()
    columns = [
        LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x[y[:, k] >= 0], y[y[:, k] >= 0, k]).decision_function(q)
        for k in range(4)
    ]
    decisions = np.stack(columns, 1)
    return decisions, np.logaddexp(0, np.where(t == 1, -1, 1) * decisions)[t >= 0].mean()


def _xy(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return part.features, part.targets


def oracle_value(metric: str, decisions: np.ndarray, targets: np.ndarray) -> float:
    if metric == "top1":
        return 100 * float((decisions.argmax(1) == targets).mean())
    if metric == "mean_per_class":
        return 100 * balanced_accuracy_score(targets, decisions.argmax(1))
    return 100 * float(np.mean([average_precision(decisions[:, k], targets[:, k]) for k in range(4)]))


def joined(*parts: Part) -> Part:
    return Part(*(torch.cat([getattr(part, name) for part in parts]) for name in ("features", "targets", "index")))


def rows(part: Part, chosen: torch.Tensor) -> Part:
    return Part(part.features[chosen], part.targets[chosen], part.index[chosen])


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("metric", ["top1", "mean_per_class", "voc07_map"])
def test_choice_and_score_equal_those_of_scikit_learn(metric: str, validated: bool) -> None:
    make = several if metric == "voc07_map" else labelled
    train, validation, test = make(90, 0), make(70, 1), make(150, 2)
    parts = {"train": train, "test": test} | ({"validation": validation} if validated else {})
    found = score_features(parts, NAMES, Parameters(metric=metric, logistic=SHORT), Context(0, seed=4))
    if validated:
        fit, held, known = train, validation, joined(train, validation)
    else:
        strata = train.targets if metric != "voc07_map" else torch.zeros(90, dtype=torch.int64)
        fit, held = (rows(train, part) for part in held_out_split(strata, 0.2, seed=4))
        known = train
    tried = [oracle_scores(fit, c, held) for c in GRID]
    values = [oracle_value(metric, decisions, held.targets.numpy()) for decisions, _ in tried]
    table = found.tables["path"]
    np.testing.assert_allclose(table[f"held_out_{metric}"], values, atol=1e-6)
    np.testing.assert_allclose(table["held_out_loss"], [loss for _, loss in tried], rtol=1e-4)
    best = max(range(7), key=lambda i: (table[f"held_out_{metric}"][i], -table["held_out_loss"][i]))
    assert found.scores["C"] == pytest.approx(GRID[best])
    decisions, _ = oracle_scores(known, GRID[best], test)
    assert found.scores[metric] == pytest.approx(oracle_value(metric, decisions, test.targets.numpy()), abs=1e-6)
    assert found.interval[0] < found.scores[metric] < found.interval[1] and found.n == 150
    assert f"on {len(held.features)} images of {'the val' if validated else 'a held-out'}" in found.notes[0]


def test_both_accuracies_and_the_samples_of_one_label_per_image() -> None:
    parts, test = {"train": labelled(90, 0), "test": labelled(150, 2)}, labelled(150, 2)
    found = score_features(parts, NAMES, Parameters(logistic=SHORT), Context(0))
    assert list(found.samples) == ["index", "label", "prediction", "correct"]
    assert found.samples["label"].tolist() == test.targets.tolist()
    assert 100 * found.samples["correct"].mean() == pytest.approx(found.scores["top1"])
    balanced = balanced_accuracy_score(found.samples["label"], found.samples["prediction"])
    assert found.scores["mean_per_class"] == pytest.approx(100 * balanced)
    assert found.tables["classes"]["recall"].mean() == pytest.approx(found.scores["mean_per_class"])


def test_samples_of_several_classes_hold_presence_and_score_of_each() -> None:
    parts = {"train": several(90, 0), "test": several(150, 2)}
    found = score_features(parts, NAMES, Parameters(metric="voc07_map", logistic=SHORT), Context(0))
    values = [
        average_precision(found.samples[f"score_{name}"].to_numpy(), found.samples[f"label_{name}"].to_numpy())
        for name in NAMES
    ]
    assert 100 * np.mean(values) == pytest.approx(found.scores["voc07_map"])
    assert set(found.scores) == {"voc07_map", "held_out_voc07_map", "C"}


@pytest.mark.parametrize("metric", ["top1", "voc07_map"])
def test_selection_never_reads_the_test_part(metric: str) -> None:
    make = several if metric == "voc07_map" else labelled
    tests = make(150, 2), replace(make(150, 2), targets=make(150, 2).targets.roll(1, 0))
    found = [
        score_features(
            {"train": make(90, 0), "test": test}, NAMES, Parameters(metric=metric, logistic=SHORT), Context(0)
        )
        for test in tests
    ]
    assert found[0].tables["path"].equals(found[1].tables["path"])
    assert found[0].scores[metric] > found[1].scores[metric]


def test_difficult_images_of_train_and_test_do_not_count() -> None:
    train, test = several(90, 0), several(150, 2)
    column = [0]
    parameters = Parameters(metric="voc07_map", logistic=SHORT, validation="val")
    parts = {role: Part(p.features, p.targets[:, column], p.index) for role, p in (("train", train), ("test", test))}
    parts["validation"] = replace(several(70, 1), targets=several(70, 1).targets[:, column])
    before = score_features(parts, ("a",), parameters, Context(0))
    for part in parts.values():
        part.features[part.targets[:, 0] == -1] = 30.0
    after = score_features(parts, ("a",), parameters, Context(0))
    assert before.scores == after.scores
    counted = {role: rows(part, (part.targets[:, 0] >= 0).nonzero().flatten()) for role, part in parts.items()}
    alone = score_features(counted, ("a",), parameters, Context(0))
    assert alone.scores["voc07_map"] == pytest.approx(before.scores["voc07_map"], abs=1e-6)


def test_a_choice_without_any_image_to_be_found_is_refused() -> None:
    train, held = several(40, 0), several(20, 1)
    parts = {"train": train, "validation": replace(held, targets=held.targets.clamp_max(0)), "test": several(20, 2)}
    with pytest.raises(DinobenchError, match="no class has an image among the 20 on which C is chosen"):
        score_features(parts, NAMES, Parameters(metric="voc07_map", logistic=SHORT), Context(0))


def test_an_edge_of_the_grid_and_unfinished_fits_are_told() -> None:
    parts = {"train": labelled(90, 0), "test": labelled(50, 2)}
    options = LogisticParameters(first_exponent=2, last_exponent=3, num_penalties=2, max_evaluations=2)
    notes = score_features(parts, NAMES, Parameters(logistic=options), Context(0)).notes
    assert "the chosen C is at the edge of the grid" in notes and "3 of 3 fits ended above the tolerance" in notes


def test_features_are_those_of_other_suites_with_the_transform(
    model: LoadedModel, make_images: Callable[..., ImageSet], tmp_path: Path
) -> None:
    data = TransferData({"train": make_images(60), "test": make_images(30, split="test", seed=1)})
    parameters = Parameters(transform=SMALL, logistic=SHORT)
    extractor = Extractor(model, cache=FeatureCache(tmp_path))
    found = [transfer.run(data, extractor, parameters, Context(0, model=model)) for _ in range(2)]
    assert [entry["from_cache"] for entry in extractor.log] == [False, False, True, True]
    assert found[0].scores == found[1].scores and found[0].scores["top1"] > 80
    assert data.name == "patterns" and data.receipt()["test"]["n"] == 30
    other = TransferData({**data.parts, "validation": make_images(20, seed=3)})
    assert other.fingerprint != data.fingerprint and set(other.receipt()) == {"train", "validation", "test"}


def test_pixels_are_features_where_images_are_small(make_images: Callable[..., ImageSet]) -> None:
    data = TransferData({"train": make_images(60), "test": make_images(30, split="test", seed=1)})
    parameters = Parameters(transform=SMALL, logistic=SHORT)
    scores = transfer.pixel_scores(data, parameters, Context(0))
    assert scores is not None and scores["top1"] > 90
    validated = TransferData({**data.parts, "validation": make_images(20, seed=3)})
    assert transfer.pixel_scores(validated, parameters, Context(0)) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Reddish and bluish pictures in train/, val/ and test/."""
    random = np.random.default_rng(0)
    for split, num in (("train", 20), ("val", 8), ("test", 12)):
        for name, colour in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(num):
                noise = random.integers(-40, 40, (12, 14, 3))
                picture = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
                picture.save(tmp_path / "data" / split / name / f"{k}.png")
    return tmp_path / "data"


def small_suite(**changes: object) -> Suite:
    parameters = {"transform": SMALL.model_dump(mode="json"), "logistic": SHORT.model_dump(mode="json")}
    definition = {"name": "small", "version": 1, "protocol": "transfer", "headline": "top1", "baseline_seeds": 1}
    return Suite.model_validate({**definition, "parameters": {**parameters, **changes}})


def test_a_suite_is_measured_with_its_receipt_and_baselines(folder: Path, model: LoadedModel, tmp_path: Path) -> None:
    suite, cache = small_suite(validation="val", metric="mean_per_class"), FeatureCache(tmp_path / "cache")
    found = measure(suite, model, data=f"folder:{folder}", cache=cache)
    assert {role: part["n"] for role, part in found.receipt["dataset"].items()} == {
        "train": 40,
        "validation": 16,
        "test": 24,
    }
    assert json.loads(json.dumps(found.receipt)) == found.receipt
    assert found.scores["top1"] == 100 and set(found.baselines) == {"random_init"}
    again = measure(suite, model, data=f"folder:{folder}", cache=cache)
    assert again.from_cache and again.scores == found.scores
    assert "raw_pixels" in measure(small_suite(), model, data=f"folder:{folder}").baselines


def test_labels_that_do_not_suit_are_refused(folder: Path) -> None:
    def opened(metric: str) -> TransferData:
        return transfer.open_data(SuiteDataset(), f"folder:{folder}", Parameters(metric=metric))

    with pytest.raises(DinobenchError, match="voc07_map needs several classes per image, as of voc2007: not folder-da"):
        opened("voc07_map")
    (folder / "test" / "red").rename(folder / "test" / "green")
    assert opened("top1").parts["test"].classes == ("blue", "green", "red")
    for picture in (folder / "train" / "red").iterdir():
        picture.unlink()
    with pytest.raises(DinobenchError, match="train has one class"):
        opened("top1")
    (folder / "train" / "loose.png").write_bytes((folder / "train" / "blue" / "0.png").read_bytes())
    with pytest.raises(DinobenchError, match="needs one label per image, but folder-data train has none"):
        opened("top1")
    with pytest.raises(UsageError, match="add --data folder:/path"):
        transfer.open_data(SuiteDataset(), None, Parameters())


def test_classes_that_differ_between_splits_are_refused(
    make_images: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"train": make_images(num_classes=3), "test": make_images(num_classes=2, split="test")}
    monkeypatch.setattr(transfer, "open_dataset", lambda name, split, root: sets[split])
    with pytest.raises(DinobenchError, match=r"the classes of train \(3\) and test \(2\) differ, for example 'class2'"):
        transfer.open_data(SuiteDataset(name="patterns"), None, Parameters())


def write_voc(root: Path) -> None:
    """Two images per split: a dog, and a cat beside a difficult dog."""
    top = root / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (top / name).mkdir(parents=True)
    objects = {"1": [("dog", 0)], "2": [("cat", 0), ("dog", 1)]}
    for split in ("train", "val", "test"):
        for number, things in objects.items():
            Image.new("RGB", (20, 18), (10, 20, 30)).save(top / f"JPEGImages/{split}{number}.jpg")
            items = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in things)
            (top / f"Annotations/{split}{number}.xml").write_text(f"<annotation>{items}</annotation>")
        (top / f"ImageSets/Main/{split}.txt").write_text("".join(f"{split}{number}\n" for number in objects))
    (top / "ImageSets/Main/trainval.txt").write_text("")


def test_a_folder_may_hold_the_set_as_the_data_root_would(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DINOBENCH_DATA", raising=False)
    write_voc(tmp_path)
    suite = load_suite("transfer_voc2007")
    data = transfer.open_data(suite.dataset, f"folder:{tmp_path}", suite.resolved_parameters())
    assert data.name == "voc2007" and set(data.parts) == {"train", "validation", "test"}
    small = Suite.model_validate({**suite.model_dump(), "parameters": small_suite().parameters}).model_copy(
        update={"parameters": {**small_suite().parameters, "metric": "voc07_map", "validation": "val"}}
    )
    found = measure(small, model, data=f"folder:{tmp_path}")
    assert (found.dataset, found.n) == ("voc2007", 2)
    # The dog of test is the only image that counts for its class: nothing stands before it.
    table = found.tables["classes"].set_index("class")["average_precision"]
    assert table["dog"] == 100 and set(table.index) == {"cat", "dog"}


def test_several_classes_per_image_need_their_metric(tmp_path: Path) -> None:
    write_voc(tmp_path)
    dataset = SuiteDataset(name="voc2007")
    opened = transfer.open_data(dataset, f"folder:{tmp_path}", Parameters(metric="voc07_map", validation="val"))
    assert isinstance(opened.parts["train"], MultiLabelSet) and opened.parts["train"].classes == VOC_CLASSES
    with pytest.raises(DinobenchError, match="metric top1 needs one label per image, but voc2007 train has none"):
        transfer.open_data(dataset, f"folder:{tmp_path}", Parameters())


@pytest.mark.parametrize("name", [name for name in suite_names() if name.startswith("transfer_")])
def test_definitions_pin_the_metric_of_the_set_and_say_what_is_comparable(name: str) -> None:
    suite = load_suite(name)
    per_class = {"transfer_aircraft", "transfer_pets", "transfer_caltech101", "transfer_flowers102"}
    expected = "mean_per_class" if name in per_class else "voc07_map" if name == "transfer_voc2007" else "top1"
    parameters = suite.resolved_parameters()
    assert suite.headline == parameters.metric == expected
    own = {"transfer_aircraft", "transfer_dtd", "transfer_flowers102", "transfer_voc2007"}
    assert (parameters.validation, suite.dataset.test) == ("val" if name in own else None, "test")
    assert (parameters.transform.resize, parameters.transform.crop) == (224, 224)
    np.testing.assert_allclose(parameters.logistic.penalties, 10 ** np.linspace(-5, 6, 45))
    if "fine-tun" in suite.paper:
        assert "not comparable" in suite.description


@needs_packs
def test_raw_pixels_of_fashion_mnist_reach_what_a_linear_classifier_does() -> None:
    """Linear classifiers of 1,200 images reach about 80 %; chance is 10 %."""
    parameters = Parameters(logistic=LogisticParameters(first_exponent=-2, last_exponent=-1, num_penalties=2))
    dataset = SuiteDataset(name="fashion_mnist", train="train[:0.02]", test="test[:0.1]")
    scores = transfer.pixel_scores(transfer.open_data(dataset, None, parameters), parameters, Context(0))
    assert scores is not None and 75 < scores["top1"] < 88
    assert scores["mean_per_class"] == pytest.approx(scores["top1"])  # 100 test images of each class


@needs_packs
@pytest.mark.slow
def test_a_tiny_network_transfers_to_the_pack_of_cifar10(model: LoadedModel) -> None:
    suite = small_suite()
    suite = suite.model_copy(update={"dataset": SuiteDataset(name="cifar10", train="train[:0.02]", test="test[:0.05]")})
    found = measure(suite, model, baselines=False)
    assert (found.dataset, found.n) == ("cifar10-jpeg", 500)
    assert 15 < found.scores["top1"] < 60
