"""verify at the command line, for suites of every kind: holds as it is, ends with 4 after one altered thing.

A shipped suite that reads its own images (retrieval), the same as a user's file, and a user's kNN file. Of the digits,
as pictures; a label of a retrieval benchmark is an entry of its ground truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinobench.cli import app
from dinobench.files import read_json

NUM, PER_CLASS = 24, 6
"""Pictures, and those of one digit; the first of each digit is a query."""
KINDS = ("coil20_retrieval", "my_retrieval", "my_knn")
DEFINITIONS = {
    "my_retrieval": "protocol: retrieval\nheadline: map_hard\ndataset: {name: coil20}\nbaselines: [raw_pixels]\n"
    "parameters: {image_size: 32}\n",
    "my_knn": "protocol: knn\nheadline: top1\nparameters: {k: [3, 5], headline_k: 3}\nbaselines: [raw_pixels]\n"
    "transform: {resize: 16, crop: null}\n",
}


@dataclass
class Case:
    """A measured suite: its result, its definition where it is not shipped, and what it was made from."""

    file: Path
    suite: list[str]
    data: Path
    kind: str
    true_result: Any

    def verify(self) -> int:
        return app.run(["verify", str(self.file), *self.suite, "--device", "cpu", "--json"])

    def alter_label(self) -> None:
        if self.kind == "my_knn":
            self.true_result.alter_image("test_labels")
            return
        truth = read_json(self.data / "gnd_coil20.json")
        truth["gnd"][0]["easy"].append(truth["gnd"][0]["hard"].pop())
        (self.data / "gnd_coil20.json").write_text(json.dumps(truth))

    def alter_score(self) -> None:
        document = read_json(self.file)
        document["scores"][document["headline"]] *= 0.9
        self.file.write_text(json.dumps(document))

    def alter_image(self) -> None:
        if self.kind == "my_knn":
            self.true_result.alter_image("train_images")
            return
        path = self.data / "obj5.png"
        with Image.open(path) as image:
            pixels = np.array(image)
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(path)


def retrieval_folder(folder: Path) -> Path:
    """Pictures of four digits, 32 x 32, with ground truth: half of a digit's other pictures easy, half hard."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [np.flatnonzero(digits.target == digit)[:PER_CLASS] for digit in range(NUM // PER_CLASS)]
    names = [f"obj{number}" for number in range(NUM)]
    folder.mkdir()
    for name, number in zip(names, np.concatenate(chosen), strict=True):
        pixels = (digits.images[number] * 15).astype(np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    gnd = []
    for first in range(0, NUM, PER_CLASS):
        others = list(range(first + 1, first + PER_CLASS))
        gnd.append({"easy": others[:2], "hard": others[2:], "junk": [first], "bbx": [0, 0, 32, 32]})
    truth = {"imlist": names, "qimlist": names[::PER_CLASS], "gnd": gnd}
    (folder / "gnd_coil20.json").write_text(json.dumps(truth))
    return folder


@pytest.fixture
def measured_suite(true_result: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Case]:
    def measure(kind: str) -> Case:
        name, options = kind, []
        if kind in DEFINITIONS:
            name = str(tmp_path / f"{kind}.yaml")
            Path(name).write_text(f"name: {kind}\nversion: 3\n{DEFINITIONS[kind]}")
            options = ["--suite", name]
        data = true_result.images if kind == "my_knn" else retrieval_folder(tmp_path / "pictures")
        uri = f"npz:{data}" if kind == "my_knn" else f"folder:{data}"
        output = tmp_path / "runs"
        arguments = ["--suite", name, "--data", uri, "--output", str(output), "--device", "cpu", "--no-track"]
        assert app.run(["eval", *arguments, str(true_result.checkpoint)]) == 0
        (file,) = output.glob(f"evals/{kind}@*/*.json")
        capsys.readouterr()
        return Case(file, options, data, kind, true_result)

    return measure


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_result_holds_until_a_score_is_altered(
    kind: str, measured_suite: Callable[[str], Case], capsys: pytest.CaptureFixture[str]
) -> None:
    case = measured_suite(kind)
    assert case.verify() == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "holds"
    case.alter_score()
    assert case.verify() == 4
    document = json.loads(capsys.readouterr().out)
    headline = read_json(case.file)["headline"]
    assert (document["mismatches"], document["measured"]) == ([headline], True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("altered", "told"),
    [
        ("weight", "checkpoint sha256"),
        ("label", "dataset fingerprint ("),
        ("image", "dataset fingerprint ("),
    ],
)
def test_one_altered_weight_label_or_image_ends_with_4(
    kind: str, altered: str, told: str, measured_suite: Callable[[str], Case], capsys: pytest.CaptureFixture[str]
) -> None:
    case = measured_suite(kind)
    if altered == "weight":
        case.true_result.alter_weight()
    else:
        getattr(case, f"alter_{altered}")()
    assert case.verify() == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert not document["measured"]
    assert all(name.startswith(told) for name in document["mismatches"]), document["mismatches"]
    assert "does not hold" in captured.err


def test_a_changed_number_of_a_users_suite_is_named(
    measured_suite: Callable[[str], Case], capsys: pytest.CaptureFixture[str]
) -> None:
    case = measured_suite("my_knn")
    definition = Path(case.suite[1])
    definition.write_text(definition.read_text().replace("k: [3, 5]", "k: [3, 4]"))
    assert case.verify() == 4
    assert json.loads(capsys.readouterr().out)["mismatches"] == ["suite fingerprint"]
