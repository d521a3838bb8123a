"""The checkpoints of a run: all that are kept, or each as it comes while the run goes on in another process.

What there is to know about the run is read from its folder, so the other process may be on another machine that shares
it. A run has ended when run.json says so, or when its process is gone: then nobody holds the lock of the folder.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dinobench.condition import resume_command
from dinobench.evaluate import Evaluation, Failure, Say, evaluate_all
from dinobench.results import Result
from dinobench.runs import RunFolder, describe_status
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    from suites.suite import Suite

POLL_SECONDS = 2.0
"""Between two looks into the folder."""
LINE_SECONDS = 30.0
"""Between two lines that say that nothing has come."""
SILENCE_SECONDS = 300.0
"""So long a run of another machine may write nothing and count as alive; training writes a line every few seconds."""


@dataclass
class Watched:
    """What a watch found until the run ended."""

    status: str
    """How the run ended: finished, interrupted, collapsed, failed or killed."""
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    advice: str = ""
    """For a run that is not finished: what to do."""


def watch(
    run: RunFolder,
    suites: Sequence[Suite],
    settings: Evaluation,
    say: Say,
    record: Callable[[Result], None] = lambda result: None,
) -> Watched:
    """Evaluate each kept checkpoint of a run once, until the run ends. Stopped and started again, it goes on.

    Args:
        record: gets every result, stored or new.
    """
    pulse, lines = Pulse(run), _Lines(run, say)
    watched = Watched("running")
    seen: set[tuple[str, int, int] | None] = set()
    try:
        while watched.status == "running":
            # read before the folder is listed: what an ended run has kept is there by then
            watched.status = pulse.status()
            marks = {path: _mark(path) for path in _kept(run, watched.status)}
            fresh = [path for path, mark in marks.items() if mark not in seen]
            seen.update(marks.values())
            results, failures = evaluate_all(fresh, suites, settings, say, record)
            watched.results += results
            watched.failures += _tell(failures, say)
            if watched.status == "running" and not fresh:
                lines.waiting(len(seen))
                time.sleep(POLL_SECONDS)
    except (KeyboardInterrupt, SystemExit):
        say(f"watch stopped: what was measured is kept in {run.path / 'evals'}; the same command goes on from there")
        raise
    watched.advice = _advice(run, watched.status)
    return watched


def evaluate_run(
    run: RunFolder, suites: Sequence[Suite], settings: Evaluation, say: Say, record: Callable[[Result], None]
) -> tuple[list[Result], list[Failure]]:
    """Evaluate the checkpoints that a run has kept so far, the oldest first.

    Raises:
        DinobenchError: it has none.
    """
    kept = _kept(run, describe_status(run))
    if not kept:
        raise DinobenchError(f"{run.path} has kept no checkpoint yet: add --watch to wait for those to come")
    results, failures = evaluate_all(kept, suites, settings, say, record)
    return results, _tell(failures, say)


class Pulse:
    """Tells whether a run goes on.

    The lock of its folder tells it on one machine. Some shared file systems do not show the locks of another machine:
    a run over there that we see no lock of counts as killed when its files have not changed for a while.
    """

    def __init__(self, run: RunFolder, *, silence: float = SILENCE_SECONDS):
        self.run, self._silence = run, silence
        self._files: list[tuple[str, int, int] | None] = []
        self._changed = time.monotonic()

    def status(self) -> str:
        """running, finished, interrupted, collapsed, failed or killed."""
        status = describe_status(self.run)
        if status == "killed":  # or it ended between the look at run.json and the look at the lock
            status = describe_status(self.run)
        if status != "killed" or self._host() == socket.gethostname():
            return status
        run = self.run
        files = [_mark(path) for path in (run.journal.path, run.log_file, run.state_file, run.last_checkpoint)]
        if files != self._files:
            self._files, self._changed = files, time.monotonic()
        return "killed" if time.monotonic() - self._changed >= self._silence else "running"

    def _host(self) -> str:
        return self.run.state().process.rpartition(":")[0]


class _Lines:
    """Says now and then that the watch is alive and how far the run is."""

    def __init__(self, run: RunFolder, say: Say):
        self.run, self._say = run, say
        self._last: float | None = None

    def waiting(self, checkpoints: int) -> None:
        if self._last is not None and time.monotonic() - self._last < LINE_SECONDS:
            return
        self._last = time.monotonic()
        last = self.run.journal.last()
        step = f"at step {last.step}" if last else "before its first step"
        self._say(f"watching {self.run.name}: {step}, {checkpoints} checkpoints evaluated, waiting for the next")


def _kept(run: RunFolder, status: str) -> list[Path]:
    """The kept checkpoints; last.pt, which stands in where there are none, only when nobody overwrites it any more."""
    return [path for path in run.kept_checkpoints() if status != "running" or path != run.last_checkpoint]


def _mark(path: Path) -> tuple[str, int, int] | None:
    """What tells one content of a file from another without reading it; None where there is no file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return path.name, state.st_mtime_ns, state.st_size


def _tell(failures: Sequence[Failure], say: Say) -> list[Failure]:
    """Say at once what was not measured; a checkpoint that the run removed before it was measured is no failure."""
    for failure in failures:
        gone = "" if failure.checkpoint.exists() else "the run removed it (checkpoint.keep) before it was measured: "
        say(f"{failure.suite} on {failure.checkpoint.name}: not measured: {gone}{failure.reason}")
    return [failure for failure in failures if failure.checkpoint.exists()]


def _advice(run: RunFolder, status: str) -> str:
    if status == "finished":
        return ""
    ended = "was killed: no process works on it any more" if status == "killed" else f"ended {status}"
    note = run.state().note
    return (
        f"{run.name} {ended}{f' ({note})' if note else ''}. Its kept checkpoints are evaluated; continue it with "
        f"`{resume_command(run)}` and start this watch again for those to come"
    )
