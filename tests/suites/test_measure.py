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
from suites import measure as measuring
from suites.cache import FeatureCache
from suites.measure import check_labels, measure
from suites.suite import Suite, load_suite, suite_names

MakeImages = Callable[..., ImageSet]
DIGITS = [name for name in suite_names() if name.startswith("digits_")]
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


def test_imagenet_suites_ask_for_the_path(model: LoadedModel) -> None:
    with pytest.raises(UsageError, match="add --data imagenet:/path"):
        measure(load_suite("imagenet_knn"), model)


def test_missing_labels_and_single_classes_are_refused(make_images: MakeImages) -> None:
    suite = load_suite("digits_knn")
    with pytest.raises(DinobenchError, match="needs labels, but patterns train has none"):
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
