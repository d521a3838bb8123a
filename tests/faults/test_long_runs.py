"""A day's training by proxy: 20,000 small steps with everything on that a long run has, and nothing grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinobench.journal import Journal

# of MLflow and SQLAlchemy
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, EVERY, WARM = 20_000, 500, 4_000
LIMIT_MB = 1.0
"""Of memory per 1,000 steps, after WARM steps."""
TRAIN = """
import json, os, sys
import psutil
from pathlib import Path
from dinobench.reporter import Reporter
from dinobench.train import Request, pretrain
from pretrain.training.recipe import resolve

class Sampling(Reporter):
    def progress(self, progress):
        super().progress(progress)
        if progress.step % {every} == 0:
            process = psutil.Process()
            memory, threads = process.memory_info().rss / 1e6, process.num_threads()
            seconds = sum(process.cpu_times()[:2])
            row = {{"step": progress.step, "mb": memory, "files": process.num_fds(), "threads": threads}}
            samples.write(json.dumps(row | {{"seconds": seconds}}) + "\\n")

recipe = resolve("dino", preset="digits", overrides={overrides})
with open(sys.argv[1] + "/samples.jsonl", "w", buffering=1) as samples:
    pretrain(recipe, Request(Path(sys.argv[1]) / "runs", "dinobench pretrain dino"), Sampling())
"""
SMALLEST = [
    "optim.batch_size=4",
    "schedule.epochs=20",
    f"schedule.steps_per_epoch={STEPS // 20}",
    "schedule.warmup_epochs=1",
    "data.resize=8",
    "views.global_size=8",
    "views.local=0",
    "views.jitter=0",
    "views.rotation=0",
    "views.shear=0",
    "model.kwargs={img_size: 8, patch_size: 4, embed_dim: 8, depth: 1, num_heads: 1}",
    "head.hidden=8",
    "head.bottleneck=8",
    "head.num_prototypes=16",
    "runtime.device=cpu",
    "runtime.log_every=20",
    "checkpoint.every_steps=250",
    "checkpoint.every_epochs=1",
    "checkpoint.keep=3",
    "evaluation.suites=[]",
]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of 20,000 steps, with what was sampled every 500."""
    folder = tmp_path_factory.mktemp("long")
    code = TRAIN.format(every=EVERY, overrides=SMALLEST)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def sampled(folder: Path) -> dict[str, np.ndarray]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.faults
@pytest.mark.promise("a long run (20,000 steps)", "memory grows by less than 1 MB per 1,000 steps after warm-up")
def test_memory_is_flat_over_20000_steps(long_run: Path, count: Callable, figure: Callable) -> None:
    found = sampled(long_run)
    assert found["step"].tolist() == list(range(EVERY, STEPS + 1, EVERY))
    warm = found["step"] > WARM
    slope = float(np.polyfit(found["step"][warm] / 1000, found["mb"][warm], 1)[0])
    count(long_run_steps=STEPS)
    figure(memory_slope_mb_per_1000_steps=slope, memory_mb=float(found["mb"][-1]))
    figure(cpu_seconds_of_20000_steps=float(found["seconds"][-1]))
    assert slope < LIMIT_MB


@pytest.mark.faults
@pytest.mark.promise("a long run (20,000 steps)", "open files and threads stay as many as after the warm-up")
def test_open_files_and_threads_are_constant_over_20000_steps(long_run: Path, figure: Callable) -> None:
    found = sampled(long_run)
    warm = found["step"] > WARM
    for name in ("files", "threads"):
        figure(**{f"{name}_during_a_long_run": int(found[name][warm].max())})
        assert np.ptp(found[name][warm]) == 0, found[name]


@pytest.mark.faults
@pytest.mark.promise("a long run (20,000 steps)", "every point is in the journal and in MLflow, once")
def test_every_point_of_20000_steps_is_in_the_journal_and_in_mlflow_once(long_run: Path) -> None:
    import mlflow

    points = Journal(next(long_run.glob("runs/*/metrics.jsonl"))).read()
    steps = [point.step for point in points if "loss/total" in point.metrics]
    assert steps == list(range(20, STEPS + 1, 20))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{long_run / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dinobench/pretrain"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss/total")] == steps
