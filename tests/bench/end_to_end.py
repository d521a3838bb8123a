"""From JPEG files to the finished step: the project's loader and views feeding the step, against the official pipeline.

Files are made on the spot (noise.py), in memory where the machine has a file system there. A turn starts its workers
anew, runs until what they prepared while the step was warming up is used, and is then measured for some seconds, so
that no contestant lives on what was decoded during another's turn. Beside the whole, our loader and our step are
measured alone: the slower one is what limits the training.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import torch

from ceilings import Ceilings
from counts import on_gpu
from flops import per_image
from noise import write_jpegs
from official import OfficialTraining, Reference
from pretrain.data.loader import Batch
from pretrain.training.loop import create_loader
from pretrain.training.recipe import Recipe
from pretrain.training.runtime import Runtime
from rates import Measured, RateRow
from report import Report
from session import Session
from sizes import SIZES, Size, random_batches
from step import OurStep, Setting
from throughput import gates, official
from timing import Times

MEMORY_FOLDER = Path("/dev/shm")
BYTES_PER_FILE = 150_000
"""At most."""
PIL = ("views.backend=pil", "data.resize=null")
"""The official pipeline in our code: views of each image with PIL, from its full size."""

Steps = Generator[object, None, None]
Turn = Callable[[], Steps]
"""Starts a training; each item taken from it is a finished step (which the device may still be working on)."""


def run(session: Session) -> None:
    """Every network at its first batch."""
    for name in session.options.size:
        measure(
            session.report,
            name=name,
            size=SIZES[name],
            batch=session.batches(name)[0],
            precision=session.precisions[0],
            device=session.device,
            compile=session.options.compile and session.on_gpu,
            reference=session.reference,
            ceilings=session.ceilings,
            num_files=16 if session.tiny else 2048 if session.on_gpu else 256,
            workers=session.options.workers,
            seconds=session.options.seconds,
            warm_seconds=10.0 if session.on_gpu else 0.0,
            rounds=1 if session.on_gpu else min(session.rounds, 3),
        )


def measure(
    report: Report,
    *,
    name: str,
    size: Size,
    batch: int,
    precision: str,
    device: str,
    compile: bool,
    reference: Reference | None,
    ceilings: Ceilings,
    num_files: int,
    workers: int,
    seconds: float,
    warm_seconds: float,
    rounds: int,
) -> None:
    """One row."""
    with tempfile.TemporaryDirectory(dir=_memory_folder(num_files)) as folder:
        files = write_jpegs(Path(folder) / "train" / "noise", num_files)
        data = (f"data.name=folder:{folder}", f"runtime.workers={workers}")
        recipe = size.recipe(batch, device, precision, [*data, f"runtime.compile={str(compile).lower()}"])
        turns: dict[str, Turn] = {}
        gate: dict[str, dict[str, float]] = {}
        if reference:
            low = "fp16" if on_gpu(device) and precision == "bf16" else None
            gate, unequal = gates(size, device, precision, {"": official(size, device, reference, low=low)})[""]
            if unequal:
                raise SystemExit(unequal)
            setting = Setting.of(recipe, low or precision)
            turns["official"] = partial(_train_official, OfficialTraining(reference, setting, files, 0.1, workers))
        else:
            pil = size.recipe(batch, device, precision, [*data, *PIL])
            turns["ours, views with PIL"] = partial(_train, OurStep(pil), pil)
        ours = OurStep(recipe)
        turns["ours"] = partial(_train, ours, recipe)
        turns["our loader alone"] = partial(_load, recipe)
        turns["our step alone"] = partial(_step, ours, random_batches(recipe, device))
        found = {turn: Measured() for turn in turns}
        opponent, *_ = found
        found[opponent].gate = gate
        for trained in (opponent, "ours"):
            found[trained].ceiling = ceilings.of(precision)
        drain = 2 * max(workers, 1) + 1  # batches that workers hold ready
        for _, (turn, start) in itertools.product(range(rounds), turns.items()):
            _time(start, found[turn].times, drain, warm_seconds, seconds, device)
        megabytes = sum(file.stat().st_size for file in files) / len(files) / 1e6
    loader, step = (found[f"our {part} alone"].times.summary()["wall"]["median"] for part in ("loader", "step"))
    described = {
        "size": name,
        "batch": batch,
        "files": f"{num_files} of {megabytes:.3f} MB",
        "precision": precision,
        "GFLOP": round(per_image(recipe) / 1e9, 4),
        "workers": workers,
        "cores": os.cpu_count(),
        "limited_by": "loader" if loader > step else "step",
        "threads": torch.get_num_threads(),
        "device": device,
    }
    report.add(RateRow("end_to_end", described, found))


def _memory_folder(num_files: int) -> Path | None:
    """The file system in memory, where it has room for the files and for what workers send; else None."""
    if MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > 8 * num_files * BYTES_PER_FILE:
        return MEMORY_FOLDER
    return None


def _train(ours: OurStep, recipe: Recipe) -> Steps:
    for batch in create_loader(recipe, ours.trainer.runtime).batches():
        yield ours.step(batch)


def _train_official(training: OfficialTraining) -> Steps:
    for views in training.batches():
        yield training.update(views)


def _load(recipe: Recipe) -> Steps:
    yield from create_loader(recipe, Runtime.start(recipe.runtime)).batches()


def _step(ours: OurStep, batches: list[Batch]) -> Steps:
    for batch in itertools.cycle(batches):
        yield ours.step(batch)


def _time(start: Turn, times: Times, drain: int, warm_seconds: float, seconds: float, device: str) -> None:
    """Seconds per step of one turn, two steps at least."""
    steps = start()
    _run(steps, drain, warm_seconds, device)
    before = time.perf_counter()
    count = _run(steps, 2, seconds, device)
    times.wall.append((time.perf_counter() - before) / count)
    steps.close()  # ends the workers


def _run(steps: Steps, at_least: int, seconds: float, device: str) -> int:
    """Take steps for some seconds; returns how many."""
    end = time.perf_counter() + seconds
    for count in itertools.count(1):
        next(steps)
        if count >= at_least and time.perf_counter() >= end:
            if on_gpu(device):
                torch.cuda.synchronize()
            return count
    raise AssertionError("counting has no end")
