"""The console command on real data: what is killed continues to the same weights, numbers and pages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dinobench.files import read_json
from dinobench.runs import RunFolder, list_runs
from pretrain.models import checkpoint_file

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COMMAND = (sys.executable, "-c", "from dinobench.cli.app import main; main()")
RECIPE = (
    "dino_vmf",
    "schedule.epochs=6",
    "schedule.warmup_epochs=1",
    "head.num_prototypes=32",
    "runtime.log_every=5",
    "runtime.threads=1",
    "checkpoint.every_epochs=3",
    "checkpoint.every_steps=10",
    "evaluation.suites=[digits_knn]",
)


def start(output: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output / 'mlflow.db'}"}
    arguments = [*COMMAND, "pretrain", *RECIPE, "--output", str(output), "--json", *options]
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=output
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> RunFolder:
    """Until the journal of the run under `output` has reached a step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        for run in list_runs(output):
            if any(point.step >= step for point in run.journal.read()):
                return run
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def weights(run: RunFolder) -> dict[str, Any]:
    payload = checkpoint_file.read(run.kept_checkpoints()[-1])
    return {key: payload[key] for key in ("student", "teacher", "target", "optimizer", "step")}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    children = {f"{prefix}.{key}": child for key, child in pairs}
    return (
        {k: v for key, child in children.items() for k, v in flat(child, key).items()} if children else {prefix: value}
    )


def assert_same(left: Any, right: Any) -> None:
    ours, theirs = flat(left), flat(right)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
        assert same, key


def metrics(run: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """The journal but for what a clock measured."""
    return [
        (point.step, {key: value for key, value in point.metrics.items() if not key.startswith("speed/")})
        for point in run.journal.read()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    document = finish(start(output))
    (run,) = list_runs(output)
    return run, document


def test_a_run_ends_with_numbers_a_checkpoint_and_pages(whole: tuple[RunFolder, dict[str, Any]]) -> None:
    run, document = whole
    assert document["status"] == "finished"
    assert {result["suite"] for result in document["results"]} == {"digits_knn@1"}
    assert len(document["results"]) == 2  # both kept checkpoints
    assert document["results"][0]["baselines"].keys() == {"raw_pixels", "pca", "random_init"}
    assert Path(document["pointers"]["checkpoint"]).is_file()
    assert sorted(path.name for path in run.figures.glob("*.png")) == [
        "features.png",
        "health.png",
        "loss.png",
        "prototype_norms.png",
        "prototypes.png",
    ]


def test_a_killed_run_resumes_to_the_same_weights_numbers_and_pages(
    whole: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    process = start(tmp_path)
    run = wait_for_step(tmp_path, 45, process)
    process.kill()
    process.communicate()
    again = start(tmp_path)
    assert again.wait(timeout=200) == 3
    assert "--resume" in again.communicate()[1]
    document = finish(start(tmp_path, "--resume"))
    assert [folder.path for folder in list_runs(tmp_path)] == [run.path]
    assert_same(weights(run), weights(whole[0]))
    assert metrics(run) == metrics(whole[0])
    scores = [[result["scores"] for result in each["results"]] for each in (document, whole[1])]
    assert scores[0] == scores[1]
    starts = read_json(run.path / "environment.json")["starts"]
    assert starts[0]["resumed_at_step"] is None
    assert starts[1]["resumed_at_step"] % 10 == 0

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dinobench/pretrain")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(logged.info.run_id, "loss/total")]
    assert sorted(steps) == list(range(5, 121, 5))

    finished = finish(start(tmp_path))
    assert finished["trained"] is False
    assert [result["scores"] for result in finished["results"]] == scores[0]


def test_a_terminated_run_leaves_a_checkpoint_and_exit_code_143(tmp_path: Path) -> None:
    process = start(tmp_path)
    run = wait_for_step(tmp_path, 25, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 143, err
    document = json.loads(out)
    assert (document["status"], document["note"]) == ("interrupted", "SIGTERM")
    assert int(checkpoint_file.read(run.last_checkpoint)["step"]) == document["step"]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (logged,) = client.search_runs([client.get_experiment_by_name("dinobench/pretrain").experiment_id])
    assert logged.info.status == "KILLED"
