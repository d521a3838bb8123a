"""How long the steps of a training wait for their batches, and so what limits its speed.

On a CPU the host does the steps itself: what it spends in `next(batches)` is lost to them. To a GPU it only hands them,
and runs ahead. It may then stand in `next` while the device has work left, which costs nothing, or get at once a batch
whose views the device has yet to make. So there an event is recorded on the stream of the steps before `next` and one
after it: the time between the two is that in which the device had no step to do. Recording waits for nothing, and the
times are read when the metrics are, which has waited for everything before.

The first batch is not counted: the workers start for it, and a set that is cached is decoded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from time import monotonic

import torch

from pretrain.data.loader import Batch, Loader
from pretrain.training.runtime import all_reduce_max

BESIDE = 0.1
"""What runs beside the steps limits them once they wait for it in this share of the time: else they never would."""
IN_TURN = 0.5
"""What runs in turn with the steps limits them when it takes longer than they do."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of the time of a training: what its steps spent waiting for images to be decoded, and for views of them."""

    decoding: float = 0.0
    views: float = 0.0

    @property
    def waiting(self) -> float:
        return self.decoding + self.views


class BatchWaits:
    """Measures the waits of one rank."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._clock = _DeviceClock(loader.device) if loader.device.type == "cuda" else _HostClock()
        self._since: float | None = None
        self._decoded = 0.0
        self._seconds = torch.zeros(3)
        """Of the whole training: decoding, views, everything."""

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch."""
        if self._since is not None:
            return self._clock.measure(batches)
        batch = next(batches)
        self._since, self._decoded = monotonic(), self.loader.decode_seconds
        return batch

    def read(self) -> Shares:
        """The shares of the time since the last call. Of several ranks the one that waits longest counts, because the
        others wait for it. To be called where the host has waited for the steps before.
        """
        if self._since is None:
            return Shares()
        now, decoded = monotonic(), self.loader.decode_seconds
        waited = self._clock.read()
        # The host's waits for decoded images may lie beside steps; then the device waits less than the host.
        decoding = min(decoded - self._decoded, waited)
        found = torch.tensor([decoding, waited - decoding, now - self._since], device=self.loader.device)
        seconds = all_reduce_max(found).cpu()
        self._since, self._decoded = now, decoded
        self._seconds += seconds
        return _shares(seconds)

    def limit(self) -> str:
        """What limited the training, in a sentence with its share of the time; empty before the first reading."""
        if not self._seconds[2]:
            return ""
        shares, loader = _shares(self._seconds), self.loader
        on_gpu = loader.device.type == "cuda"
        stages = [
            (shares.decoding, BESIDE if loader.workers or on_gpu else IN_TURN, f"data loading ({{}}){_advice(loader)}"),
            (shares.views, BESIDE if on_gpu else IN_TURN, "making the views ({})"),
        ]
        share, text = max([(share, text) for share, least, text in stages if share >= least], default=(0.0, ""))
        if share:
            return "limited by: " + text.format(f"{_percent(share)} of the time spent waiting")
        steps, waiting = _percent(1 - shares.waiting), _percent(shares.waiting)
        return f"limited by: the training step ({steps} of the time, {waiting} spent waiting for data)"


class _HostClock:
    """The host's time in `next`."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def measure(self, batches: Iterator[Batch]) -> Batch:
        asked = monotonic()
        batch = next(batches)
        self._seconds += monotonic() - asked
        return batch

    def read(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _DeviceClock:
    """The time in which the current stream of a GPU waits for what `next` gives."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def measure(self, batches: Iterator[Batch]) -> Batch:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        before.record(stream)
        batch = next(batches)
        after.record(stream)
        self._events.append((before, after))
        return batch

    def read(self) -> float:
        """Seconds since the last call; the host has waited for the stream."""
        milliseconds = sum(before.elapsed_time(after) for before, after in self._events)
        self._events.clear()
        return milliseconds / 1000


def _shares(seconds: torch.Tensor) -> Shares:
    decoding, views, whole = seconds.tolist()
    return Shares(decoding / whole, views / whole) if whole else Shares()


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _advice(loader: Loader) -> str:
    """Settings that decode faster and change no view; empty where there is none left to try."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = cores // loader.world_size
    tried = [f"runtime.workers={min(most, max(2 * loader.workers, 2))}"] if loader.workers < most else []
    if loader.views.backend == "batched" and not loader.in_memory:
        tried.append("data.cache=device")
    return f"; try {' or '.join(tried)}" if tried else ""
