"""A row of images per second: how near to the machine's limit each contestant trains, and at what cost."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from flops import mfu
from report import Entry
from timing import Times, ratio, spread


@dataclasses.dataclass
class Measured:
    """What was found of one contestant; a field stays empty where it does not apply or could not be had."""

    times: Times = dataclasses.field(default_factory=Times)
    gate: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Precision -> how equal its step is to the trusted one."""
    mebibytes: float | None = None
    syncs: int | None = None
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    ceiling: float | None = None
    """FLOP per second of the matrix product in its precision."""
    remark: str = ""
    """Why there is no time, where there is none."""


@dataclasses.dataclass(frozen=True)
class RateRow(Entry):
    """One comparison at one size; the first contestant that was timed is what the others are compared with."""

    HEAD: ClassVar = (
        "bench", "setting", "contestant", "images per second (range)", "times the first (range)", "MFU",
        "ms per step", "of them host", "peak memory", "syncs", "launches", "calls", "remark",
    )  # fmt: skip
    bench: str
    setting: dict[str, Any]
    """With `batch`, the images of a step, and `GFLOP`, of an image."""
    contestants: dict[str, Measured]

    @property
    def timed(self) -> dict[str, Measured]:
        return {name: found for name, found in self.contestants.items() if found.times.wall}

    def rates(self, name: str) -> dict[str, float]:
        """Images per second: median and range over the rounds."""
        return spread([self.setting["batch"] / seconds for seconds in self.contestants[name].times.wall])

    def mfu(self, name: str) -> float | None:
        """Share of the ceiling, or None where it was not measured."""
        found = self.contestants[name]
        if not (found.ceiling and found.times.wall):
            return None
        return mfu(self.rates(name)["median"], self.setting["GFLOP"] * 1e9, found.ceiling)

    def faster(self, name: str) -> dict[str, float]:
        """How many times faster than the first."""
        first = next(iter(self.timed.values()))
        return ratio(first.times, self.contestants[name].times, "wall")

    def to_dict(self) -> dict[str, Any]:
        contestants = {}
        for name, found in self.contestants.items():
            record = {**dataclasses.asdict(found), "times": found.times.summary()}
            if found.times.wall:
                record |= {"images_per_second": self.rates(name), "mfu": self.mfu(name)}
                record["times_the_first"] = self.faster(name)
            contestants[name] = record
        return {"bench": self.bench, "setting": self.setting, "contestants": contestants}

    def lines(self) -> list[list[str]]:
        return [[self.bench, self.described(), name, *self._cells(name)] for name in self.contestants]

    def _cells(self, name: str) -> list[str]:
        found = self.contestants[name]
        timed = ["", "", "", "", ""]
        if found.times.wall:
            share, summary = self.mfu(name), found.times.summary()
            timed = [
                _range(self.rates(name), ".4g"),
                _range(self.faster(name), ".2f"),
                "" if share is None else f"{100 * share:.1f} %",
                f"{summary['wall']['median'] * 1e3:.4g}",
                f"{summary['host']['median'] * 1e3:.4g}" if "host" in summary else "",
            ]
        memory = "" if found.mebibytes is None else f"{found.mebibytes:.0f} MiB"
        syncs = "" if found.syncs is None else str(found.syncs)
        counted = [str(found.calls.get(key, "")) for key in ("kernel_launches", "operator_calls")]
        return [*timed, memory, syncs, *counted, found.remark]


def _range(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"
