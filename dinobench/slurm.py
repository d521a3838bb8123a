"""`dinobench pretrain ... --slurm partition=gpu,nodes=2,gpus_per_node=8`: the command as a job, through submitit.

The job runs the same command once per GPU, with the ranks that torchrun would give. Before its time ends, when SLURM
sends a signal, or when it is preempted, it writes a checkpoint and queues itself again; the next start goes on there.
A job that was cancelled writes a checkpoint and stays away.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.errors import DinobenchError, UsageError

SHARED = ("cpus_per_task", "gpus_per_node", "mem_gb", "name", "nodes", "tasks_per_node", "timeout_min")
"""Options that submitit has for every cluster; all others are those of sbatch, like partition, account or qos, and
`cluster=local`, which runs the job as processes of this machine."""
DEFAULTS = {"nodes": 1, "timeout_min": 24 * 60, "name": "dinobench"}
SIGNAL_DELAY_SECONDS = 180
"""Between SLURM's signal and the end of the job's time: for the step under way, the next agreement, a checkpoint."""
MAX_STARTS = 1000
"""submitit's limit on starts again; the training ends the chain, not this number."""
INTERRUPTED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
"""Exit codes after which a job comes back; not that of SIGINT, by which somebody stopped it."""


def parse_options(text: str) -> dict[str, int | str]:
    """`partition=gpu,nodes=2` as options, completed by what a training needs; numbers become numbers.

    Raises:
        UsageError: a part without a name or a value, or a name twice.
    """
    options: dict[str, int | str] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not (name.isidentifier() and value):
            raise UsageError(f"--slurm {part!r}: expected NAME=VALUE, like partition=gpu,nodes=2,gpus_per_node=8")
        if name in options:
            raise UsageError(f"--slurm {text!r} gives {name} twice: give it once")
        options[name] = int(value) if value.isdecimal() else value
    return {**DEFAULTS, "tasks_per_node": options.get("gpus_per_node") or 1, **options}


def num_ranks(options: dict[str, int | str]) -> int:
    """Processes of the training.

    Raises:
        UsageError: nodes or tasks_per_node is no positive number.
    """
    counts = {name: options[name] for name in ("nodes", "tasks_per_node")}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"--slurm {name}={count}: expected a whole number of at least 1")
    return int(counts["nodes"]) * int(counts["tasks_per_node"])


def submit(arguments: list[str], options: dict[str, int | str], folder: Path) -> Any:
    """Submit a command line of `dinobench` and give submitit's job, without waiting for it.

    Args:
        arguments: the command line without its first word and without --slurm.
        options: of `parse_options`.
        folder: where submitit keeps the job and its logs.

    Raises:
        DinobenchError: submitit is not installed, finds no cluster, or does not know an option.
    """
    submitit = _submitit()
    cluster = options.get("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=MAX_STARTS)
    except (RuntimeError, ValueError) as error:
        raise DinobenchError(
            f"submitit finds no {cluster} here ({error}): submit from a login node of the cluster, or run the command "
            "without --slurm"
        ) from error
    named = {name if name in SHARED else f"slurm_{name}": value for name, value in options.items() if name != "cluster"}
    try:
        executor.update_parameters(**{"slurm_signal_delay_s": SIGNAL_DELAY_SECONDS, **named})
    except (TypeError, NameError, AssertionError, ValueError) as error:
        raise UsageError(f"--slurm: submitit does not take these options: {error}") from error
    try:
        return executor.submit(Job(tuple(arguments)))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise DinobenchError(f"the job was not accepted: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Job:
    """What every process of the job runs."""

    arguments: tuple[str, ...]
    restarted: bool = False

    def __call__(self) -> int:
        """Run the command; 0 when it has ended, also on the ranks that do not queue the job again.

        Raises:
            RuntimeError: the command failed; its log says how.
        """
        from dinobench.cli import app

        environment = _submitit().helpers.TorchDistributedEnvironment()
        # Each rank takes the GPU of its LOCAL_RANK, as under torchrun.
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        queue_again = signal.getsignal(_preemption())
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # the training loop notes them; this is for what follows it
            signal.signal(number, _leave)
        arguments = self.command_line()
        sys.argv = ["dinobench", *arguments]
        code = app.run(arguments)
        if code in INTERRUPTED and not _cancelled():
            signal.signal(_preemption(), queue_again)
            signal.raise_signal(_preemption())  # submitit's handler: `checkpoint` below, then requeue, on rank 0
        elif code:
            raise RuntimeError(f"`{' '.join(sys.argv)}` ended with exit code {code}")
        return 0

    def command_line(self) -> list[str]:
        """The arguments of this start: a job that comes back goes on with its run."""
        if not (self.restarted or int(os.environ.get("SLURM_RESTART_COUNT", 0))):
            return list(self.arguments)
        return [*(argument for argument in self.arguments if argument not in ("--new", "--resume")), "--resume"]

    def checkpoint(self) -> Any:
        """What submitit queues: the same, going on from its last checkpoint."""
        return _submitit().helpers.DelayedSubmission(Job(self.arguments, restarted=True))


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ModuleNotFoundError as error:
        raise DinobenchError(
            "--slurm submits through submitit, which is not installed: `uv pip install 'dinobench[slurm]'`, or start "
            "the ranks yourself with torchrun"
        ) from error


def _preemption() -> signal.Signals:
    """The signal at which submitit queues a job again; also the one SLURM sends before the time ends."""
    return signal.Signals[f"SIG{_submitit().JobEnvironment.USR_SIG}"]


def _cancelled() -> bool:
    """Whether SLURM ends the job for good (scancel) or queues it again itself; it calls both states not running."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    try:
        command = ["squeue", "--noheader", "--format=%T", "--jobs", job]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False  # a controller that does not answer: better queued once too often
    return answer.returncode == 0 and "RUNNING" not in answer.stdout.split()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
