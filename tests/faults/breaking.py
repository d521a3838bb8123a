"""Ways to break a machine for the length of a block, and a training small enough to be broken often."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import dinobench.train
from dinobench.reporter import Reporter
from dinobench.runs import RunFolder, find_run
from dinobench.train import Request, Summary, pretrain
from pretrain.training.loop import Outcome, train
from pretrain.training.recipe import Recipe, resolve

NOBODY = 65534
DINOBENCH = (sys.executable, "-c", "from dinobench.cli.app import main; main()")
TINY = (
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "schedule.steps_per_epoch=5",
    "optim.batch_size=16",
    "head.hidden=16",
    "head.bottleneck=16",
    "head.num_prototypes=16",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "runtime.device=cpu",
    "runtime.log_every=2",
    "checkpoint.every_epochs=1",
    "checkpoint.every_steps=0",
)
QUIET = ("tracking.enabled=false", "evaluation.suites=[]")
"""Nothing but the training."""


def tiny(*overrides: str, data: str | None = None) -> Recipe:
    """Ten steps of DINO on digits, two checkpoints."""
    return resolve("dino", preset="digits", data=data, overrides=[*TINY, *overrides])


def run_of(recipe: Recipe, output: Path) -> RunFolder:
    """A run folder just made."""
    run = find_run(recipe, output)
    run.create(recipe)
    return run


class Listener(Reporter):
    """Keeps what a run says, and calls a function after every step."""

    def __init__(self, after_step: Callable[[int], None] = lambda step: None):
        super().__init__(silent=True)
        self.said: list[str] = []
        self._after_step = after_step

    def say(self, text: str) -> None:
        self.said.append(text)
        super().say(text)

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")
        super().warn(text)

    def progress(self, progress: Any) -> None:
        super().progress(progress)
        self._after_step(progress.step)

    def warned(self, text: str) -> bool:
        """Whether a warning holds this text."""
        return any(line.startswith("warning:") and text in line for line in self.said)


def start(
    recipe: Recipe,
    output: Path,
    listener: Reporter | None = None,
    *,
    resume: bool = False,
    new: bool = False,
    figures: bool = False,
) -> Summary:
    """The whole of `dinobench pretrain`, in this process; without the figures, which take longer than the rest."""
    request = Request(output, "dinobench pretrain dino", resume, new)
    draw = dinobench.train.draw_figures if figures else lambda run: None
    with mock.patch.object(dinobench.train, "draw_figures", draw):
        summary = pretrain(recipe, request, listener or Reporter(silent=True))
    assert summary is not None
    return summary


def until(recipe: Recipe, folder: Path, step: int) -> Outcome:
    """Train in a folder up to a step, as a signal would end it there."""
    import signal

    def progress(state: Any) -> None:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return train(recipe, folder=folder, progress=progress)


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run([*DINOBENCH, *map(str, arguments)], check=False, **options)


@contextlib.contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: a write fails part-way, as on a full disk (EFBIG in place of ENOSPC)."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights on what others own; as ourselves where we are no superuser."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def read_only(folder: Path) -> None:
    """Take away the right to write below a folder; everybody may still read it, and reach it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of its own at a folder; gives a function that mounts it again with other options, like `size=8m`."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a disk here: {mounted.stderr.strip()}")

    def again(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, capture_output=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def read_only_disk(folder: Path) -> Iterator[None]:
    """What lies at a folder becomes a read-only disk; open files stay open."""

    def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)

    bound = mount("--bind", str(folder))
    if bound.returncode:
        pytest.skip(f"no right to mount a disk here: {bound.stderr.strip()}")
    try:
        mount("-o", "remount,bind,ro").check_returncode()
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def leftovers(folder: Path) -> list[str]:
    """Unfinished files that a write left behind."""
    names = (path.name for path in folder.rglob(".*") if path.is_file())
    return sorted(name for name in names if any(sign in name for sign in (".tmp", ".spare", ".writing-")))
