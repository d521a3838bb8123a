from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinobench import verify as module
from dinobench.evaluate import Evaluation, evaluate
from dinobench.files import read_json
from dinobench.loading import Loading
from dinobench.verify import Comparison, Options, Verdict, verify
from pretrain.errors import DinobenchError
from pretrain.models import checkpoint_file
from pretrain.models.positions import PositionalViT
from suites.cache import FeatureCache
from suites.suite import load_suite


def check(true_result: Any, **options: Any) -> Verdict:
    return verify(true_result.file, Options(device="cpu", **options), lambda text: None)


def names(verdict: Verdict) -> list[str]:
    return [comparison.name for comparison in verdict.mismatches]


def test_a_true_result_holds_from_checkpoint_and_images(true_result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the cache is off")

    for method in ("read", "get_or_compute", "read_scores"):
        monkeypatch.setattr(FeatureCache, method, refuse)
    verdict = check(true_result)
    assert verdict.holds
    assert verdict.scope == "checkpoint and images"
    compared = {comparison.name: comparison for comparison in verdict.comparisons}
    stated = read_json(true_result.file)
    assert {*stated["scores"], "n", "interval low", "interval high", "raw_pixels top1"} < compared.keys()
    assert compared["top1"].stated == compared["top1"].found == stated["scores"]["top1"]
    assert compared["top1"].allowed == pytest.approx(0.01 * stated["scores"]["top1"])


@pytest.mark.promise("one weight, label, pixel or score altered", "`verify` names it; exit 4")
def test_one_altered_weight_is_named_and_nothing_is_measured(true_result: Any) -> None:
    true_result.alter_weight()
    verdict = check(true_result)
    assert not verdict.holds
    assert not verdict.measured
    assert names(verdict) == ["checkpoint sha256"]


@pytest.mark.promise("one weight, label, pixel or score altered", "`verify` names it; exit 4")
@pytest.mark.parametrize(
    ("array", "role"),
    [("train_labels", "train"), ("test_labels", "test"), ("train_images", "train"), ("test_images", "test")],
)
def test_one_altered_label_or_pixel_is_named(true_result: Any, array: str, role: str) -> None:
    true_result.alter_image(array)
    verdict = check(true_result)
    assert not verdict.holds
    assert names(verdict) == [f"dataset fingerprint ({role})"]


@pytest.mark.promise("one weight, label, pixel or score altered", "`verify` names it; exit 4")
@pytest.mark.parametrize(
    ("keys", "value", "name"),
    [
        (("scores", "top1"), 99.0, "top1"),
        (("scores", "top5_k200"), 30.0, "top5_k200"),
        (("scores", "top1"), None, "top1"),
        (("scores", "top9"), 99.0, "top9"),
        (("n",), 79, "n"),
        (("interval",), [70.0, 99.0], "interval high"),
        (("baselines", "random_init", "top1"), 10.0, "random_init top1"),
    ],
)
def test_one_altered_score_is_named(true_result: Any, keys: tuple[str, ...], value: Any, name: str) -> None:
    if keys[-1] == "top9":
        document = read_json(true_result.file)
        assert "top9" not in document["scores"]
        true_result.alter("scores", value={**document["scores"], "top9": 99.0})
    else:
        true_result.alter(*keys, value=value)
    verdict = check(true_result)
    assert verdict.measured
    assert not verdict.holds
    assert name in names(verdict)


@pytest.mark.parametrize(
    ("keys", "value", "name"),
    [
        (("suite",), "digits_knn@2", "suite"),
        (("suite_fingerprint",), "0" * 12, "suite fingerprint"),
        (("headline",), "top1_k10", "headline"),
        (("provenance", "sha256"), "0" * 64, "checkpoint sha256"),
    ],
)
def test_what_it_was_made_from_is_compared_first(
    true_result: Any, keys: tuple[str, ...], value: str, name: str
) -> None:
    true_result.alter(*keys, value=value)
    verdict = check(true_result)
    assert names(verdict) == [name]
    assert not verdict.measured


def test_all_mismatches_are_named_at_once(true_result: Any) -> None:
    true_result.alter_weight()
    true_result.alter_image("test_labels")
    true_result.alter("suite_fingerprint", value="0" * 12)
    assert names(check(true_result)) == ["checkpoint sha256", "suite fingerprint", "dataset fingerprint (test)"]


def test_features_from_the_cache_verify_the_protocol_only(true_result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the features are in the cache")

    assert check(true_result, from_cache=True).holds  # fills it
    monkeypatch.setattr(PositionalViT, "forward", refuse)
    verdict = check(true_result, from_cache=True)
    assert verdict.holds
    assert verdict.scope == "protocol only"
    true_result.alter("scores", "top1", value=99.0)
    assert names(check(true_result, from_cache=True)) == ["top1"]


def test_baselines_can_be_left_out(true_result: Any) -> None:
    true_result.alter("baselines", "pca", "top1", value=10.0)
    assert names(check(true_result)) == ["pca top1"]
    assert check(true_result, baselines=False).holds


def test_a_tolerance_that_is_asked_for_replaces_the_rule(true_result: Any) -> None:
    top1 = read_json(true_result.file)["scores"]["top1"]
    true_result.alter("scores", "top1", value=top1 - 2.5)
    assert names(check(true_result)) == ["top1"]
    assert check(true_result, tolerance=2.6).holds


def test_a_moved_checkpoint_is_found_beside_its_result_or_where_it_is_told(true_result: Any, tmp_path: Path) -> None:
    moved = true_result.checkpoint.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(DinobenchError, match=r"not here .*--checkpoint FILE") as error:
        check(true_result)
    assert error.value.exit_code == 3
    assert check(true_result, checkpoint=moved, baselines=False).holds
    folder = true_result.file.parents[2] / "checkpoints"
    folder.mkdir()
    moved.rename(folder / true_result.checkpoint.name)
    assert check(true_result, baselines=False).holds


def test_moved_images_are_given_anew(true_result: Any, tmp_path: Path) -> None:
    moved = true_result.images.rename(tmp_path / "moved.npz")
    with pytest.raises(DinobenchError, match=r"digits\.npz"):
        check(true_result)
    assert check(true_result, data=f"npz:{moved}", baselines=False).holds


def test_a_suite_that_is_not_shipped_is_asked_for(true_result: Any, tmp_path: Path) -> None:
    true_result.alter("suite", value="my_knn@1")
    with pytest.raises(DinobenchError, match=r"my_knn@1 is not one of those shipped here: .*--suite FILE\.yaml"):
        check(true_result)
    definition = Path(module.__file__).parent.parent / "suites" / "definitions" / "digits_knn.yaml"
    own = tmp_path / "own.yaml"
    own.write_text(definition.read_text().replace("name: digits_knn", "name: my_knn", 1))
    assert check(true_result, suite=str(own), baselines=False).holds


def test_a_result_of_a_partial_backbone_is_derived_from_the_same_part(true_result: Any, tmp_path: Path) -> None:
    payload = checkpoint_file.read(true_result.checkpoint)
    del payload["teacher"]["backbone.norm.weight"]
    checkpoint_file.save(true_result.checkpoint, payload)
    settings = Evaluation(tmp_path / "partial", f"npz:{true_result.images}", "cpu", loading=Loading(allow_partial=True))
    evaluate(true_result.checkpoint, [load_suite("digits_knn")], settings, lambda text: None)
    (true_result.file,) = settings.output.glob("evals/*/*.json")
    assert read_json(true_result.file)["provenance"]["missing"] == ["norm.weight"]
    assert check(true_result, baselines=False).holds


@pytest.mark.parametrize(
    ("stated", "n", "allowed"),
    [
        (90.0, 500, 0.2),  # one image
        (90.0, 50_000, 0.1),  # 50 images
        (90.0, 20, 0.9),  # 1 % of the score, where one image is 5 points
        (0.05, 500, 0.0005),  # an entropy is no percentage
        (0.0, 500, 1e-6),
    ],
)
def test_the_tolerance_is_the_stated_one(stated: float, n: int, allowed: float) -> None:
    assert module.allowed_difference(stated, stated, n) == pytest.approx(allowed)


def test_a_score_that_is_no_number_only_equals_itself() -> None:
    assert Comparison("spread", None, None, 1.0).holds
    assert not Comparison("spread", None, 0.0, 1.0).holds
    assert not Comparison("spread", 0.0, None, 1.0).holds
