from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench.cli import app

RECORDS = Path(__file__).parents[3] / "results" / "digits" / "records"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, measurer_in: Callable[[Path], Any]) -> Path:
    """Read only: made once for all tests."""
    measurer = measurer_in(tmp_path_factory.mktemp("compare") / "runs")
    for method, accuracy in {"dino": 80.0, "dino_vmf": 90.0}.items():
        for seed in range(5):
            measurer.run(method, seed, accuracy + seed * (1 + (method == "dino")) / 2)
    return measurer.output


def test_a_query_compares_methods(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["compare", "method=dino,dino_vmf", "suite=digits_knn", "--output", str(runs)]) == 0
    captured = capsys.readouterr()
    assert "paired t over seeds" in captured.out
    assert "digits_knn@1: over 5 seeds dino scores 9.0 points lower than dino_vmf (95 % interval" in captured.out
    assert "digits_knn@1: dino_vmf is better than every other method here." in captured.out
    assert "digits_prototypes" not in captured.out
    assert captured.err == ""


def test_json_is_one_document_with_figures(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(runs), "--json", "--figures", str(tmp_path / "figures")]
    assert app.run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["claim"], document["best"]) == ("methods", {"digits_knn@1": "dino_vmf"})
    (knn, _) = document["pairs"]
    assert knn["shown"] is True
    assert knn["effect"]["n"] == 5
    assert knn["effect"]["p"] <= knn["adjusted_p"] < 0.05
    names = {Path(file).name for file in document["figures"]}
    assert {"compare_curves.png", "compare_curves.svg", "compare_classes_digits_knn_1.svg"} <= names
    assert all(Path(file).is_file() for file in document["figures"])
    assert document["drawings"][0]["files"] == document["figures"][:2]


def test_two_run_folders_are_compared_image_by_image(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(next(runs.glob(f"{method}-*-s0-*"))) for method in ("dino", "dino_vmf")]
    assert app.run(["compare", *pair, "--suite", "digits_knn,digits_prototypes", "--align", "images"]) == 0
    text = capsys.readouterr().out
    assert "McNemar mid-p" in text
    assert "not between their methods" in text
    assert "digits_prototypes@1: dino s0 and dino_vmf s0 score the same; no per-image values of this score" in text


def test_committed_records_are_input(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(RECORDS / f"{name}-s0.json") for name in ("dino", "byol")]
    assert app.run(["compare", *files]) == 0
    text = capsys.readouterr().out
    assert "nothing is tested" in text
    assert "digits_prototypes@1: not measured on byol-s0.json" in text


def test_of_many_pairs_only_shown_differences_get_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["compare", str(RECORDS), "suite=digits_knn", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    shown = [pair["sentence"] for pair in pairs if pair["shown"]]
    tested = [pair for pair in pairs if pair["effect"]["p"] is not None]
    assert len(pairs) > 100
    assert app.run(["compare", str(RECORDS), "suite=digits_knn"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("digits_knn@1: ") and "better than" not in line] == shown
    assert (
        f"{len(tested)} of {len(pairs)} pairs were tested; {len(shown)} of them differ by more than chance"
        in "".join(lines)
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["metod=dino"], 2, "did you mean 'method'"),
        (["RUNS", "--align", "stepp"], 2, "--align"),
        (["method=dino"], 3, "no run and no record in runs"),
        (["absent.pt"], 3, "no file or folder absent.pt"),
        (["RUNS", "method=simclr"], 3, "methods found: dino, dino_vmf"),
        (["RUNS", "method=dino", "seed=0"], 3, "a comparison needs two"),
        ([], 2, "A B..."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_line(
    arguments: list[str], code: int, said: str, runs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["compare", *(str(runs) if part == "RUNS" else part for part in arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_suite_versions_are_not_mixed(runs: Path, measurer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs, measurer.output)
    other = measurer.run("dino_sk", 0, 90.0, steps=())
    measurer.measure(other, 0, 90.0, 40, suite="digits_knn@2")
    assert app.run(["compare", str(measurer.output), "seed=0"]) == 2
    assert "digits_knn@1 and digits_knn@2 are different measurements and are not mixed" in capsys.readouterr().err


def test_data_fingerprints_are_not_mixed(runs: Path, measurer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs, measurer.output)
    other = measurer.run("dino_sk", 0, 90.0, steps=())
    measurer.measure(other, 0, 90.0, 40, receipt={"dataset": {"test": {"fingerprint": "e" * 40}}})
    assert app.run(["compare", str(measurer.output), "seed=0"]) == 3
    assert "were measured on different test images" in capsys.readouterr().err
