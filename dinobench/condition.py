"""What state a run is in, in plain words, and what to do about it; with the exact commands."""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinobench.reporter import duration
from dinobench.runs import RunFolder, RunState, describe_status
from pretrain.errors import DinobenchError

SILENT_SECONDS = 600.0
"""A run at work writes to train.log every few seconds; one that is silent for so long may hang."""


@dataclass(frozen=True)
class Todo:
    """Something to do."""

    reason: str
    command: str
    """Empty where no command does it."""


@dataclass(frozen=True)
class Checkpoint:
    """A file of the run's checkpoint folder."""

    name: str
    megabytes: float
    damage: str
    """What is wrong with it; empty for a whole one."""


@dataclass(frozen=True)
class Condition:
    """What `dinobench runs show` says first."""

    status: str
    """In one word: running, killed, interrupted, finished, collapsed, failed or damaged."""
    says: str
    """The same in a sentence or two."""
    checkpoints: list[Checkpoint] = field(default_factory=list)
    todo: list[Todo] = field(default_factory=list)


def diagnose(run: RunFolder) -> Condition:
    """The condition of a run. A file of it that is damaged is a finding, not an error."""
    try:
        status, state = describe_status(run), run.state()
    except DinobenchError as error:
        return Condition("damaged", f"{error}.", _checkpoints(run), [])
    checkpoints = _checkpoints(run)
    todo = list(_todo(run, status, state, checkpoints))
    return Condition(status, _sentence(run, status, state, checkpoints), checkpoints, todo)


def refuse_unfinished(run: RunFolder, *, ours: bool = False) -> None:
    """Refuse to start a recipe whose run is there and not finished: that takes --resume or --new.

    Args:
        ours: whether this process holds the lock of the folder.

    Raises:
        DinobenchError: says how the run stands.
    """
    if not run.exists:
        if run.kept_checkpoints():
            raise DinobenchError(
                f"{run.path} has a checkpoint of this recipe, but its run.json is gone: --resume writes it again and "
                "goes on from there, --new starts another run"
            )
        return
    status = run.state().status if ours else describe_status(run)
    if status == "finished":
        return
    if status == "running" and not ours:
        raise DinobenchError(
            f"{run.path} is a run of this recipe and process {run.holder()} works on it: wait for it, or start "
            "another with --new"
        )
    found = "was killed" if status in ("running", "killed") else f"is {status}"
    raise DinobenchError(
        f"{run.path} holds an unfinished run of this recipe (it {found}): continue it with --resume, or start another "
        "with --new"
    )


def resume_command(run: RunFolder, flag: str = "--resume") -> str:
    """The command that started the run last, with --resume (or --new), as it works from the folder we are in."""
    try:
        start = run.starts()[-1]
        words = shlex.split(str(start["command"]))
    except (DinobenchError, IndexError, KeyError, ValueError):  # killed before it was noted, or damaged
        words = ["dinobench", "pretrain", str(run.recipe_file), "--output", str(run.path.parent)]
        start = {}
    command = shlex.join([*(word for word in words if word not in ("--resume", "--new")), flag])
    if isinstance(ranks := start.get("ranks"), int) and ranks > 1:
        command = f"torchrun --no-python --nproc-per-node {ranks} {command}"
    folder = start.get("folder")
    return command if folder in (None, str(Path.cwd())) else f"cd {shlex.quote(str(folder))} && {command}"


def _checkpoints(run: RunFolder) -> list[Checkpoint]:
    """last.pt and the kept ones, each read once: two names of one file are one file."""
    from pretrain.training.checkpoints import damage_of

    known: dict[tuple[int, int], str] = {}
    found = []
    for path in dict.fromkeys([*run.kept_checkpoints(), run.last_checkpoint]):
        try:
            facts = path.stat()
        except OSError:
            continue
        file = facts.st_dev, facts.st_ino
        known[file] = known[file] if file in known else damage_of(path)
        found.append(Checkpoint(path.name, round(facts.st_size / 1e6, 1), known[file]))
    return found


def _sentence(run: RunFolder, status: str, state: RunState, checkpoints: list[Checkpoint]) -> str:
    host, _, process = (run.holder() if status in ("running", "finished") else state.process).rpartition(":")
    who = f"process {process or '?'} on {host or 'an unknown machine'}"
    note = f": {state.note}" if state.note else ""
    whole = [checkpoint for checkpoint in checkpoints if not checkpoint.damage]
    kept = "it can be resumed" if whole else "it has written no checkpoint yet, so --resume begins again"
    if status == "finished":
        held = f"; {who} works in its folder, on evaluations or figures" if run.is_held() else ""
        return f"finished after {state.step} steps in {duration(state.seconds)} of training{held}."
    if status == "running":
        return f"running: {who} trains it{_progress(run)}."
    if status == "killed":
        where = (
            "" if host in ("", socket.gethostname()) else f" (as seen from {socket.gethostname()}; ask on {host} too)"
        )
        return f"killed: it was at work as {who}, and no process works on it any more{where}{_progress(run)}; {kept}."
    if status == "interrupted":
        return f"interrupted by {state.note or 'a signal'} after a checkpoint at step {state.step}; {kept}."
    if status == "collapsed":
        return f"stopped because the training collapsed{note}. What it learnt up to there is in its checkpoints."
    return f"failed{note or ', and nothing was noted'}. {kept[0].upper()}{kept[1:]}."


def _progress(run: RunFolder) -> str:
    """How far it came, and when that was written."""
    last = run.journal.last()
    if last is None:
        return ", before its first logged step"
    total = _total_steps(run)
    age = max(0.0, time.time() - last.time)
    return f", at step {last.step}{f' of {total}' if total else ''} as of {duration(age)} ago"


def _total_steps(run: RunFolder) -> int:
    """Steps of the whole training where the recipe says so; 0 where it follows from the data."""
    try:
        schedule = run.recipe()["schedule"]
        return int(schedule["epochs"]) * int(schedule["steps_per_epoch"] or 0)
    except (DinobenchError, KeyError, TypeError, ValueError):
        return 0


def _todo(run: RunFolder, status: str, state: RunState, checkpoints: list[Checkpoint]) -> Iterator[Todo]:
    damaged = [checkpoint for checkpoint in checkpoints if checkpoint.damage]
    if status == "running":
        silent = time.time() - _last_written(run)
        if silent > SILENT_SECONDS:
            yield Todo(f"it has written nothing for {duration(silent)} and may hang: look at {run.log_file}", "")
    elif status in ("interrupted", "killed", "failed"):
        if checkpoints and len(damaged) == len(checkpoints):
            yield Todo("every checkpoint is damaged: put a copy back, or begin again", resume_command(run, "--new"))
        else:
            before = "mend what it says, then continue" if status == "failed" else "continue"
            yield Todo(f"{before} where it stopped", resume_command(run))
    elif status == "collapsed":
        go_on = f"{resume_command(run)} runtime.stop_on_collapse=false"
        yield Todo("change the recipe as it says, which makes another run; or go on in spite of it", go_on)
    for checkpoint in damaged:
        yield Todo(f"{checkpoint.damage}; it is passed over when the run is resumed", "")
    if status != "running":
        yield from _mirror(run, status, state)
        yield from _evaluations(run, [c.name for c in checkpoints if not c.damage], status)


def _mirror(run: RunFolder, status: str, state: RunState) -> Iterator[Todo]:
    """What MLflow lacks."""
    if state.mirrored or not _section(run, "tracking").get("enabled", True):
        return
    yield Todo("MLflow does not show all of it", f"dinobench runs sync {shlex.quote(str(run.path))}")
    if status == "killed":
        output = shlex.quote(str(run.path.parent))
        yield Todo(
            "MLflow may show it as running, until it is resumed or closed", f"dinobench runs reap --output {output}"
        )


def _evaluations(run: RunFolder, whole: list[str], status: str) -> Iterator[Todo]:
    """The suites of the recipe of which a kept checkpoint has no result; an unfinished run gets them when it ends."""
    from dinobench.evaluate import Evaluation, missing
    from suites.suite import load_suite

    files = [path for path in run.kept_checkpoints() if path.name in whole]
    if status != "finished" or not files:
        return
    prototypes = _section(run, "head").get("num_prototypes")
    lacking = []
    for name in _section(run, "evaluation").get("suites", ()):
        try:
            suite = load_suite(name)
        except DinobenchError as error:
            yield Todo(f"its suite {name} is not there any more: {error}", "")
            continue
        if suite.needs_prototypes and not prototypes:
            continue
        try:
            if missing(files, [suite], Evaluation(run.path.parent)):
                lacking.append(name)
        except DinobenchError as error:
            yield Todo(f"a result cannot be read: {error}", "")
    if lacking:
        command = ["dinobench", "eval", str(run.path), "--suite", ",".join(lacking)]
        yield Todo(f"not all its checkpoints are evaluated on {', '.join(lacking)}", shlex.join(command))


def _section(run: RunFolder, name: str) -> dict[str, Any]:
    """A section of the stored recipe; empty where that is damaged."""
    try:
        section = run.recipe().get(name)
    except DinobenchError:
        return {}
    return section if isinstance(section, dict) else {}


def _last_written(run: RunFolder) -> float:
    """When a file of the run changed last, in seconds since 1970."""
    times = [0.0]
    for path in (run.journal.path, run.log_file, run.state_file, run.last_checkpoint):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times)
