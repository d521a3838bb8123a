"""Where the time of a training step goes: stage by stage, and which operators (on a GPU kernels) take most of it.

A stage's time is that between its first and last instruction, less the stages within it, so that all of them sum to the
step. On a GPU the marks are CUDA events: what counts is when the device gets there, not when the host does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import torch

from counts import on_gpu, profiled
from noise import noise_set
from pretrain.methods.dino import Dino
from pretrain.training import optim
from pretrain.training.trainer import Trainer
from report import Entry, Report
from session import Session
from sizes import Size
from step import OurTraining

VIEWS, OTHER = "data and views", "other"
STAGES = (
    VIEWS, "teacher forward", "student forward", "targets and centre", "loss", "backward", "clipping", "optimiser",
    "teacher update", "health", OTHER,
)  # fmt: skip
TOP_OPERATORS = 15
NUM_BATCHES = 4
"""In the set of images."""


class Stopwatch:
    """Gives the time between two marks to the stage that was on."""

    def __init__(self, device: str):
        self.on_gpu = on_gpu(device)
        self._marks: list[tuple[str, Any]] = []
        """(what was on until this mark, the mark)."""
        self._on: list[str] = [OTHER]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time inside belongs to the stage, less that of stages within."""
        self._mark()
        self._on.append(name)
        try:
            yield
        finally:
            self._mark()
            self._on.pop()

    def wrap(self, owner: Any, function: str, stage: str) -> None:
        """Let the calls of a method of one object belong to a stage."""
        owner.__dict__[function] = self.within(stage, getattr(owner, function))

    def within(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls in a stage."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return function(*args, **kwargs)

        return call

    def read(self) -> Counter[str]:
        """Seconds of each stage since the last call; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: Counter[str] = Counter()
        for (_, start), (stage, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[stage] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
        self._marks.clear()
        return seconds

    def _mark(self) -> None:
        mark: Any = time.perf_counter()
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((self._on[-1], mark))


@dataclasses.dataclass(frozen=True)
class StageRow(Entry):
    """The stages of one step."""

    HEAD: ClassVar = ("setting", "stage", "ms per step", "share")
    bench: ClassVar = "profile"

    setting: dict[str, Any]
    """With `coverage`, the share of the step that has a name, and `ms_unwatched`, of a step without marks."""
    seconds: dict[str, float]
    """Stage -> median over the steps."""

    def to_dict(self) -> dict[str, Any]:
        return {"bench": self.bench, "setting": self.setting, "seconds": self.seconds}

    def lines(self) -> list[list[str]]:
        whole = sum(self.seconds.values())
        stages = {**self.seconds, "sum": whole}
        return [
            [self.described(), stage, f"{seconds * 1e3:.4g}", f"{100 * seconds / whole:.1f} %"]
            for stage, seconds in stages.items()
        ]


@dataclasses.dataclass(frozen=True)
class OperatorRow(Entry):
    """The operators of one step that take most time themselves."""

    HEAD: ClassVar = ("setting", "operator", "calls per step", "ms per step", "share")
    bench: ClassVar = "operators"

    setting: dict[str, Any]
    operators: list[dict[str, Any]]
    """Largest first: name, calls, seconds, share of all operators."""

    def to_dict(self) -> dict[str, Any]:
        return {"bench": self.bench, "setting": self.setting, "operators": self.operators}

    def lines(self) -> list[list[str]]:
        return [
            [
                self.described(),
                found["name"],
                str(found["calls"]),
                f"{found['seconds'] * 1e3:.4g}",
                f"{100 * found['share']:.1f} %",
            ]
            for found in self.operators
        ]


def run(session: Session) -> None:
    """The step as it is fastest here, at the first size; with both precisions where both are asked for."""
    name, size, batch = session.sizes()[0]
    for precision in session.precisions:
        measure(
            session.report,
            name=name,
            size=size,
            batch=batch,
            precision=precision,
            device=session.device,
            compile=session.options.compile and session.on_gpu,
            steps=max(session.rounds * session.steps, 2),
        )


def measure(
    report: Report, *, name: str, size: Size, batch: int, precision: str, device: str, compile: bool, steps: int
) -> None:
    """Both tables for one size."""
    recipe = size.recipe(batch, device, precision, [f"runtime.compile={str(compile).lower()}"])
    torch.compiler.reset()
    training = OurTraining(recipe, noise_set(NUM_BATCHES * batch, recipe.data.resize or recipe.views.global_size))
    training.steps(2)
    setting = {
        "size": name,
        "batch": batch,
        "K": recipe.head.num_prototypes,
        "precision": precision,
        "compiled": compile,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    rest = {"ms_unwatched": round(1e3 * _seconds(training, steps, device), 2)}
    operators = _operators(training, device)
    seconds = _stages(training, steps, device)
    rest["coverage"] = round(1 - seconds[OTHER] / sum(seconds.values()), 4)
    report.add(StageRow({**setting, **rest}, seconds))
    report.add(OperatorRow(setting, operators))


def _seconds(training: OurTraining, steps: int, device: str) -> float:
    """Median time of a step without marks."""
    watch, found = Stopwatch(device), []
    for _ in range(steps):
        with watch.stage("step"):
            training.steps(1)
        found.append(watch.read()["step"])
    return statistics.median(found)


def _stages(training: OurTraining, steps: int, device: str) -> dict[str, float]:
    """Median time of each stage over the steps."""
    watch = Stopwatch(device)
    batches = training.batches
    found = []
    with watched(training.trainer, watch):
        for _ in range(steps):
            with watch.stage(VIEWS):
                batch = next(batches)
            with watch.stage(OTHER):
                training.step(batch)
            found.append(watch.read())
    return {stage: statistics.median(seconds[stage] for seconds in found) for stage in STAGES}


@contextlib.contextmanager
def watched(trainer: Trainer, watch: Stopwatch) -> Iterator[None]:
    """Inside, the parts of a step of this trainer are stages. Its objects stay wrapped: use it for nothing else."""
    method = trainer.method
    assert isinstance(method, Dino)
    for owner, function, stage in (
        (method, "teacher_outputs", "teacher forward"),
        (method, "student_outputs", "student forward"),
        (method, "parts", "loss"),
        (method, "image_targets", "targets and centre"),
        (method.target, "update", "targets and centre"),
        (method, "after_step", "teacher update"),
        (method.health, "observe", "health"),
        (method.health, "observe_metrics", "health"),
        (method.health, "observe_loss", "health"),
        (trainer.optimizer, "zero_grad", "optimiser"),
        (trainer.optimizer, "step", "optimiser"),
    ):
        watch.wrap(owner, function, stage)
    with (
        mock.patch.object(torch.Tensor, "backward", watch.within("backward", torch.Tensor.backward)),
        mock.patch.object(optim, "clip", watch.within("clipping", optim.clip)),
    ):
        yield


def _operators(training: OurTraining, device: str) -> list[dict[str, Any]]:
    """The operators, on a GPU the kernels, of one step with most time of their own."""
    wanted = torch.autograd.DeviceType.CUDA if on_gpu(device) else torch.autograd.DeviceType.CPU
    found: dict[str, tuple[int, float]] = {}
    for event in profiled(lambda: training.steps(1), device).key_averages():
        if event.device_type == wanted and not event.is_user_annotation:
            time_us = event.self_device_time_total if on_gpu(device) else event.self_cpu_time_total
            found[event.key] = (event.count, time_us / 1e6)
    whole = sum(seconds for _, seconds in found.values())
    largest = sorted(found.items(), key=lambda item: -item[1][1])[:TOP_OPERATORS]
    return [
        {"name": _short(name), "calls": calls, "seconds": seconds, "share": seconds / whole}
        for name, (calls, seconds) in largest
    ]


def _short(name: str, length: int = 80) -> str:
    """A name that fits in a cell of a Markdown table: kernels are C++ templates."""
    name = name.replace("|", "/")
    return name if len(name) <= length else name[: length - 3] + "..."
