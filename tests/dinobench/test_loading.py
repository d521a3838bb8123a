"""Which network of a file is measured is a part of the result: in its place, its receipt, and what verify takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinobench.cli import app
from dinobench.evaluate import Evaluation, evaluate
from dinobench.files import read_json, sha256
from dinobench.loading import Loading, checkpoint_digest, loading_of
from dinobench.results import read_result
from dinobench.verify import Options, verify
from pretrain.errors import DinobenchError, UsageError
from pretrain.models import checkpoint_file
from suites.suite import load_suite

Golden = Callable[[str], dict[str, np.ndarray]]


def silent(text: str) -> None:
    """Say nothing."""


@pytest.fixture
def two_networks(true_result: Any) -> Any:
    """The checkpoint of `true_result` with a student unlike its teacher."""
    payload = checkpoint_file.read(true_result.checkpoint)
    torch.manual_seed(1)
    payload["student"] = {name: torch.randn_like(value) for name, value in payload["teacher"].items()}
    checkpoint_file.save(true_result.checkpoint, payload)
    return true_result


def evaluate_both(true_result: Any, output: Path, *options: str) -> int:
    data = f"npz:{true_result.images}"
    common = ["eval", "--suite", "digits_knn", "--data", data, "--output", str(output), "--no-track", "--json"]
    return app.run([*common, *options, str(true_result.checkpoint)])


def test_teacher_and_student_have_results_of_their_own(
    two_networks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for _ in range(2):
        for options in ((), ("--checkpoint-key", "student")):
            assert evaluate_both(two_networks, tmp_path, *options) == 0
            captured = capsys.readouterr()
            found.append(json.loads(captured.out))
            network = "student" if options else "teacher"
            assert (f"{network} of dino-" in captured.err) == (not found[-1]["from_cache"])
    teacher, student = found[:2]
    assert [each["from_cache"] for each in found] == [False, False, True, True]
    assert [each["provenance"]["network"] for each in found] == 2 * ["teacher", "student"]
    assert teacher["receipt"]["checkpoint"]["weights_sha256"] != student["receipt"]["checkpoint"]["weights_sha256"]
    assert student["receipt"]["loading"] == {
        "network": "student",
        "arch": None,
        "num_heads": None,
        "allow_partial": False,
    }
    digest = sha256(two_networks.checkpoint)[:16]
    names = sorted(path.relative_to(tmp_path).parent.parent.parent for path in tmp_path.glob(f"**/{digest}-*.json"))
    assert names == [Path("."), Path("student")]


def test_verify_takes_the_network_that_was_measured(
    two_networks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_both(two_networks, tmp_path, "--checkpoint-key", "student") == 0
    (file,) = tmp_path.glob("student/evals/*/*.json")
    options = Options(device="cpu", baselines=False, tolerance=0.0)
    assert verify(file, options, silent).holds
    # said to be of the teacher, the scores are not those of its checkpoint
    document = read_json(file)
    document["receipt"]["loading"]["network"] = "teacher"
    file.write_text(json.dumps(document))
    verdict = verify(file, options, silent)
    assert verdict.measured and not verdict.holds
    # a result in a run folder finds its checkpoint there, one floor higher
    (tmp_path / "checkpoints").mkdir()
    two_networks.checkpoint.rename(tmp_path / "checkpoints" / two_networks.checkpoint.name)
    document["receipt"]["loading"]["network"] = "student"
    file.write_text(json.dumps(document))
    assert verify(file, options, silent).holds


def test_heads_of_a_foreign_vit_are_a_part_of_the_result(
    golden: Golden, true_result: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = golden("dino_vit")
    state = {key.removeprefix("sd."): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("sd.")}
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "official.pth")
    true_result.checkpoint = tmp_path / "official.pth"
    definition = tmp_path / "suite.yaml"
    definition.write_text(
        "name: mine\nversion: 1\nprotocol: knn\nheadline: top1\ntransform: {resize: 32, crop: null}\n"
        "parameters: {k: [5, 20], headline_k: 20}\nbaselines: []\n"
    )
    for heads in ("3", "6"):
        arguments = ["--suite", str(definition), "--data", f"npz:{true_result.images}", "--output", str(tmp_path)]
        path = str(true_result.checkpoint)
        assert app.run(["eval", *arguments, "--no-track", "--json", "--num-heads", heads, path]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["receipt"]["loading"]["num_heads"] == int(heads)
        assert "30 backbone tensors matched, 0 missing, 0 unexpected, coverage 100 %" in captured.err
    for heads in (3, 6):
        (file,) = tmp_path.glob(f"heads-{heads}/evals/mine@1/*.json")
        assert loading_of(read_result(file)) == Loading(num_heads=heads)
        assert verify(file, Options(suite=str(definition), device="cpu", tolerance=0.0), silent).holds


def test_a_partial_result_is_not_given_to_one_who_does_not_ask_for_it(true_result: Any, tmp_path: Path) -> None:
    payload = checkpoint_file.read(true_result.checkpoint)
    del payload["teacher"]["backbone.norm.weight"]
    checkpoint_file.save(true_result.checkpoint, payload)
    arguments = {"output": tmp_path / "partial", "data": f"npz:{true_result.images}", "device": "cpu"}
    said: list[str] = []
    settings = Evaluation(**arguments, loading=Loading(allow_partial=True))
    found = [evaluate(true_result.checkpoint, [load_suite("digits_knn")], settings, said.append)[0] for _ in range(2)]
    assert [result.from_cache for (result,) in found] == [False, True]
    assert "1 missing, 0 unexpected, coverage" in said[0]
    assert said[1] == "missing backbone tensors: norm.weight"
    with pytest.raises(DinobenchError, match=r"missing norm\.weight"):
        evaluate(true_result.checkpoint, [load_suite("digits_knn")], Evaluation(**arguments), silent)


def test_an_older_result_says_its_network_alone(make_result: Any) -> None:
    facts = {**make_result().provenance, "network": "student", "missing": ["norm.weight"]}
    result = make_result(provenance=facts, receipt={})
    assert loading_of(result) == Loading("student", allow_partial=True)
    assert loading_of(make_result()) == Loading()


def test_labels_are_fit_for_folders() -> None:
    assert Loading().label == Loading(allow_partial=True).label == ""
    assert Loading("student", num_heads=6).label == "student-heads-6"
    assert Loading(arch="vit_small_patch14_dinov2.lvd142m").label == "arch-vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(UsageError, match="either --arch or --num-heads"):
        Loading(arch="resnet18", num_heads=3)


def test_pixels_are_measured_without_a_file(
    true_result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"npz:{true_result.images}"
    arguments = ["eval", "--suite", "digits_knn", "--data", data, "--output", "out", "--no-track", "--json", "pixels"]
    assert app.run(arguments) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert "pixels32: no network: the features are the images themselves" in captured.err
    assert (document["checkpoint"], document["provenance"]["weights_sha256"]) == (
        "pixels",
        checkpoint_digest(Path("pixels")),
    )
    # 8 x 8 gray digits: nothing is reduced, so the same neighbours as the baseline but for the normalised colours
    assert document["scores"]["top1"] == pytest.approx(document["baselines"]["raw_pixels"]["top1"], abs=5)
    assert set(document["baselines"]) == {"raw_pixels", "pca"}
    assert app.run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["from_cache"]
    (file,) = (tmp_path / "out").glob("evals/*/*.json")
    assert app.run(["verify", str(file), "--device", "cpu"]) == 0
    document = read_json(file)
    document["scores"]["top1"] -= 5
    file.write_text(json.dumps(document))
    assert app.run(["verify", str(file), "--device", "cpu"]) == 4
    assert app.run([*arguments, "--checkpoint-key", "student"]) == 2
    assert "has no networks to choose from" in capsys.readouterr().err
