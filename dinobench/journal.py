"""metrics.jsonl, the truth of a run: one line per logging interval. MLflow is a mirror of it.

    {"step": 100, "time": 1763700000.123, "metrics": {"loss/total": 4.9, ...}}

A value that is not finite is written as null: JSON has no NaN, and one such point ruins the axis of a chart.
"""

from __future__ import annotations

import json
import math
import operator
import os
import time
from dataclasses import dataclass
from pathlib import Path

from dinobench.files import not_writable, write_text
from pretrain.errors import DinobenchError

LAST_BYTES = 2**18
"""Some hundred lines: room for those that a kill cut short."""


@dataclass(frozen=True)
class Point:
    """The metrics of one training step; `time` in seconds since 1970."""

    step: int
    time: float
    metrics: dict[str, float]

    def finite(self) -> dict[str, float]:
        return {key: value for key, value in self.metrics.items() if math.isfinite(value)}

    def to_line(self) -> str:
        metrics = {key: value if math.isfinite(value) else None for key, value in self.metrics.items()}
        return json.dumps({"step": self.step, "time": round(self.time, 3), "metrics": metrics})


class Journal:
    """Appends points to metrics.jsonl and reads them back."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, metrics: dict[str, float], step: int) -> Point:
        """Write one point; it is on disk (but for a power cut) when this returns."""
        point = Point(step, time.time(), {key: float(value) for key, value in metrics.items()})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(point.to_line() + "\n")
        except OSError as error:
            raise not_writable(self.path, error) from error
        return point

    def read(self) -> list[Point]:
        """All whole lines, in order; one cut short by a kill or damaged later is left out."""
        points = [_parse(line) for line in self._lines()]
        return [point for point in points if point is not None]

    def last(self) -> Point | None:
        """The last whole line. Only the end is read: the file of a long run is large."""
        points = (_parse(line) for line in reversed(self._lines(LAST_BYTES)))
        return next((point for point in points if point is not None), None)

    def _lines(self, most: int | None = None) -> list[str]:
        """The lines in the last `most` bytes, or all."""
        try:
            with self.path.open("rb") as file:
                if most is not None:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - most))
                content = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DinobenchError(f"cannot read {self.path}: {error.strerror}") from error
        # only our own ends of lines: what lies in between may be anything
        return content.decode("utf-8", "replace").split("\n")

    def cut(self, step: int) -> None:
        """Drop what came after `step`: the steps that a resumed training does again."""
        kept = [point for point in self.read() if point.step <= step]
        write_text(self.path, "".join(point.to_line() + "\n" for point in kept))

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        points = [(point.step, point.metrics[key]) for point in self.read() if key in point.metrics]
        return [step for step, _ in points], [value for _, value in points]


def _parse(line: str) -> Point | None:
    """The point in a line; None where there is no whole one."""
    try:
        entry = json.loads(line)
        metrics = {key: math.nan if value is None else float(value) for key, value in entry["metrics"].items()}
        return Point(operator.index(entry["step"]), float(entry["time"]), metrics)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
