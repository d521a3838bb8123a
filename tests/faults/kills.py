"""Starting commands and killing them: cold, or through the fork server, at a moment told by the files they write.

A moment is a signal, an event (`open .../.last.pt.tmp`), how many such events are let pass, and a delay. What the
process was doing when the signal was sent is read from the events before it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import psutil

from breaking import DINOBENCH

SERVER = Path(__file__).with_name("kills_server.py")
SECONDS = 600.0
"""A command that has not ended by then hangs."""
ORPHAN_SECONDS = 180.0
"""For the workers of a killed process to write their checkpoint and end."""
LATE_EVENTS = 30
"""A command that is told to stop touches fewer files after that."""
HOOK = """
import sys
sys.path.append({folder!r})
import kills_server
sys.path.pop()
kills_server.tell_events({events!r})
"""

Event = tuple[float, str]
"""When, in monotonic seconds, and what: `open /a/path`."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to send which signal."""

    signal: signal.Signals
    event: str
    """Pattern of the event that it comes after."""
    skip: int
    """So many events of the kind are let pass first."""
    delay: float
    """Seconds between the event and the signal."""
    worker: bool = False
    """Whether it is a worker of the process that gets the signal."""


@dataclasses.dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int
    out: str
    err: str
    events: list[Event]
    killed: float | None
    """When the signal was sent; None where the command ended before."""

    @property
    def is_late(self) -> bool:
        """Whether the command had done its work when the signal came, and ended well; else it did not obey."""
        assert self.killed is not None
        after = [event for seconds, event in self.events if seconds > self.killed]
        assert self.code != 0 or len(after) < LATE_EVENTS, f"the signal was ignored; after it came {after}"
        return self.code == 0

    @property
    def doing(self) -> str:
        """What it was doing when the signal was sent."""
        assert self.killed is not None
        return phase([event for event in self.events if event[0] <= self.killed])


class Starter(Protocol):
    """Starts a command and waits for its end."""

    def start(self, arguments: list[str], folder: Path, environment: dict[str, str], events: Path) -> int: ...

    def ended(self, seconds: float) -> int | None:
        """The exit code, or None when it has not ended after so many seconds."""
        ...


class ForkServer:
    """See kills_server.py."""

    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._answer(SECONDS) == {"ready": True}

    def start(self, arguments: list[str], folder: Path, environment: dict[str, str], events: Path) -> int:
        files = {"out": str(folder / "out"), "err": str(folder / "err"), "events": str(events)}
        request = {"arguments": arguments, "folder": str(folder), "environment": environment, **files}
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(request) + "\n").encode())
        self.process.stdin.flush()
        answer = self._answer(SECONDS)
        assert answer is not None, "the fork server does not answer"
        return answer["process"]

    def ended(self, seconds: float) -> int | None:
        answer = self._answer(seconds)
        return None if answer is None else answer["exit"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(SECONDS)

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        line = b""
        while not line.endswith(b"\n"):  # not readline: it would read ahead, where select sees nothing
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, f"the fork server has ended ({self.process.wait()})"
            line += byte
        return json.loads(line)


class Cold:
    """A new interpreter for every command. It and its workers tell about their files through Python's sitecustomize."""

    def start(self, arguments: list[str], folder: Path, environment: dict[str, str], events: Path) -> int:
        hook = folder / "hook" / "sitecustomize.py"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(HOOK.format(folder=str(SERVER.parent), events=str(events)))
        path = os.pathsep.join(filter(None, (str(hook.parent), environment.get("PYTHONPATH"))))
        with (folder / "out").open("ab") as out, (folder / "err").open("ab") as err:
            self.process = subprocess.Popen(
                [*DINOBENCH, *arguments],
                cwd=folder,
                env={**environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return self.process.pid

    def ended(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def run(
    starter: Starter, arguments: list[str], folder: Path, environment: dict[str, str], moment: Moment | None = None
) -> End:
    """Run a command to its end, or to the moment when it is killed."""
    for name in ("out", "err"):
        (folder / name).unlink(missing_ok=True)
    pipe = folder / "events"
    if not pipe.exists():
        os.mkfifo(pipe)
    reader = _Events(pipe)
    process = starter.start(arguments, folder, environment, pipe)
    killed, code, deadline = None, None, time.monotonic() + SECONDS
    while code is None:
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            raise AssertionError(f"{arguments} hangs; it said: {(folder / 'err').read_text()[-2000:]}")
        reader.read()
        if moment is not None and killed is None:
            begun = reader.nth(moment.event, moment.skip)
            if begun is not None and time.monotonic() >= begun + moment.delay:
                killed = _send(process, moment)
                continue
            wait = 0.0005 if begun is not None else 0.005
        else:
            wait = 0.05
        code = starter.ended(wait)
    _wait_for_workers(process)
    reader.read()
    reader.close()
    return End(code, (folder / "out").read_text(), (folder / "err").read_text(), reader.events, killed)


def phase(events: list[Event]) -> str:
    """What a process that has told these events is doing."""
    doing = "starting"
    for _, event in events:
        for name, begin, end in SPANS:
            if re.search(begin, event):
                doing = name
            elif doing == name and end and re.search(end, event):
                doing = "training" if name == "checkpointing" else "evaluation" if name == "caching" else "finishing"
    return doing


SPANS = (
    ("training", r"open .*/metrics\.jsonl$", r"os\.rename .*/run\.json$"),
    ("checkpointing", r"open .*/checkpoints/\.[^/]*\.tmp$", r"os\.rename .*/checkpoints/(last|step=\d+)\.pt$"),
    ("evaluation", r"open .*/evals/.*\.lock$", r"os\.rename .*/evals/.*\.json$"),
    ("caching", r"open .*/(features|scores)/../\.writing-", r"os\.(rename|remove) .*/(features|scores)/../"),
)
"""Phase, the event that begins it and the one that ends it. A part of another phase comes after that."""


def duration(events: list[Event], name: str) -> float:
    """Mean seconds of a phase, from its first event to the end, in a run that nothing interrupted."""
    _, begin, end = next(span for span in SPANS if span[0] == name)
    if name == "training":  # between two points of the journal
        end = begin
    started, lasted = None, []
    for moment, event in events:
        if started is not None and re.search(end, event):
            lasted.append(moment - started)
            started = None
        if started is None and re.search(begin, event):
            started = moment
    return sum(lasted) / len(lasted)


class _Events:
    """The pipe through which a process tells about its files."""

    def __init__(self, pipe: Path):
        self.events: list[Event] = []
        self._descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._rest = b""

    def read(self) -> None:
        while True:
            try:
                block = os.read(self._descriptor, 65536)
            except BlockingIOError:
                break
            if not block:
                break
            *lines, self._rest = (self._rest + block).split(b"\n")
            for line in lines:
                seconds, _, event = line.decode().partition(" ")
                self.events.append((float(seconds), event))

    def nth(self, pattern: str, skip: int) -> float | None:
        """When the event after `skip` of its kind happened."""
        found = [moment for moment, event in self.events if re.search(pattern, event)]
        return found[skip] if len(found) > skip else None

    def close(self) -> None:
        os.close(self._descriptor)


def _send(process: int, moment: Moment) -> float | None:
    """When the signal was sent; None when there is nobody any more."""
    try:
        children = psutil.Process(process).children() if moment.worker else []
        workers = [child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        now = time.monotonic()
        os.kill(workers[0] if workers else process, moment.signal)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None
    return now


def _wait_for_workers(process: int) -> None:
    """Until all that a process started have ended."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := _group(process):
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            raise AssertionError(f"{left} go on though the process that started them has ended")
        time.sleep(0.05)


def _group(leader: int) -> list[str]:
    """The living processes of a session."""
    found = []
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == leader and other.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{other.pid} {other.name()}")
        except (OSError, psutil.Error):
            continue
    return found
