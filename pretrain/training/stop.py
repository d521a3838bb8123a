"""Stopping on a signal or after a time, with a checkpoint."""

from __future__ import annotations

import math
import signal
import threading
from time import monotonic

import torch

from pretrain.training.runtime import Runtime, all_reduce_sum

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
"""Windows has the first two only."""


class StopSignal:
    """SIGTERM and SIGINT end the training after the current step and a checkpoint; a second SIGINT ends it at once.

    So do SIGUSR1 and SIGUSR2, which SLURM sends before the time of a job ends, SIGHUP of a terminal that closes (unless
    nohup has it ignored), and the first step that ends `max_minutes` or later after this object was made.
    """

    def __init__(self, runtime: Runtime, max_minutes: float | None = None):
        self.runtime, self.name = runtime, ""
        self._end = math.inf if max_minutes is None else monotonic() + 60 * max_minutes
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, synchronise: bool) -> bool:
        """Whether to stop now. Ranks must agree, so with several the question is settled at logging steps."""
        if not self.name and monotonic() >= self._end:
            self.name = "runtime.max_minutes"
        if self.runtime.world_size == 1:
            return bool(self.name)
        vote = torch.tensor(float(bool(self.name)), device=self.runtime.device)
        return synchronise and float(all_reduce_sum(vote)) > 0

    def _note(self, number: int, frame: object) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
