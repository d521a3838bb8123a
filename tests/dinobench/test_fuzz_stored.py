"""What lies in an output folder, altered or damaged: results, run folders, journals, records, per-image values.

Each damaged file is met by the commands that read it. Time of `nox -s faults`: 2 minutes on one core for 1,900 inputs.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from dinobench.cli import app
from dinobench.comparison import candidates
from dinobench.journal import Journal
from dinobench.runs import RunFolder
from dinobench.tables import published
from dinobench.tables.records import RecordStore, read_record
from fuzzing import changed, fuzz, inputs, refused, spoilt_bytes

Count = Callable[..., None]
COMMITTED = Path(__file__).parent.parent.parent / "results" / "digits"


@pytest.fixture
def runs(measurer: Any) -> tuple[RunFolder, RunFolder]:
    """Two finished runs with results."""
    first, second = (measurer.run("dino", seed, 90.0 + seed) for seed in (0, 1))
    for run in (first, second):
        run.started({"time": "2026-01-01T00:00:00Z", "command": "dinobench pretrain dino", "packages": {}, "code": {}})
        run.update(status="finished", step=40)
    return first, second


def as_text(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def spoilt_json(document: Any) -> SearchStrategy[bytes]:
    """Other values for the most part: most flipped bits only end the JSON."""
    deep = st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"1e999", b"NaN", b"\xff\xfe", b"null", b"[]"]
    )
    other = changed(document).map(as_text)
    return st.one_of(other, other, other, spoilt_bytes(as_text(document)), deep)


class Commands:
    """Runs command lines in this process; each must end as designed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *command: str | Path) -> None:
        self.capsys.readouterr()
        codes: list[int] = []
        refused(lambda: codes.append(app.run([str(word) for word in command])))
        told = self.capsys.readouterr().err
        assert codes[0] in (0, 2, 3, 4), told
        assert "Traceback" not in told


@pytest.fixture
def dinobench(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def read_all(path: Path) -> None:
    """What `compare`, `report` and the figures read of a run, a result or a record."""
    for candidate in candidates.read(path, path.parent):
        assert candidate.curves is not None
        assert candidate.images_per_step is not False
        for score in (score for at in candidate.checkpoints for score in at.scores.values()):
            assert isinstance(score.value, float)
            score.per_image()
            score.frame("prototypes")


def damage(file: Path, strategy: SearchStrategy[bytes], use: Callable[[], object], examples: int) -> int:
    """Use a file in many damaged forms; it is whole again afterwards."""
    whole = file.read_bytes()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        use()
        assert file.read_bytes() == content, "the file was changed"

    try:
        return fuzz(strategy, check, examples)
    finally:
        file.write_bytes(whole)


@pytest.mark.promise("result JSON altered or damaged", "taken as it is or refused by name, exit code 3")
@inputs(400, few=8)
def test_results(runs: tuple[RunFolder, RunFolder], dinobench: Commands, count: Count, examples: int) -> None:
    run, other = runs
    file = max(run.path.glob("evals/digits_knn@1/*.json"))
    document = json.loads(file.read_bytes())

    numbers = itertools.count()

    def use() -> None:
        dinobench("runs", "ls", "--output", run.path.parent, "--json")
        dinobench("verify", file, "--json")
        refused(lambda: read_all(run.path), file)
        if next(numbers) % 20 == 0:  # its bootstrap takes a while
            dinobench("compare", run.path, other.path, "--json")

    tried = damage(file, spoilt_json(document), use, examples)
    count("results", inputs_tried=tried, inputs_handled=tried)


STATE_FILES = ("run.json", "environment.json", "recipe.yaml", "metrics.jsonl")


@pytest.mark.promise("file of a run folder altered or damaged", "the run is shown, or the file is named; exit code 3")
@pytest.mark.parametrize("name", STATE_FILES)
@inputs(120, few=4)
def test_run_folders(
    runs: tuple[RunFolder, RunFolder], dinobench: Commands, count: Count, name: str, examples: int
) -> None:
    run = runs[0]
    file = run.path / name
    whole = file.read_bytes()
    if name == "recipe.yaml":
        document = yaml.safe_load(whole)
        strategy = changed(document).map(
            lambda made: yaml.safe_dump(made).encode("utf-8", "surrogatepass")
        ) | spoilt_bytes(whole)
    elif name == "metrics.jsonl":
        lines = [json.loads(line) for line in whole.splitlines()]
        strategy = st.lists(changed(lines[0]).map(as_text) | spoilt_bytes(whole), max_size=3).map(b"\n".join)
    else:
        strategy = spoilt_json(json.loads(whole))

    def use() -> None:
        dinobench("runs", "ls", "--output", run.path.parent, "--json")
        dinobench("runs", "show", run.path, "--json")
        refused(lambda: read_all(run.path), file)

    tried = damage(file, strategy, use, examples)
    count("files of run folders", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("journal with lines that are cut, doubled or no JSON", "every whole line is read, no other")
@inputs(300)
def test_journals(tmp_path: Path, count: Count, examples: int) -> None:
    file = tmp_path / "metrics.jsonl"
    line = as_text({"step": 100, "time": 1763700000.1, "metrics": {"loss/total": 4.9, "health/entropy": None}})
    damaged = st.lists(st.just(line) | spoilt_bytes(line) | changed(json.loads(line)).map(as_text), max_size=6)

    def check(lines: list[bytes]) -> None:
        file.write_bytes(b"\n".join(lines))
        journal = Journal(file)
        found: list[Any] = []
        refused(lambda: found.extend(journal.read()), file)
        assert sum(kept == line for kept in lines) <= len(found) <= sum(b"\n" in kept for kept in lines) + len(lines)
        refused(lambda: journal.curve("loss/total"), file)
        refused(lambda: [point.to_line() for point in journal.read()])
        refused(lambda: journal.cut(50))

    tried = fuzz(damaged, check, examples)
    count("journals", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("committed record altered or damaged", "taken as it is or refused by name, exit code 2 or 3")
@inputs(250)
def test_records(tmp_path: Path, dinobench: Commands, count: Count, examples: int) -> None:
    folder = tmp_path / "digits" / "records"
    folder.mkdir(parents=True)
    for name in ("byol-s0.json", "byol-s1.json", "baselines.json"):
        shutil.copy(COMMITTED / "records" / name, folder)
    file = folder / "byol-s0.json"
    document = json.loads(file.read_bytes())
    numbers = itertools.count()
    small = {**document, "curve": dict(list(document["curve"].items())[:1])}

    def use() -> None:
        refused(lambda: read_record(file), file)
        refused(lambda: RecordStore(tmp_path).all(), file)
        refused(lambda: read_all(file), file)
        if next(numbers) % 20 == 0:
            dinobench("compare", file, folder / "byol-s1.json", "--json")

    tried = damage(file, spoilt_json(small), use, examples)
    count("records", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("tables of per-image values (parquet) damaged", "left out or refused by name, exit code 3")
@inputs(120)
def test_per_image_values(runs: tuple[RunFolder, RunFolder], dinobench: Commands, count: Count, examples: int) -> None:
    run, other = runs
    file = max(run.path.glob("samples/digits_knn@1/*.parquet"))
    numbers = itertools.count()

    def use() -> None:
        refused(lambda: read_all(run.path), file)
        if next(numbers) % 20 == 0:
            dinobench("compare", run.path, other.path, "--claim", "checkpoints", "--json")

    tried = damage(file, spoilt_bytes(file.read_bytes()), use, examples)
    count("per-image values", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("published.csv or a CSV of results damaged", "read, or refused by name, exit code 2 or 3")
@inputs(150)
def test_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dinobench: Commands, count: Count, examples: int) -> None:
    figures = tmp_path / "published.csv"
    lines = published.FILE.read_bytes().splitlines()[:5]
    monkeypatch.setattr(published, "FILE", figures)
    results = tmp_path / "results" / "digits"
    results.mkdir(parents=True)
    trials = b"\n".join((COMMITTED / "trials.csv").read_bytes().splitlines()[:4])
    snippets = st.sampled_from([b'"' * 3, b"\0", b"," * 50, b"\r", b"\xff", b'"' + b"a" * 200_000, b"\n\n"])
    numbers = itertools.count()

    def spoilt(content: bytes) -> SearchStrategy[bytes]:
        return spoilt_bytes(content) | st.builds(
            lambda place, part: content[:place] + part + content[place:], st.integers(0, len(content)), snippets
        )

    def check(made: tuple[bytes, bytes]) -> None:
        figures.write_bytes(made[0])
        published.figures.cache_clear()
        refused(lambda: published.matching(published.Key(paper="DINO (2104.14294)")), figures)
        (results / "trials.csv").write_bytes(made[1])
        if next(numbers) % 10 == 0:  # a page takes a while
            dinobench("report", "--results", tmp_path / "results", "--to", tmp_path / "a.html", "--output", tmp_path)

    tried = fuzz(st.tuples(spoilt(b"\n".join(lines)), spoilt(trials)), check, examples)
    published.figures.cache_clear()
    count("CSV files", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("--output and paths with spaces, unicode, `..`, links, 300 letters", "used, or exit code 2 or 3")
@inputs(200)
def test_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dinobench: Commands, count: Count, examples: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a b é").mkdir()
    (tmp_path / "link").symlink_to("a b é")
    (tmp_path / "nowhere").symlink_to("absent")
    names = [
        "file",
        "loop",
        "a b é",
        "link",
        "nowhere",
        "..",
        ".",
        "~",
        "~nobody9",
        "a" * 300,
        "\udc80",
        "名前",
        "a\nb",
    ]
    starts = st.sampled_from(["", "./", "/proc/self/", "*", "-", "%s"])
    paths = st.builds(
        lambda parts, start: start + "/".join(parts), st.lists(st.sampled_from(names), max_size=4), starts
    )

    def commands(path: str) -> list[list[str]]:
        return [
            ["runs", "ls", "--output", path], ["runs", "show", "--", path], ["compare", "--", path, "file"],
            ["verify", "--", path], ["eval", "--suite", "digits_knn", "--output", "a b é", "--", path],
            ["eval", "--suite", f"{path}.yaml", "--", "file"], ["pretrain", "--dry-run", "--", f"{path}.yaml"],
            ["pretrain", "--dry-run", "dino", "--data", f"folder:{path}"], ["show", "--", path],
            ["export", "--output", "out.safetensors", "--", path],
        ]  # fmt: skip

    def check(made: tuple[str, int]) -> None:
        path, which = made
        dinobench(*commands(path)[which])

    tried = fuzz(st.tuples(paths, st.integers(0, 9)), check, examples)
    count("paths", inputs_tried=tried, inputs_handled=tried)
    assert not (tmp_path / "out.safetensors").exists()
