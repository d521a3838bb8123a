"""A contestant in a process of its own, as its users run it: neither what another has freed nor a setting of another's
allocator serves it. In one process our bf16 step at K = 65536 once looked twice as fast as it was.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

Work = Callable[[int], object]
"""Does so many units."""


class Apart:
    """Work built and done elsewhere.

    Args:
        build: called there with `arguments`, gives the work. Both are pickled.
        units: of work to a call; one more is done before them unmeasured, since another has had the caches meanwhile.
    """

    def __init__(self, build: Callable[..., Work], *arguments: object, units: int):
        self.units = units
        spawn = multiprocessing.get_context("spawn")
        begin = (torch.get_num_threads(), build, arguments)
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=begin)

    def __call__(self) -> tuple[float, float]:
        """Seconds of its CPU time and of wall time."""
        return self._pool.submit(_turn, self.units).result()

    def close(self) -> None:
        self._pool.shutdown()


_work: Work


def _begin(threads: int, build: Callable[..., Work], arguments: tuple[object, ...]) -> None:
    global _work
    torch.set_num_threads(threads)
    _work = build(*arguments)


def _turn(units: int) -> tuple[float, float]:
    _work(1)
    cpu, wall = time.process_time(), time.perf_counter()
    _work(units)
    return time.process_time() - cpu, time.perf_counter() - wall
