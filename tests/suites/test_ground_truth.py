from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import DinobenchError
from suites.ground_truth import read_ground_truth

CONTENT = {
    "imlist": ["a", "b", "c", "d"],
    "qimlist": ["q0", "q1"],
    "gnd": [
        {"bbx": [0.0, 0.0, 9.5, 9.0], "easy": [0], "hard": [1], "junk": [2]},
        {"bbx": [0.0, 0.0, 9.5, 9.0], "easy": [], "hard": [3], "junk": []},
    ],
}
root = os.environ.get("DINOBENCH_DATA", "")
needs_packs = pytest.mark.skipif(
    not (Path(root) / "retrieval-gnd").is_dir(), reason="DINOBENCH_DATA has no folder retrieval-gnd"
)


def written(folder: Path, content: object, suffix: str, protocol: int = 2) -> Path:
    path = folder / f"gnd_mine{suffix}"
    path.write_bytes(json.dumps(content).encode() if suffix == ".json" else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_and_json_give_the_same(tmp_path: Path, protocol: int) -> None:
    from_json = read_ground_truth(written(tmp_path, CONTENT, ".json"))
    assert read_ground_truth(written(tmp_path, CONTENT, ".pkl", protocol)) == from_json
    assert (from_json.images, from_json.queries) == (("a", "b", "c", "d"), ("q0", "q1"))


def test_difficulties_are_those_of_the_revisited_benchmarks(tmp_path: Path) -> None:
    truth = read_ground_truth(written(tmp_path, CONTENT, ".json"))
    found = {name: (truth.positives(name), truth.ignored(name)) for name in ("easy", "medium", "hard")}
    assert found == {
        "easy": (((0,), ()), ((2, 1), (3,))),
        "medium": (((0, 1), (3,)), ((2,), ())),
        "hard": (((1,), (3,)), ((2, 0), ())),
    }


class Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_names_a_class_is_refused_and_nothing_runs(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "it ran"
    path = written(tmp_path, {**CONTENT, "gnd": [Bomb(f"touch '{marker}'")]}, ".pkl", protocol)
    with pytest.raises(DinobenchError, match=r"refused: it asks for (posix|nt)\.system, which could run code"):
        read_ground_truth(path)
    assert not marker.exists()


@pytest.mark.promise("a ground-truth file cut short", "refused by name")
@pytest.mark.parametrize("suffix", [".json", ".pkl"])
@pytest.mark.parametrize("keep", [0, 5, 60])
def test_a_cut_file_is_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    path = written(tmp_path, CONTENT, suffix)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DinobenchError, match="is the download complete"):
        read_ground_truth(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qimlist": ["q0"]}, "names 1 queries and answers 2"),
        ({"imlist": ["a"]}, "refers to image 1, its list has 1"),
        ({"gnd": [{"easy": [0], "hard": [], "junk": [-1]}] * 2}, "refers to image -1"),
        ({"gnd": [{"easy": ["0"], "hard": [], "junk": []}] * 2}, "not a list of whole numbers"),
        ({"gnd": [{"ok": [0], "junk": []}] * 2}, "expected imlist, qimlist and gnd"),
        ({"gnd": 3}, "expected imlist, qimlist and gnd"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DinobenchError, match=message):
        read_ground_truth(written(tmp_path, {**CONTENT, **change}, ".json"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match=r"cannot read the ground truth .*gnd_x\.json"):
        read_ground_truth(tmp_path / "gnd_x.json")


def test_fingerprint_follows_the_answers(tmp_path: Path) -> None:
    first = read_ground_truth(written(tmp_path, CONTENT, ".json"))
    changed = {**CONTENT, "gnd": [{**CONTENT["gnd"][0], "junk": []}, CONTENT["gnd"][1]]}
    assert read_ground_truth(written(tmp_path, changed, ".json")).fingerprint() != first.fingerprint()


@needs_packs
@pytest.mark.parametrize(
    ("name", "images", "easy", "hard", "junk", "with_easy"),
    [("roxford5k", 4993, 3029, 2497, 1356, 68), ("rparis6k", 6322, 6874, 10350, 7153, 70)],
)
def test_the_packs_hold_the_published_counts(
    name: str, images: int, easy: int, hard: int, junk: int, with_easy: int
) -> None:
    truth = read_ground_truth(Path(root) / "retrieval-gnd" / f"gnd_{name}.json")
    assert (len(truth.images), len(truth.queries)) == (images, 70)
    assert tuple(sum(map(len, lists)) for lists in (truth.easy, truth.hard, truth.junk)) == (easy, hard, junk)
    assert sum(bool(answers) for answers in truth.easy) == with_easy
