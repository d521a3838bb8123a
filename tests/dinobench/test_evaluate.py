from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import suites.measure
from dinobench import evaluate as module
from dinobench.evaluate import Evaluation, evaluate
from dinobench.files import sha256
from dinobench.runs import RunFolder
from pretrain.errors import DinobenchError
from pretrain.models import checkpoint
from pretrain.models.checkpoint import LoadedModel
from suites.measure import Measurement
from suites.suite import load_suite


class Measured:
    """Stands for loading and measuring; counts both."""

    def __init__(self) -> None:
        self.loads, self.suites, self.fail = 0, [], ""

    def load(self, path: Path) -> LoadedModel:
        self.loads += 1
        facts = {"sha256": sha256(path), "method": "dino", "arch": "vits16", "step": 7, "epoch": 1, "seed": 0}
        return LoadedModel(torch.nn.Identity(), None, None, "none", None, facts)

    def measure(self, suite: Any, model: LoadedModel, **options: Any) -> Measurement:
        if suite.name == self.fail:
            raise DinobenchError("data set absent")
        self.suites.append(suite.name)
        return Measurement(
            suite=suite.id,
            protocol=suite.protocol,
            dataset="digits",
            headline=suite.headline,
            scores={suite.headline: torch.tensor(91.5).item(), "spread": float("nan")},
            n=500,
            interval=(90.0, 93.0),
            baselines={},
            samples=pd.DataFrame({"correct": [True]}),
            tables={},
            receipt={"seed": options["seed"]},
            from_cache=False,
            seconds=0.1,
        )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    measured = Measured()
    monkeypatch.setattr(checkpoint, "load", measured.load)
    monkeypatch.setattr(suites.measure, "measure", measured.measure)
    return measured


def silent(text: str) -> None:
    """Say nothing."""


def test_a_lone_checkpoint_is_measured_once_and_then_read(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    settings = Evaluation(output=tmp_path / "runs")
    both = [load_suite("digits_knn"), load_suite("digits_linear")]
    first, _ = evaluate(path, both, settings, silent)
    second, _ = evaluate(path, both, settings, silent)
    assert measured.loads == 1
    assert measured.suites == ["digits_knn", "digits_linear"]
    assert [result.from_cache for result in first] == [False, False]
    assert [result.from_cache for result in second] == [True, True]
    assert first[0].scores == second[0].scores == {"top1": 91.5, "spread": None}
    assert not module.missing([path], both, settings)


def test_a_checkpoint_with_other_weights_is_measured_anew(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    settings = Evaluation(output=tmp_path / "runs")
    for weights in (b"one", b"two"):
        path.write_bytes(weights)
        evaluate(path, [load_suite("digits_knn")], settings, silent)
    assert measured.loads == 2


def test_results_of_a_checkpoint_in_a_run_lie_in_its_run_folder(
    measured: Measured, run: RunFolder, tmp_path: Path
) -> None:
    run.last_checkpoint.write_bytes(b"weights")
    evaluate(run.last_checkpoint, [load_suite("digits_knn")], Evaluation(output=tmp_path / "elsewhere"), silent)
    assert len(list(run.path.glob("evals/digits_knn@1/*.json"))) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_suite_that_fails_does_not_stop_the_others(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    measured.fail = "digits_knn"
    both = [load_suite("digits_knn"), load_suite("digits_linear")]
    results, failures = evaluate(path, both, Evaluation(output=tmp_path / "runs"), silent)
    assert [result.suite_name for result in results] == ["digits_linear"]
    assert [(failure.suite, failure.reason) for failure in failures] == [("digits_knn@1", "data set absent")]


@pytest.mark.parametrize(
    ("name", "short"),
    [("digits", "digits"), ("imagenet:/data/in1k", "imagenet"), ("folder:/data/birds.tar", "birds"), (None, "data")],
)
def test_data_sets_have_names_that_fit_a_metric(name: str | None, short: str) -> None:
    assert module.dataset_name(name) == short
