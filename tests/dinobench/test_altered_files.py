"""Stored files with values that no reader expects: named in a sentence, found by generated input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dinobench.cli import app
from dinobench.comparison import candidates
from dinobench.comparison.candidates import Score
from dinobench.files import read_json
from dinobench.results import read_result
from dinobench.tables import published
from dinobench.tables.records import read_record
from pretrain.errors import DinobenchError

RECORD = Path(__file__).parents[2] / "results" / "digits" / "records" / "byol-s0.json"


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "[" * 100_000, '{"a":' * 100_000])
def test_json_holds_neither_nan_nor_endless_nests(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DinobenchError, match="is not a JSON document"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("headline",), "absent"),
        (("suite",), "digits_knn"),
        (("suite",), "../x@1"),
        (("suite",), "digits_knn@one"),
        (("provenance", "step"), "many"),
        (("provenance", "step"), [1]),
        (("provenance", "images_seen"), {}),
        (("provenance", "sha256"), 7),
        (("receipt", "dataset"), [1]),
        (("receipt", "dataset"), {"test": "f00"}),
        (("receipt", "data"), ["digits"]),
    ],
)
def test_results_are_what_their_readers_take_for_granted(true_result: Any, keys: tuple[str, ...], value: Any) -> None:
    document = read_json(true_result.file)
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    true_result.file.write_text(json.dumps(document))
    with pytest.raises(DinobenchError, match="is not a result: it was altered"):
        read_result(true_result.file)


@pytest.mark.parametrize(
    ("key", "value"),
    [("receipt", {}), ("receipt", []), ("provenance", {}), ("results", {"a": 1}), ("results", []), ("cell", [1, 2])],
)
def test_records_say_what_they_were_made_from(tmp_path: Path, key: str, value: Any) -> None:
    document = read_json(RECORD)
    if key != "cell":
        document.pop("cell", None)
    (tmp_path / "a.json").write_text(json.dumps({**document, key: value}))
    with pytest.raises(DinobenchError, match="altered or damaged"):
        read_record(tmp_path / "a.json")


def test_steps_of_records_are_numbers(tmp_path: Path) -> None:
    document = read_json(RECORD)
    document["provenance"]["step"] = {"a": 1}
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(DinobenchError, match="step or images_seen is no number"):
        candidates.read(tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize(
    "content", [b"paper,surprise\na,b\n", b"\xff", b'paper\n"a', b"a" * 200_000, b"paper,table\na,b,c,d,e\n"]
)
def test_published_figures_that_are_damaged_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / "published.csv").write_bytes(content + b"\nx" * 3)
    monkeypatch.setattr(published, "FILE", tmp_path / "published.csv")
    published.figures.cache_clear()
    with pytest.raises(DinobenchError, match=r"published\.csv was altered or damaged"):
        published.figures()
    monkeypatch.undo()
    published.figures.cache_clear()


@pytest.mark.parametrize("damage", [{"index": "jndex"}, {"correct": "apples"}], ids=["a name", "values"])
def test_per_image_values_that_are_damaged_are_named(tmp_path: Path, damage: dict[str, str]) -> None:
    frame = pd.DataFrame({"index": [0, 1], "correct": [True, True]}).rename(columns=damage)
    if "apples" in frame:
        frame["apples"] = ["a", "b"]
    frame.to_parquet(tmp_path / "a.parquet")
    score = Score("digits_knn@1", "f00", "top1", {"top1": 100.0}, None, 2, {}, tmp_path / "a.parquet")
    with pytest.raises(DinobenchError, match=r"a\.parquet cannot be read: it was altered or damaged"):
        score.per_image()


@pytest.mark.parametrize("content", ["[]", "{}", '{"key": 3}', "7"])
def test_the_cell_of_a_run_is_a_text(run: Any, content: str) -> None:
    run.cell_file.write_text(content)
    if content == "{}":
        assert run.cell() is None
        return
    with pytest.raises(DinobenchError, match="it names no cell"):
        run.cell()


def test_names_that_the_terminal_cannot_show_are_shown_in_other_letters(tmp_path: Path) -> None:
    code = "import os, sys; from dinobench.cli.app import run; sys.exit(run(['runs', 'ls', '--output', sys.argv[1]]))"
    command = [sys.executable, "-c", code, b"run \xe9\xff"]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii:strict"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"no runs in run \\udce9\\udcff" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "{}"],
        ["verify", "{}"],
        ["show", "{}"],
        ["runs", "show", "{}"],
        ["export", "{}"],
        ["eval", "--suite", "digits_knn", "{}"],
        ["figure", "prototypes", "{}"],
        ["pretrain", "--dry-run", "{}.yaml"],
    ],
    ids=" ".join,
)
def test_a_name_that_is_too_long_is_no_bug(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([word.format("a" * 300) for word in command]) in (2, 3)
    assert "too long" in capsys.readouterr().err


def test_one_path_of_half_a_character_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["runs", "show", "\udc80"]) == 3
    assert "\\udc80" in capsys.readouterr().err
