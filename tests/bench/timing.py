"""Times of contestants that take turns in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch


@dataclasses.dataclass
class Times:
    """Seconds per unit of work, one entry per round. CPU time sums over threads; on a GPU wall time counts."""

    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: _spread(values) for name, values in (("cpu", self.cpu), ("wall", self.wall))}


def take_turns(contestants: Mapping[str, Callable[[], object]], *, rounds: int, units: int) -> dict[str, Times]:
    """Run every contestant once unmeasured, then `rounds` times in turn; each call does `units` units of work."""
    times = {name: Times() for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            _wait_for_device()
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            _wait_for_device()
            times[name].wall.append((time.perf_counter() - wall) / units)
            times[name].cpu.append((time.process_time() - cpu) / units)
    return times


def ratio(slow: Times, fast: Times, clock: str) -> dict[str, float]:
    """How many times faster `fast` is: the spread of the ratios within each round."""
    return _spread([a / b for a, b in zip(getattr(slow, clock), getattr(fast, clock), strict=True)])


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
