from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dinobench.cli import app


@pytest.fixture
def runs(measurer: Any) -> Path:
    for method, accuracy in {"dino": 80.0, "dino_vmf": 90.0}.items():
        measurer.run(method, 0, accuracy)
    return measurer.output


def test_a_page_is_written_whole(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "sent" / "page.html"
    assert app.run(["report", "suite=digits_knn", "--output", str(runs), "--to", str(to)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith(f"{to}: candidates: 2, suites: 1, size: ")
    assert captured.err == ""
    html = to.read_text()
    assert html.startswith("<!DOCTYPE html>")
    assert html.endswith("</html>\n")
    assert [file.name for file in to.parent.iterdir()] == ["page.html"]


def test_a_page_that_cannot_replace_the_old_one_leaves_it(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    to = tmp_path / "page.html"
    to.write_text("the old one")
    monkeypatch.setattr(os, "fsync", full)
    assert app.run(["report", "--output", str(runs), "--to", str(to)]) == 3
    assert "no space left" in capsys.readouterr().err
    assert to.read_text() == "the old one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "runs"]


def test_json_says_what_is_on_the_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "page.html"
    assert app.run(["report", "method=dino", "--output", str(runs), "--to", str(to), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["page"], document["bytes"]) == (str(to), to.stat().st_size)
    assert document["suites"] == ["digits_knn@1", "digits_prototypes@1"]
    assert any(note.startswith("not compared: a comparison needs two") for note in document["notes"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["metod=dino"], 2, "did you mean 'method'"),
        (["method=simclr", "--output", "RUNS"], 3, "methods found: dino, dino_vmf"),
        ([], 3, "no run and no record in runs: name run folders, or their folder with --output"),
        (["absent.pt"], 3, "no file or folder absent.pt: expected a run folder"),
        (["--results", "absent", "--output", "RUNS"], 3, "no folder absent: --results takes one like results"),
        (["--output", "RUNS", "--to", "FOLDER"], 2, "is a folder: name a file, like --to"),
        (["--align", "stepp"], 2, "--align"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_line_and_no_page(
    arguments: list[str], code: int, said: str, runs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    places = {"RUNS": str(runs), "FOLDER": str(tmp_path)}
    assert app.run(["report", *(places.get(part, part) for part in arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
