from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.errors import UsageError
from suites import suite as suites
from suites.suite import Suite, load_suite, suite_names

MINIMAL = {"name": "mine", "version": 1, "protocol": "knn", "headline": "top1"}


@pytest.mark.parametrize("name", suite_names())
def test_every_shipped_suite_loads_under_its_own_name(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert load_suite(suite.id) == suite
    assert suite.reads_images or f"_{suite.protocol}" in name
    assert suite.paper and suite.description


def test_catalogue_holds_the_promised_suites() -> None:
    probes = ("knn", "linear", "linear_sweep", "logistic", "fewshot", "representation")
    protocols = (*probes, "clusters", "prototypes")
    small = {f"{data}_{protocol}" for data in ("digits", "fashion_mnist", "cifar10") for protocol in protocols}
    benchmarks = {"roxford", "rparis", "coil20_retrieval", "copydays", "davis2016", "davis2017"}
    assert set(suite_names()) >= small | benchmarks | {f"imagenet_{protocol}" for protocol in probes}
    on_images = {"retrieval", "copy_detection", "label_propagation"}
    assert set(suites.protocol_names()) >= set(protocols) | on_images


@pytest.mark.parametrize("name", [name for name in suite_names() if name.endswith("knn")])
def test_headline_of_every_knn_suite_is_k_20(name: str) -> None:
    suite = load_suite(name)
    assert (suite.headline, suite.resolved_parameters().headline_k) == ("top1", 20)


def test_unknown_suite_names_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits_knn'"):
        load_suite("digit_knn")


def test_a_version_that_is_not_shipped_is_refused() -> None:
    with pytest.raises(UsageError, match="has version 1 in this release, asked for was '7'"):
        load_suite("digits_knn@7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: mine\nversoin: 1", "did you mean 'version'"),
        ("name: mine\nversion: 1\nprotocol: kn\nheadline: top1", "unknown protocol 'kn': did you mean 'knn'"),
        ("name: mine\nversion: one\nprotocol: knn\nheadline: top1", "version: .*integer"),
        ("name: mine\nversion: 1\nprotocol: knn\nheadline: top1\nparameters: {kk: [1]}", r"parameters\.kk"),
        ("name: mine\nversion: 1\nprotocol: prototypes\nfeature: cls+avg\nheadline: used", "expected feature cls"),
        ("name: mine\nversion: 1\nprotocol: retrieval\nfeature: cls+avg\nheadline: map", "neither transform nor feat"),
        ("name: mine\nversion: 1\nprotocol: retrieval\ntransform: {crop: 96}\nheadline: map", "neither transform nor"),
        ("- a list", "must hold a suite"),
        ("name: [", "not valid YAML"),
    ],
)
def test_bad_definitions_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_suite(path)


def test_missing_definition_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"cannot read the suite definition nowhere/mine\.yaml"):
        load_suite("nowhere/mine.yaml")


def test_a_definition_outside_the_package_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{name: mine, version: 3, protocol: knn, headline: top1, feature: {last: 2, avgpool: true}}")
    suite = load_suite(path)
    assert suite.id == "mine@3"
    assert suite.feature == suites.LastBlocks(last=2, avgpool=True)


def test_fingerprint_ignores_words_and_follows_numbers() -> None:
    plain = Suite.model_validate(MINIMAL)
    words = {"name": "other", "version": 2, "paper": "a", "description": "b", "baselines": ["pca"]}
    assert Suite.model_validate({**MINIMAL, **words}).fingerprint() == plain.fingerprint()
    numbers = [
        {"parameters": {"temperature": 0.1}},
        {"transform": {"resize": 224}},
        {"dataset": {"test": "val"}},
        {"feature": "cls+avg"},
        {"headline": "top5"},
    ]
    found = {Suite.model_validate({**MINIMAL, **change}).fingerprint() for change in numbers}
    assert len(found | {plain.fingerprint()}) == len(numbers) + 1


def test_fingerprint_holds_the_defaults_of_the_protocol() -> None:
    explicit = {**MINIMAL, "parameters": {"k": [10, 20, 100, 200], "headline_k": 20, "temperature": 0.07}}
    assert Suite.model_validate(explicit).fingerprint() == Suite.model_validate(MINIMAL).fingerprint()


def test_names_are_safe_in_file_and_metric_names() -> None:
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in suite_names())
    with pytest.raises(ValueError, match="pattern"):
        Suite.model_validate({**MINIMAL, "name": "my/suite"})
