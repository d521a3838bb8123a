"""Times of contestants that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping

import torch

from apart import Apart


@dataclasses.dataclass
class Times:
    """Seconds per unit of work, one entry per round. CPU time sums over threads; on a GPU wall time counts."""

    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)
    device: list[float] = dataclasses.field(default_factory=list)
    """Between two CUDA events around the work; empty without a GPU."""
    host: list[float] = dataclasses.field(default_factory=list)
    """Until the host had handed all of it to the GPU: near `wall` where the launches are what takes the time."""
    clock_mhz: list[int] = dataclasses.field(default_factory=list)
    """SM clock before and after each round, where nvidia-smi tells."""

    def summary(self) -> dict[str, dict[str, float]]:
        clocks = {name: getattr(self, name) for name in ("cpu", "wall", "device", "host", "clock_mhz")}
        return {name: spread(values) for name, values in clocks.items() if values}


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    units: int,
    warm: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Times]:
    """Run every contestant once unmeasured, then `rounds` times in turn; each call does `units` units of work.

    `warm` names work done unmeasured before every turn instead: memory that the others took comes back there.
    """
    times = {name: Times() for name in contestants}
    for run in () if warm else contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            if warm:
                warm[name]()
            _time(run, times[name], units)
    return times


def _time(run: Callable[[], object], times: Times, units: int) -> None:
    if isinstance(run, Apart):
        cpu, wall = run()
        times.cpu.append(cpu / units)
        times.wall.append(wall / units)
        return
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        times.clock_mhz += sm_clock()
        torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else (None, None)
    cpu, wall = time.process_time(), time.perf_counter()
    if start:
        start.record()
    run()
    if end:
        end.record()
        times.host.append((time.perf_counter() - wall) / units)
        torch.cuda.synchronize()
    times.wall.append((time.perf_counter() - wall) / units)
    times.cpu.append((time.process_time() - cpu) / units)
    if start and end:
        times.device.append(start.elapsed_time(end) / 1e3 / units)
        times.clock_mhz += sm_clock()


def ratio(slow: Times, fast: Times, clock: str) -> dict[str, float]:
    """How many times faster `fast` is: the spread of the ratios within each round."""
    return spread([a / b for a, b in zip(getattr(slow, clock), getattr(fast, clock), strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def sm_clock() -> list[int]:
    """The present clock of the GPU's processors in MHz, or nothing where it cannot be read. Changes no setting."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    clocks, mine = done.stdout.split(), torch.cuda.current_device()
    return [int(clocks[mine])] if mine < len(clocks) and clocks[mine].isdigit() else []
