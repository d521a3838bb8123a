"""Jobs of a cluster: what is submitted, what a job runs, and when it comes back. submitit's own parts where it is."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinobench.cli import app
from dinobench.files import read_json
from dinobench.slurm import Job, num_ranks, parse_options, submit
from pretrain.errors import DinobenchError, UsageError
from pretrain.models import checkpoint

WITH_SUBMITIT = "submitit is not installed (the extra `slurm`)"


def test_options_are_completed_and_give_one_rank_per_gpu() -> None:
    options = parse_options("partition=gpu,nodes=2, gpus_per_node=4,constraint=h100")
    assert options["partition"] == "gpu" and options["constraint"] == "h100"
    assert (options["nodes"], options["tasks_per_node"], num_ranks(options)) == (2, 4, 8)
    assert num_ranks(parse_options("partition=cpu")) == 1
    assert parse_options("timeout_min=30,partition=gpu")["timeout_min"] == 30


@pytest.mark.parametrize("text", ["", "gpu", "partition=", "=gpu", "nodes=2,,partition=gpu", "nodes=1,nodes=2"])
def test_what_is_no_option_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="--slurm"):
        parse_options(text)


def test_a_number_of_nodes_is_a_number() -> None:
    with pytest.raises(UsageError, match="nodes=two: expected a whole number"):
        num_ranks(parse_options("nodes=two"))


def test_without_submitit_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(DinobenchError, match=r"dinobench\[slurm\].*torchrun"):
        submit(["pretrain", "dino"], parse_options("partition=gpu"), tmp_path)


class FakeExecutor:
    """Stands for submitit's, as far as it is used; remembers the last one."""

    last: Any = None

    def __init__(self, folder: Path, cluster: str, **options: Any) -> None:
        if cluster == "slurm" and os.environ.get("NO_CLUSTER"):
            raise RuntimeError('Could not detect "srun"')
        self.folder, self.cluster, self.parameters, self.job = folder, cluster, {}, None
        FakeExecutor.last = self

    def update_parameters(self, **parameters: Any) -> None:
        if "slurm_partiton" in parameters:
            raise NameError("unknown parameter slurm_partiton")
        self.parameters |= parameters

    def submit(self, job: Job) -> Any:
        self.job = job
        return SimpleNamespace(job_id="7", paths=SimpleNamespace(stdout=self.folder / "7.out", stderr="7.err"))


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in the place of submitit; `requeued` holds what its signal handler was asked to queue."""
    module = SimpleNamespace(AutoExecutor=FakeExecutor, JobEnvironment=SimpleNamespace(USR_SIG="USR2"), requeued=[])
    environment = SimpleNamespace(export=lambda **options: None)
    module.helpers = SimpleNamespace(
        TorchDistributedEnvironment=lambda: environment, DelayedSubmission=lambda job, *rest: (job, rest)
    )
    monkeypatch.setitem(sys.modules, "submitit", module)
    return module


def test_the_command_submits_itself_without_training(
    submitit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["pretrain", "dino", "optim.batch_size=64", "--seed", "3", "--no-eval", "--json", "runtime.workers=6"]
    assert app.run([*line, "--slurm", "partition=gpu,nodes=2,gpus_per_node=4,mem_gb=100"]) == 0
    assert json.loads(capsys.readouterr().out)["job"] == "7"
    executor = FakeExecutor.last
    assert executor.cluster == "slurm" and executor.folder == Path("runs/slurm")
    shared = {"nodes": 2, "gpus_per_node": 4, "tasks_per_node": 4, "mem_gb": 100, "cpus_per_task": 7}
    assert executor.parameters.items() >= {**shared, "slurm_partition": "gpu", "slurm_signal_delay_s": 180}.items()
    assert executor.job.arguments == (
        *("pretrain", "dino", "optim.batch_size=64", "runtime.workers=6"),
        *("--output", "runs", "--seed", "3", "--no-eval"),
    )
    assert not list(tmp_path.iterdir()), "the run folder is made by the job"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("partition=gpu,nodes=3,gpus_per_node=1", 2, "use a multiple of 3"),
        ("partiton=gpu", 2, "partiton"),
        ("partition=gpu", 3, "submit from a login node"),
    ],
)
def test_what_will_not_work_is_told_before_the_job_starts(
    options: str, code: int, said: str, submitit: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if code == 3:
        monkeypatch.setenv("NO_CLUSTER", "1")
    assert app.run(["pretrain", "dino", "optim.batch_size=64", "--slurm", options]) == code
    assert said in capsys.readouterr().err


@pytest.fixture
def on_a_node(submitit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Calls a job as submitit does, its signal handler in place. The command ends with `code`, squeue says `state`."""
    monkeypatch.setattr(sys, "argv", ["submitit"])
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}

    def call(job: Job, code: int, state: str = "RUNNING", fails: bool = False) -> list[list[str]]:
        squeue.write_text(f"#!/bin/sh\necho {state}\nexit {int(fails)}\n")
        squeue.chmod(0o755)
        lines: list[list[str]] = []
        monkeypatch.setattr(app, "run", lambda line: lines.append(line) or code)
        signal.signal(signal.SIGUSR2, lambda number, frame: submitit.requeued.append(job.checkpoint()))
        assert job() == 0
        return lines

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


JOB = Job(("pretrain", "dino", "--new"))


def test_a_job_runs_the_command(on_a_node: Any, submitit: Any) -> None:
    assert on_a_node(JOB, 0) == [["pretrain", "dino", "--new"]]
    assert sys.argv == ["dinobench", "pretrain", "dino", "--new"]
    assert submitit.requeued == []


@pytest.mark.promise("a job's time ends (SIGUSR2)", "checkpoint, queued again, resumed")
@pytest.mark.parametrize("code", [143, 138, 140])
def test_an_interrupted_job_is_queued_again_and_resumes(code: int, on_a_node: Any, submitit: Any) -> None:
    on_a_node(JOB, code)
    ((job, rest),) = submitit.requeued
    assert job == Job(JOB.arguments, restarted=True) and rest == ()
    assert on_a_node(job, 0) == [["pretrain", "dino", "--resume"]]


def test_a_job_that_slurm_queued_again_resumes_too(on_a_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert on_a_node(JOB, 0) == [["pretrain", "dino", "--resume"]]


def test_a_controller_that_does_not_answer_does_not_keep_a_job_from_coming_back(on_a_node: Any, submitit: Any) -> None:
    on_a_node(JOB, 143, "nothing", fails=True)
    assert len(submitit.requeued) == 1


@pytest.mark.parametrize(("code", "state"), [(143, "CANCELLED"), (143, "COMPLETING"), (130, "RUNNING"), (3, "RUNNING")])
def test_a_cancelled_or_failed_job_does_not_come_back(code: int, state: str, on_a_node: Any, submitit: Any) -> None:
    with pytest.raises(RuntimeError, match=f"dinobench pretrain dino --new. ended with exit code {code}"):
        on_a_node(JOB, code, state)
    assert submitit.requeued == []


def test_a_signal_outside_of_the_training_ends_the_command_first(
    on_a_node: Any, submitit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(line: list[str]) -> int:
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGUSR2)
        assert submitit.requeued == [], "what the command writes is written first"
        return int(ended.value.code or 0)

    lines: list[Any] = []
    job = Job(("pretrain",))
    with monkeypatch.context() as patch:
        patch.setattr(app, "run", run)
        signal.signal(signal.SIGUSR2, lambda number, frame: lines.append(number))
        patch.delenv("SLURM_JOB_ID")
        job()
    assert lines == [signal.SIGUSR2]


def test_submitit_writes_what_sbatch_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason=WITH_SUBMITIT)
    for name, said in {"srun": "", "sbatch": f"cp $1 {tmp_path}/script; echo Submitted batch job 12"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    job = submit(["pretrain", "dino"], parse_options("partition=gpu,nodes=2,gpus_per_node=4,qos=long"), tmp_path / "s")
    assert job.job_id == "12"
    script = (tmp_path / "script").read_text().splitlines()
    wanted = ("partition=gpu", "qos=long", "nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "time=1440")
    assert {f"#SBATCH --{line}" for line in (*wanted, "signal=USR2@180", "job-name=dinobench")} <= set(script)
    with pytest.raises(UsageError, match="partiton"):
        submit(["pretrain", "dino"], parse_options("partiton=gpu"), tmp_path / "s")


@pytest.mark.slow
def test_a_preempted_job_of_two_ranks_comes_back_and_finishes(tmp_path: Path, capsys: Any) -> None:
    """With submitit's local cluster: its controller passes SIGTERM on and starts the processes again."""
    pytest.importorskip("submitit", reason=WITH_SUBMITIT)
    quick = ["schedule.epochs=100", "schedule.warmup_epochs=1", "head.num_prototypes=32", "tracking.enabled=false"]
    arguments = ["pretrain", "dino", *quick, "runtime.log_every=1", "runtime.device=cpu", "checkpoint.every_steps=1"]
    arguments += ["--output", str(tmp_path), "--no-eval", "schedule.steps_per_epoch=1", "optim.batch_size=16"]
    job = submit(arguments, parse_options("cluster=local,tasks_per_node=2,timeout_min=10"), tmp_path / "slurm")
    last = _wait_for(lambda: next(tmp_path.glob("*/checkpoints/last.pt"), None))
    job._process.send_signal(signal.SIGTERM)
    (run,) = {path.parent for path in tmp_path.glob("*/recipe.yaml")}
    starts = _wait_for(lambda: len(read_json(run / "environment.json")["starts"]) == 2)
    assert starts
    assert _wait_for(job.done)
    assert checkpoint.read(last)["step"] == 100
    assert "resuming at step" in (run / "train.log").read_text()


def _wait_for(condition: Any, seconds: float = 300) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer := condition():
            return answer
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} seconds")


@pytest.mark.promise("--slurm on an unfinished run, without --resume", "refused at submission, not when the job starts")
def test_an_unfinished_run_is_told_before_the_job_is_queued(
    submitit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dinobench.runs import find_run
    from pretrain.training.recipe import resolve

    line = ["pretrain", "dino", "--output", str(tmp_path), "--slurm", "partition=gpu"]
    run = find_run(resolve("dino"), tmp_path)
    run.create(resolve("dino"))
    FakeExecutor.last = None
    assert app.run(line) == 3
    assert "it was killed): continue it with --resume" in capsys.readouterr().err
    assert FakeExecutor.last is None
    for flag in ("--resume", "--new"):
        assert app.run([*line, flag]) == 0
    run.update(status="finished")
    assert app.run(line) == 0
