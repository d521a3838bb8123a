from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.data.images import ImageSet
from pretrain.errors import DinobenchError, UsageError
from pretrain.models import checkpoint
from pretrain.models.checkpoint import LoadedModel
from suites import features, passes
from suites import measure as measuring
from suites.cache import FeatureCache
from suites.features import extract
from suites.measure import check_labels, measure
from suites.protocols import knn
from suites.rows import HEADER_BYTES
from suites.suite import Suite, load_suite, suite_names

MakeImages = Callable[..., ImageSet]
DIGITS = [name for name in suite_names() if name.startswith("digits_") and not load_suite(name).reads_images]
SMALL = {
    "digits_linear": {"epochs": 2, "learning_rates": [0.1, 1.0], "num_folds": 1},
    "digits_clusters": {"num_seeds": 1},
    "digits_linear_sweep": {"epochs": 2, "learning_rates": [0.1, 1.0]},
    "digits_logistic": {"num_penalties": 4},
    "digits_logistic_fewshot": {"num_draws": 2},
}


def small(name: str) -> Suite:
    """A digits suite with little to compute."""
    suite = load_suite(name)
    return suite.model_copy(update={"parameters": {**suite.parameters, **SMALL.get(name, {})}, "baseline_seeds": 1})


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.mark.parametrize("name", DIGITS)
def test_digits_suites_measure_a_random_network_twice_the_same(
    name: str, model: LoadedModel, cache: FeatureCache
) -> None:
    first, second = (measure(small(name), model, cache=cache) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.scores == second.scores
    assert first.interval == second.interval
    assert first.baselines == second.baselines
    assert first.headline in first.scores
    assert first.interval[0] <= first.scores[first.headline] <= first.interval[1]
    assert all(first.headline in scores for scores in first.baselines.values())
    assert first.dataset == "digits"
    assert first.n == (1297 if name in ("digits_prototypes", "digits_representation") else 500)
    assert len(first.samples) == 500
    assert {"index", "label"} <= set(first.samples.columns)


def test_receipt_says_what_was_measured_with_what_and_is_plain_json(model: LoadedModel, cache: FeatureCache) -> None:
    suite = small("digits_knn")
    receipt = measure(suite, model, cache=cache, baselines=False).receipt
    assert json.loads(json.dumps(receipt)) == receipt
    assert receipt["suite"] == "digits_knn@1"
    assert receipt["suite_fingerprint"] == suite.fingerprint()
    assert receipt["checkpoint"]["sha256"] == "0" * 64
    assert receipt["checkpoint"]["network"] == "teacher"
    assert receipt["dataset"]["test"]["n"] == 500
    assert len(receipt["dataset"]["train"]["fingerprint"]) == 64
    assert receipt["transform"]["resize"] == 16
    assert (receipt["device"], receipt["precision"], receipt["feature"]) == ("cpu", "fp32", "pooled")
    assert {"torch", "timm", "numpy"} <= set(receipt["packages"])
    assert receipt["wall_seconds"] > 0


def test_baselines_can_be_left_out(model: LoadedModel, cache: FeatureCache) -> None:
    assert measure(small("digits_knn"), model, cache=cache, baselines=False).baselines == {}


def test_a_saved_checkpoint_is_measured_like_the_network_in_memory(
    model: LoadedModel, cache: FeatureCache, tmp_path: Path
) -> None:
    assert model.head is not None
    networks = {"backbone": model.backbone, "head": model.head}
    state = {f"{part}.{key}": value for part, module in networks.items() for key, value in module.state_dict().items()}
    recipe = {
        "method": {"name": "dino"},
        "model": model.provenance["model"],
        "head": model.head.config.model_dump(mode="json"),
        "data": {"name": "digits"},
    }
    payload = {"format": checkpoint.FORMAT, "recipe": recipe, "step": 7, "student": state, "teacher": state}
    checkpoint.save(tmp_path / "last.pt", {**payload, "teacher_temperature": 0.04})
    loaded = checkpoint.load(tmp_path / "last.pt")
    for name in ("digits_knn", "digits_prototypes"):
        options = {"cache": cache, "baselines": False}
        ours, theirs = (measure(small(name), network, **options) for network in (model, loaded))
        assert theirs.from_cache  # the key is the content of the weights, not the file
        assert ours.scores == theirs.scores
    assert theirs.receipt["checkpoint"]["step"] == 7


def test_another_data_set_takes_the_place_of_the_suites_own(
    model: LoadedModel, cache: FeatureCache, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 30), ("val", 8)):
        for i in range(number):
            folder = tmp_path / split / ("dark" if i % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 100, (16, 16, 3), generator=generator) + (0 if i % 2 else 150)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    definition = small("digits_knn").model_dump()
    definition |= {"dataset": {"train": "train", "test": "val"}, "parameters": {"k": [5], "headline_k": 5}}
    suite = Suite.model_validate({**definition, "baselines": ["raw_pixels"]})
    result = measure(suite, model, data=f"folder:{tmp_path}", cache=cache)
    assert result.n == 8
    assert result.receipt["dataset"]["train"]["n"] == 30
    assert "raw_pixels" in result.baselines
    with pytest.raises(UsageError, match="does not know where its images are"):
        measure(suite, model, cache=cache)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_three_suites_take_one_pass_over_each_split(
    model: LoadedModel, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    of_dino = small("digits_linear").model_copy(update={"feature": "dino"})
    suites = [small("digits_knn"), small("digits_linear_sweep"), of_dino]
    given: list[int] = []
    model.backbone.register_forward_hook(lambda network, inputs, output: given.append(len(inputs[0])))
    networks: list[object] = []
    run = passes.run

    def record(job: passes.Pass, *rest: object, **more: object) -> passes.Report:
        networks.append(job.backbone)
        return run(job, *rest, **more)

    monkeypatch.setattr(passes, "run", record)
    for number in order:
        measure(suites[number], model, cache=cache)
    assert sum(given) == 1297 + 500
    # One of the checkpoint and one of the random network, over each of train and test.
    assert [networks.count(network) for network in dict.fromkeys(networks)] == [2, 2]


def test_suites_beside_are_taken_in_when_they_read_the_same_images(model: LoadedModel, tmp_path: Path) -> None:
    suites = [small("digits_knn"), small("digits_linear_sweep")]
    other = suites[1].model_copy(update={"transform": suites[1].transform.model_copy(update={"resize": 32})})
    for beside, columns in ((suites, 3), ([other, load_suite("copydays"), load_suite("cifar10_linear_sweep")], 1)):
        # Holds one entry, the last one (of test), and of it no more than what is asked for.
        small_cache = FeatureCache(tmp_path / str(columns), max_bytes=1)
        measure(suites[0], model, beside=beside, cache=small_cache, baselines=False)
        assert (small_cache.size() - HEADER_BYTES) // (500 * 16 * 4) == columns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """120 light and dark pictures in train, 8 in val, as JPEG files."""
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 120), ("val", 8)):
        for i in range(number):
            path = tmp_path / "data" / split / ("dark" if i % 2 else "light") / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 100, (16, 16, 3), generator=generator) + (0 if i % 2 else 150)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return tmp_path / "data"


def folder_suite(protocol: str, **changes: object) -> Suite:
    definition = {"name": "mine", "version": 1, "protocol": protocol, "headline": "top1"}
    definition |= {"dataset": {"train": "train", "test": "val"}, "transform": {"resize": 16, "crop": 16}}
    return Suite.model_validate({**definition, "baseline_seeds": 1, **changes})


def test_an_unreadable_image_is_left_out_and_told(
    model: LoadedModel, cache: FeatureCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = folder_suite("knn", parameters={"k": [5], "headline_k": 5})
    # Opened before the file was damaged, as if it had not been among those that are tried.
    opened = measuring.open_splits(suite, f"folder:{folder}")
    monkeypatch.setattr(measuring, "open_splits", lambda *_: opened)
    damaged = folder / "train" / "dark" / "33.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for result in [measure(suite, model, cache=cache) for _ in range(2)]:  # computed, then from the cache
        assert result.receipt["dataset"]["train"]["n"] == 119
        (reason,) = result.receipt["dataset"]["train"]["unreadable"]
        assert "dark/33.jpg: OSError" in reason
        assert "unreadable" not in result.receipt["dataset"]["test"]
        (note,) = [note for note in result.notes if "cannot be read" in note]
        assert note.startswith("1 of 120 images of folder-data train cannot be read and are left out: ")
        assert {"raw_pixels", "random_init"} <= set(result.baselines)


def test_lists_of_images_are_found_in_a_folder_data_set(
    model: LoadedModel, cache: FeatureCache, folder: Path, tmp_path: Path
) -> None:
    names = {"one": ["light/4.jpg", "dark/77.jpg"], "other": ["light/0.jpg", "dark/1.jpg"]}
    for name, lines in names.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    files = [str(tmp_path / f"{name}.txt") for name in names]
    parameters = {"shots": [], "lists": {"shot1": files}}
    suite = folder_suite("fewshot", parameters=parameters, headline="shot1")
    result = measure(suite, model, data=f"folder:{folder}", cache=cache)
    # By hand: the nearest of the two listed images, for each list.
    train, test = measuring.open_splits(suite, f"folder:{folder}")
    found = [extract(model, images, suite.transform) for images in (train, test)]
    z, queries = (torch.nn.functional.normalize(part.cls, dim=1) for part in found)
    paths = [train.path(i) for i in range(120)]
    expected = []
    for lines in names.values():
        light, dark = (next(i for i in range(120) if paths[i].endswith(f"/{line}")) for line in lines)
        is_dark = (queries @ z[dark] > queries @ z[light]).long()  # classes in alphabetical order: dark, light
        assert test.labels is not None
        expected.append(100 * (is_dark == 1 - test.labels).double().mean().item())
    assert result.scores["shot1"] == pytest.approx(sum(expected) / 2)
    assert result.scores["shot1_sd"] == pytest.approx(torch.tensor(expected).std().item())
    assert "shot1" in result.baselines["raw_pixels"]
    in_memory = small("digits_fewshot").model_copy(update={"parameters": {**parameters}})
    with pytest.raises(DinobenchError, match="need a data set of image files"):
        measure(in_memory, model, cache=cache, baselines=False)


@pytest.mark.parametrize("streams", [False, True])
def test_a_protocol_gets_features_as_kept_only_where_it_says_so(
    model: LoadedModel, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    monkeypatch.setattr(features, "HALF_BYTES", 0)
    monkeypatch.setattr(knn, "STREAMS", streams, raising=False)
    seen: list[torch.dtype] = []
    run = knn.run
    monkeypatch.setattr(knn, "run", lambda train, *rest: seen.append(train.features.dtype) or run(train, *rest))
    result = measure(small("digits_knn"), model, cache=cache, baselines=False)
    assert seen == [torch.float16 if streams else torch.float32]
    assert [part["stored"] for part in result.receipt["features"]] == ["float16", "float16"]
    monkeypatch.undo()
    exact = measure(small("digits_knn"), model, baselines=False)
    assert result.scores["top1"] == pytest.approx(exact.scores["top1"], abs=0.5)


def test_imagenet_suites_ask_for_the_path(model: LoadedModel) -> None:
    with pytest.raises(UsageError, match="add --data imagenet:/path"):
        measure(load_suite("imagenet_knn"), model)


def test_missing_labels_and_single_classes_are_refused(make_images: MakeImages) -> None:
    suite = load_suite("digits_knn")
    with pytest.raises(DinobenchError, match="labels, but patterns train has none: .*'prototypes' or 'representation'"):
        check_labels(suite, make_images(labelled=False), make_images(labelled=False))
    with pytest.raises(DinobenchError, match="at least two classes, but patterns train has 1"):
        check_labels(suite, make_images(num_classes=1), make_images(num_classes=1))
    check_labels(load_suite("digits_prototypes"), make_images(labelled=False), make_images(labelled=False))


def test_splits_with_different_classes_are_refused(make_images: MakeImages) -> None:
    with pytest.raises(DinobenchError, match=r"classes of train \(3\) and test \(2\) differ"):
        check_labels(load_suite("digits_knn"), make_images(), make_images(num_classes=2, split="test"))


def test_unlabelled_images_can_be_measured_for_their_prototypes(
    model: LoadedModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "open_splits", lambda *_: (make_images(labelled=False), make_images(labelled=False)))
    result = measure(load_suite("digits_prototypes"), model)
    assert result.scores["used"] >= 1
    assert result.baselines == {}
    assert result.samples.empty


def test_collapsed_features_are_measured_and_called_collapsed(model: LoadedModel) -> None:
    with torch.no_grad():
        for parameter in model.backbone.norm.parameters():  # type: ignore[union-attr]
            parameter.fill_(1.0)
        model.backbone.norm.weight.zero_()  # type: ignore[union-attr, operator]
    result = measure(small("digits_knn"), replace(model), baselines=False)
    assert result.scores["top1"] < 15
    assert any("collapsed" in note for note in result.notes)


def test_a_headline_that_is_no_score_names_the_scores(model: LoadedModel, cache: FeatureCache) -> None:
    suite = small("digits_knn").model_copy(update={"headline": "accuracy"})
    with pytest.raises(UsageError, match="'accuracy' is no score of 'knn': top1, top5"):
        measure(suite, model, cache=cache, baselines=False)


@pytest.mark.parametrize("path", sorted(Path(measuring.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_file_imports_mlflow_or_faiss_at_its_top(path: Path) -> None:
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"mlflow", "faiss"}
