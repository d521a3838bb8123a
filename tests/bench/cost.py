"""What training steps cost beside each other: time in turns, peak memory, and the check that they do the same.

Peak memory is the largest sum of bytes that torch's allocator had handed out at one moment, from before the networks
were made to the end of the last step: parameters, optimiser, activations and temporaries. On a GPU it is
`torch.cuda.max_memory_allocated`, on a CPU the same sum taken from the profiler's record of every allocation. It is
exact and repeatable, and leaves out the code of libraries and what the heap keeps for reuse (unlike resident memory).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from pretrain.data.loader import Batch
from report import CostRow, Report
from step import OurTraining, Setting
from timing import take_turns

MEMORY_STEPS = 3
"""From the second step on the optimiser holds its moments; masks differ a little from step to step."""
TOLERANCE = 1e-6
"""Largest relative difference of loss and gradients in float64; the weights 1 / (masked patches) are float32."""


def compare(
    report: Report,
    bench: str,
    builders: Mapping[str, Callable[[], OurTraining]],
    *,
    setting: Setting,
    described: dict[str, Any],
    gate: dict[str, float],
    rounds: int,
    units: int,
) -> None:
    """One row: every training against the first, memory of each alone and time in turns."""
    memory = {name: peak_mebibytes(partial(_few_steps, build), setting.device) for name, build in builders.items()}
    trainings = {name: build() for name, build in builders.items()}
    times = take_turns({name: partial(t.steps, units) for name, t in trainings.items()}, rounds=rounds, units=units)
    setting_columns = {
        "K": setting.prototypes,
        "batch": setting.batch,
        "crops": f"2x{setting.global_size}+{setting.num_local}x{setting.local_size}",
        **described,
        "precision": setting.precision,
        "threads": torch.get_num_threads(),
        "device": setting.device,
    }
    report.add(CostRow(bench, setting_columns, "step", times, gate, {}, images=setting.batch, memory=memory))


def peak_mebibytes(work: Callable[[], object], device: str) -> float:
    """Most memory that `work` held at one moment beyond what was held before, MiB."""
    gc.collect()
    if device != "cpu":
        work()  # the workspaces of the CUDA libraries come at first use and stay
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(use_kineto=True, profile_memory=True) as recorded:
        work()
    assert recorded.kineto_results is not None
    changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
    return held.cumsum(0).max().item() / 2**20


def differences(expected: OurTraining, found: OurTraining, batches: tuple[Batch, Batch]) -> dict[str, float]:
    """One step of each on its batch: relative differences of the loss and, tensor by tensor, of the gradients.

    Raises:
        SystemExit: they differ; then no time is worth printing.
    """
    weights = expected.method.student.state_dict()
    found.method.student.load_state_dict({**found.method.student.state_dict(), **weights})
    found.method.teacher.load_state_dict(expected.method.teacher.state_dict())
    for training, batch in zip((expected, found), batches, strict=True):
        training.trainer.step(batch, 0)
    losses = [training.method.health.sum_loss for training in (expected, found)]
    differing = {
        "loss_difference": relative([(losses[0], losses[1])]),
        "gradient_difference": relative(_gradients(expected, found)),
    }
    if not all(value <= TOLERANCE for value in differing.values()):  # also where one is NaN
        raise SystemExit(f"the steps are not the same, nothing was timed: {differing}")
    return differing


def relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Largest difference of a pair, as a part of its largest value."""
    parts = [(a - b).abs().max() / a.abs().max().clamp_min(1e-12) for a, b in pairs]
    return torch.stack(parts).max().item()


def _gradients(expected: OurTraining, found: OurTraining) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of every parameter that `expected` trains."""
    others = dict(found.method.student.named_parameters())
    for name, parameter in expected.method.student.named_parameters():
        if parameter.grad is not None:
            gradient = others[name].grad
            if gradient is None:
                raise SystemExit(f"{name} gets a gradient on one side only, nothing was timed")
            yield parameter.grad, gradient


def _few_steps(build: Callable[[], OurTraining]) -> None:
    build().steps(MEMORY_STEPS)
