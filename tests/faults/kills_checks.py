"""What must hold of the files of a run after a kill, and what must be equal to a run that nothing interrupted."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from dinobench.files import read_json
from dinobench.results import ResultStore
from dinobench.runs import RunFolder, describe_status
from pretrain.models import checkpoint_file
from suites.rows import checksum

CLOCK = ("speed/",)
"""Metrics that a clock measured."""
TIMES = {"seconds", "wall_seconds", "other_seconds", "images_per_second", "created", "time", "from_cache", "code"}
PLACES = {"path", "checkpoint", "sha256"}
"""Keys of results and records that say when, how fast, from which commit, from which file. The bytes of two files with
equal weights differ: pickle writes a string once or twice, as it finds one object or two."""
TEMPORARY = re.compile(r"\.tmp$|\.new(-journal)?$|^\.writing-|^\.write-test|\.spare$|\.uploading\.")


def check_whole(root: Path) -> None:
    """Every file under its final name can be read to its end."""
    for path in files(root):
        if TEMPORARY.search(path.name):
            continue
        read = READERS.get(path.suffix)
        if read is not None:
            try:
                read(path)
            except Exception as error:
                raise AssertionError(f"{path} is not whole: {error}") from error


def files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())


def leftovers(root: Path) -> list[str]:
    """Temporary files."""
    return [str(path.relative_to(root)) for path in files(root) if TEMPORARY.search(path.name)]


def check_status(run: RunFolder, code: int) -> None:
    """What a run says of itself is true: nobody works on it, and one that was asked to stop says so."""
    status = describe_status(run)
    assert not run.is_held(), f"{run.name} is still locked"
    assert status in ("killed", "interrupted", "finished"), (status, run.state())
    if code > 128:
        assert status in ("interrupted", "finished"), (code, status, run.state())


def check_same(run: RunFolder, reference: RunFolder) -> None:
    """Weights, journal and results equal those of the run that nothing interrupted."""
    assert [path.name for path in run.kept_checkpoints()] == [path.name for path in reference.kept_checkpoints()]
    for ours, theirs in zip(
        [*run.kept_checkpoints(), run.last_checkpoint],
        [*reference.kept_checkpoints(), reference.last_checkpoint],
        strict=True,
    ):
        difference = different(checkpoint_file.read(ours), checkpoint_file.read(theirs))
        assert not difference, f"{ours.name}: {difference}"
    assert not (difference := different(journal(run), journal(reference))), f"metrics.jsonl: {difference}"
    assert not (difference := different(results(run), results(reference))), f"results: {difference}"


def journal(run: RunFolder) -> list[Any]:
    """The points without what a clock measured; their lines are all whole."""
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return [
        [point["step"], {key: value for key, value in point["metrics"].items() if not key.startswith(CLOCK)}]
        for point in points
    ]


def results(run: RunFolder) -> list[Any]:
    """Results with their per-image values, without times."""
    found = ResultStore(run.path).all()
    samples = [run.path / "samples" / each.suite / f"{each.provenance['sha256'][:16]}.parquet" for each in found]
    documents = [untimed(result.model_dump(mode="json")) for result in found]
    return [documents, [pd.read_parquet(path).to_dict("list") for path in samples]]


def untimed(value: Any) -> Any:
    """A document without the keys of `TIMES` and `PLACES`."""
    if isinstance(value, dict):
        return {
            key: untimed(item) for key, item in value.items() if key not in TIMES | PLACES and not key.startswith(CLOCK)
        }
    return [untimed(item) for item in value] if isinstance(value, list) else value


def different(left: Any, right: Any, where: str = "") -> str:
    """Where two nested values first differ; empty when they do not."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return "" if left.dtype == right.dtype and torch.equal(left, right) else f"{where} (tensor)"
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return f"{where} has other keys: {sorted(map(str, left.keys() ^ right.keys()))}"
        pairs = [(left[key], right[key], f"{where}.{key}") for key in left]
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return f"{where} has {len(left)} instead of {len(right)} entries"
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        same = left == right or (left != left and right != right)
        return "" if same else f"{where}: {left!r} instead of {right!r}"
    return next((found for pair in pairs if (found := different(*pair))), "")


class Store:
    """MLflow's database, read without MLflow."""

    def __init__(self, file: Path):
        self._connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        tags = self._connection.execute("select run_uuid, value from tags where key = 'dinobench.kind'")
        kinds = dict(tags.fetchall())
        rows = self._connection.execute("select run_uuid, status, experiment_id, name from runs").fetchall()
        self.runs = [(run, status, experiment, name, kinds.get(run, "")) for run, status, experiment, name in rows]

    def close(self) -> None:
        self._connection.close()

    def statuses(self, kind: str) -> list[str]:
        return [status for _, status, _, _, of in self.runs if of == kind]

    def points(self, kind: str) -> Counter[tuple[str, int]]:
        """(metric, step) -> how often it was logged, over the runs of a kind."""
        ids = {run for run, *_, of in self.runs if of == kind}
        rows = self._connection.execute("select run_uuid, key, step from metrics").fetchall()
        return Counter((key, step) for run, key, step in rows if run in ids)

    def models(self) -> int:
        return self._connection.execute("select count(*) from logged_models").fetchone()[0]


def check_mirror(file: Path, run: RunFolder, reference: Path) -> None:
    """MLflow shows every point and every result of a run once, and nothing else."""
    ours, theirs = Store(file), Store(reference)
    try:
        assert ours.statuses("pretrain") == ["FINISHED"]
        assert {status for _, status, *_ in ours.runs} == {"FINISHED"}
        expected = {(key, point["step"]) for line in _lines(run) for point in [json.loads(line)] for key in _set(point)}
        logged = ours.points("pretrain")
        assert not (twice := [key for key, count in logged.items() if count > 1]), f"logged twice: {twice}"
        missing = {key for key in expected if key not in logged}
        assert not missing, f"not logged: {sorted(missing)[:5]}"
        for kind in ("pretrain", "checkpoint", "suite", "baseline"):
            assert sorted(ours.points(kind)) == sorted(theirs.points(kind)), kind
            assert len(ours.statuses(kind)) == len(theirs.statuses(kind)), kind
        assert ours.models() == theirs.models()
    finally:
        ours.close()
        theirs.close()


def _lines(run: RunFolder) -> list[str]:
    return (run.path / "metrics.jsonl").read_text().splitlines()


def _set(point: dict[str, Any]) -> list[str]:
    return [key for key, value in point["metrics"].items() if value is not None]


def _read_journal(path: Path) -> None:
    *whole, rest = path.read_text().split("\n")
    for line in whole:  # the last line may have been cut
        json.loads(line)
    assert rest == "" or rest.startswith("{")


def _read_checkpoint(path: Path) -> None:
    torch.load(path, map_location="cpu", weights_only=True)
    checkpoint_file.read(path)


def _read_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _read_features(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert file.metadata()["checksum"] == checksum(tensors)


def _read_database(path: Path) -> None:
    connection = sqlite3.connect(path)  # not read-only: it takes back what a killed process had not finished
    try:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    finally:
        connection.close()


READERS = {
    ".json": read_json,
    ".jsonl": _read_journal,
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".pt": _read_checkpoint,
    ".parquet": pd.read_parquet,
    ".safetensors": _read_features,
    ".png": _read_picture,
    ".db": _read_database,
}
