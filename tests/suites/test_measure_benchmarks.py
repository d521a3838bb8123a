"""Suites whose protocol reads images, through `measure`: scores, receipt, cache and baselines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pretrain.data.datasets import dataset_names
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.checkpoint import LoadedModel
from suites.cache import FeatureCache
from suites.measure import measure
from suites.suite import Suite, load_suite, suite_names

BENCHMARKS = [name for name in suite_names() if load_suite(name).reads_images]
DATASETS = {info.name.partition(":")[0] for info in dataset_names()}
OF_OWN_FILES = [name for name in BENCHMARKS if (load_suite(name).dataset.name or "").partition(":")[0] not in DATASETS]
"""The others read the images of an ordinary data set."""
COLOURS = {"r0": (250, 0, 0), "r1": (200, 10, 0), "g0": (0, 240, 0), "g1": (0, 200, 20)}


@pytest.fixture
def benchmark_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "colours"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 16), colour).save(folder / f"{name}.png")
    gnd = [{"easy": [1], "hard": [], "junk": [0]}, {"easy": [3], "hard": [], "junk": [2]}]
    (folder / "gnd_colours.json").write_text(json.dumps({"imlist": list(COLOURS), "qimlist": ["r0", "g0"], "gnd": gnd}))
    return folder


def suite(**changes: object) -> Suite:
    definition = {"name": "colours", "version": 1, "protocol": "retrieval", "headline": "map", "baseline_seeds": 2}
    return Suite.model_validate({**definition, "dataset": {"name": "colours"}, **changes})


def test_a_second_measurement_reads_the_cache_and_finds_the_same(
    benchmark_folder: Path, model: LoadedModel, tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    first, second = (measure(suite(), model, data=f"folder:{benchmark_folder}", cache=cache) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert (first.scores, first.interval, first.baselines) == (second.scores, second.interval, second.baselines)
    assert first.dataset == "colours" and first.n == 2
    assert first.scores["map"] == first.scores["map_medium"]


def test_receipt_names_every_role_and_is_plain_json(benchmark_folder: Path, model: LoadedModel) -> None:
    receipt = measure(suite(), model, data=f"folder:{benchmark_folder}", baselines=False).receipt
    assert json.loads(json.dumps(receipt)) == receipt
    assert {role: part["n"] for role, part in receipt["dataset"].items()} == {
        "database": 4,
        "queries": 2,
        "ground_truth": 2,
    }
    assert all(len(part["fingerprint"]) == 64 for part in receipt["dataset"].values())
    assert receipt["parameters"]["image_size"] == 224
    assert [part["from_cache"] for part in receipt["features"]] == [False, False]


def test_baselines_are_pixels_and_the_mean_of_random_networks(benchmark_folder: Path, model: LoadedModel) -> None:
    found = measure(suite(), model, data=f"folder:{benchmark_folder}").baselines
    assert list(found) == ["raw_pixels", "random_init"]
    assert found["raw_pixels"]["map"] == pytest.approx(100)
    assert {"map", "map_seed_sd"} <= set(found["random_init"])


def test_baselines_are_measured_once_per_benchmark(
    benchmark_folder: Path, model: LoadedModel, make_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path / "cache")
    first = measure(suite(), model, data=f"folder:{benchmark_folder}", cache=cache)
    entries = len(list((tmp_path / "cache/features").rglob("*.safetensors")))
    other = measure(suite(), make_model(5), data=f"folder:{benchmark_folder}", cache=cache)
    assert other.baselines == first.baselines
    # Two more: database and queries of the other checkpoint, nothing of the random networks.
    assert len(list((tmp_path / "cache/features").rglob("*.safetensors"))) == entries + 2


def test_a_headline_that_is_no_score_names_the_scores(benchmark_folder: Path, model: LoadedModel) -> None:
    with pytest.raises(UsageError, match="'top1' is no score of 'retrieval': map, map_easy"):
        measure(suite(headline="top1"), model, data=f"folder:{benchmark_folder}", baselines=False)


@pytest.mark.parametrize("name", OF_OWN_FILES)
def test_absent_images_are_told_with_the_way_to_give_them(
    name: str, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOBENCH_DATA", str(tmp_path))
    with pytest.raises(DinobenchError, match=r"not found under DINOBENCH_DATA=.*add --data folder:/path"):
        measure(load_suite(name), model)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_definitions_state_every_number_of_their_protocol(name: str) -> None:
    suite = load_suite(name)
    assert set(suite.parameters) == set(type(suite.resolved_parameters()).model_fields)
