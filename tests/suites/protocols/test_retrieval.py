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
from torch import nn

from pretrain.errors import DinobenchError
from pretrain.models.checkpoint import LoadedModel
from suites.extractor import Extractor
from suites.protocols import retrieval
from suites.protocols.protocol import Context
from suites.suite import SuiteDataset, load_suite

DATASET = SuiteDataset(name="mine")
PARAMETERS = retrieval.Parameters(image_size=32)
root = Path(os.environ.get("DINOBENCH_DATA", ""))
needs_packs = pytest.mark.skipif(
    not os.environ.get("DINOBENCH_DATA") or not (root / "coil20/coil20.tar").is_file(),
    reason="DINOBENCH_DATA has no pack coil20",
)


class Mean(nn.Module):
    """A network whose feature is the mean colour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


@pytest.fixture
def coloured(model: LoadedModel) -> Extractor:
    return Extractor(replace(model, backbone=Mean()))


@pytest.fixture
def benchmark_folder(tmp_path: Path) -> Path:
    """Two red, two green and two blue pictures; the queries are a red and a green one."""
    folder = tmp_path / "mine"
    (folder / "jpg").mkdir(parents=True)
    colours = {"r0": (250, 0, 0), "r1": (200, 10, 0), "g0": (0, 240, 0), "g1": (0, 200, 20), "b0": (0, 0, 255)}
    colours |= {"b1": (10, 0, 250), "qr": (225, 5, 0), "qg": (0, 220, 10)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 20), colour).save(folder / "jpg" / f"{name}.png")
    gnd = [{"easy": [0], "hard": [1], "junk": []}, {"easy": [2], "hard": [], "junk": [3]}]
    truth = {"imlist": ["r0", "r1", "g0", "g1", "b0", "b1"], "qimlist": ["qr", "qg"], "gnd": gnd}
    (folder / "gnd_mine.json").write_text(json.dumps(truth))
    return folder


def opened(folder: Path) -> retrieval.RetrievalData:
    return retrieval.open_data(DATASET, f"folder:{folder}", PARAMETERS)


def test_pictures_of_one_colour_are_found(benchmark_folder: Path, coloured: Extractor) -> None:
    found = retrieval.run(opened(benchmark_folder), coloured, PARAMETERS, Context(0))
    assert found.scores["map"] == found.scores["map_medium"] == pytest.approx(100)
    assert found.scores["map_easy"] == found.scores["map_hard"] == pytest.approx(100)
    assert found.scores["mp1_medium"] == found.scores["mp10_medium"] == pytest.approx(100)
    assert found.n == 2
    assert found.interval == (pytest.approx(100), pytest.approx(100))
    assert found.samples["query"].tolist() == ["qr", "qg"]
    assert np.isnan(found.samples["ap_hard"][1])
    assert "2 of 2 queries" in found.notes[0]


def test_a_wrong_answer_before_the_right_ones_costs_what_the_trapezoids_say(benchmark_folder: Path) -> None:
    data = opened(benchmark_folder)
    database = torch.eye(6)
    # Query 0: images 4, 0, 1 first; query 1: images 3 (junk), 2 first.
    queries = torch.tensor([[0.8, 0.7, 0, 0, 0.9, 0], [0, 0, 0.8, 0.9, 0, 0]])
    found = retrieval.score_descriptors(data.truth, database, queries, PARAMETERS, Context(0))
    first = ((0 / 1 + 1 / 2) + (1 / 2 + 2 / 3)) / 4
    assert found.samples["ap_medium"].tolist() == pytest.approx([100 * first, 100])
    assert found.scores["map"] == pytest.approx(50 * (first + 1))
    assert found.scores["mp1_medium"] == pytest.approx(50)
    assert found.interval[0] < found.scores["map"] < found.interval[1]


def test_equal_similarities_are_in_the_order_of_the_database() -> None:
    order = retrieval.rank(torch.ones(5, 3), torch.ones(2, 3))
    assert order.T.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_rank_ignores_lengths() -> None:
    base, queries = torch.randn(20, 8), torch.randn(3, 8)
    scaled = base * torch.linspace(0.1, 5, 20)[:, None]
    np.testing.assert_array_equal(retrieval.rank(base, queries), retrieval.rank(scaled, 3 * queries))


def test_missing_images_truth_and_doubles_are_told(benchmark_folder: Path) -> None:
    (benchmark_folder / "jpg" / "g1.png").rename(benchmark_folder / "jpg" / "other.png")
    with pytest.raises(DinobenchError, match=r"lacks 1 of the 6 images and 2 queries of mine \(first: g1\)"):
        opened(benchmark_folder)
    (benchmark_folder / "jpg" / "other.png").rename(benchmark_folder / "jpg" / "g1.png")
    (benchmark_folder / "g1.png").write_bytes(b"")
    with pytest.raises(DinobenchError, match="holds two images named g1"):
        opened(benchmark_folder)
    (benchmark_folder / "gnd_mine.json").unlink()
    with pytest.raises(DinobenchError, match=r"no ground truth: put gnd_mine\.json or gnd_mine\.pkl in"):
        opened(benchmark_folder)


def test_pixels_are_descriptors_for_small_images_of_one_size_only(benchmark_folder: Path) -> None:
    scores = retrieval.pixel_scores(opened(benchmark_folder), PARAMETERS, Context(0))
    assert scores is not None and scores["map"] == pytest.approx(100)
    Image.new("RGB", (20, 40), "red").save(benchmark_folder / "jpg" / "qr.png")
    assert retrieval.pixel_scores(opened(benchmark_folder), PARAMETERS, Context(0)) is None


def test_fingerprint_follows_images_and_answers(benchmark_folder: Path) -> None:
    first = opened(benchmark_folder)
    assert opened(benchmark_folder).fingerprint == first.fingerprint
    truth = json.loads((benchmark_folder / "gnd_mine.json").read_text())
    truth["gnd"][0]["hard"] = []
    (benchmark_folder / "gnd_mine.json").write_text(json.dumps(truth))
    second = opened(benchmark_folder)
    assert second.fingerprint != first.fingerprint
    Image.new("RGB", (40, 20), "red").save(benchmark_folder / "jpg" / "b0.png")
    assert opened(benchmark_folder).fingerprint != second.fingerprint
    assert set(first.receipt()) == {"database", "queries", "ground_truth"}


@needs_packs
def test_raw_pixels_on_coil20_equal_the_floors_measured_elsewhere() -> None:
    """The README of the packs: 81.7, 60.9, 53.3 by non-interpolated AP; trapezoids give a little less."""
    suite = load_suite("coil20_retrieval")
    data = retrieval.open_data(suite.dataset, None, suite.resolved_parameters())
    scores = retrieval.pixel_scores(data, suite.resolved_parameters(), Context(0))
    assert scores is not None
    found = [scores[f"map_{name}"] for name in ("easy", "medium", "hard")]
    assert found == pytest.approx([81.46, 60.76, 53.14], abs=0.01)


@needs_packs
def test_coil20_runs_on_its_images(make_model: Callable[..., LoadedModel]) -> None:
    suite = load_suite("coil20_retrieval")
    parameters = suite.resolved_parameters()
    data = retrieval.open_data(suite.dataset, None, parameters)
    assert (len(data.database), len(data.queries)) == (1440, 80)
    found = retrieval.run(data, Extractor(make_model()), parameters, Context(0))
    assert found.n == 80 and found.interval[0] < found.scores["map"] < found.interval[1]
    # 71 of 1439 images are views of the object: a random order gives about 5 %.
    assert 15 < found.scores["map"] < 100
