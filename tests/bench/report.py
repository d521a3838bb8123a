"""The record of a benchmark: JSON after every row, so that an interrupted run keeps what it measured, and a table."""

from __future__ import annotations

import abc
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import torch

from timing import Times, ratio

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "faiss-gpu", "faiss-cpu")


class Entry(abc.ABC):
    """Something measured: lines of a table, and a record."""

    HEAD: ClassVar[tuple[str, ...]]
    """The columns of `lines`."""

    setting: dict[str, Any]

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What the JSON file keeps."""

    @abc.abstractmethod
    def lines(self) -> list[list[str]]:
        """Lines of the table, in the columns of HEAD."""

    def described(self) -> str:
        """The setting in a cell; the device stands in the heading."""
        return " ".join(f"{key}={value}" for key, value in self.setting.items() if key != "device")


@dataclasses.dataclass(frozen=True)
class Row(Entry):
    """One comparison: the first contestant is the opponent, the others are ours."""

    HEAD: ClassVar = ("bench", "setting", "contestant", "time (median)", "times faster (range)", "wall", "target")

    bench: str
    setting: dict[str, Any]
    unit: str
    times: dict[str, Times]
    gate: dict[str, float]
    """What was found equal before the timing, with the difference."""
    targets: dict[str, float]
    """Contestant -> how many times faster than the opponent it should be."""

    @property
    def clock(self) -> str:
        return "wall" if self.setting.get("device", "cpu") != "cpu" else "cpu"

    def ratios(self, clock: str) -> dict[str, dict[str, float]]:
        opponent, *ours = self.times
        return {name: ratio(self.times[opponent], self.times[name], clock) for name in ours}

    def to_dict(self) -> dict[str, Any]:
        record = {key: getattr(self, key) for key in ("bench", "setting", "unit", "gate", "targets")}
        record["seconds"] = {name: times.summary() for name, times in self.times.items()}
        record["times_faster"] = {clock: self.ratios(clock) for clock in ("cpu", "wall")}
        return record

    def lines(self) -> list[list[str]]:
        setting, (opponent, *ours) = self.described(), self.times
        lines = [[self.bench, setting, opponent, self._time(opponent), "1", "1", ""]]
        for name in ours:
            faster, wall = self.ratios(self.clock)[name], self.ratios("wall")[name]
            wanted = self.targets.get(name)
            verdict = "" if wanted is None else f"{wanted:g} {'reached' if faster['median'] >= wanted else 'missed'}"
            spread = f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})"
            lines.append([self.bench, setting, name, self._time(name), spread, f"{wall['median']:.2f}", verdict])
        return lines

    def _time(self, name: str) -> str:
        return f"{self.times[name].summary()[self.clock]['median'] * 1e3:.4g} ms per {self.unit}"


@dataclasses.dataclass(frozen=True)
class CostRow(Row):
    """One comparison of what our own training steps cost: time and memory as multiples of the first contestant's."""

    HEAD: ClassVar = (
        "bench", "setting", "contestant", "images per second", "time (median)", "times the time (range)", "wall",
        "peak memory", "times the memory",
    )  # fmt: skip
    images: int
    """Of a unit of work."""
    memory: dict[str, float]
    """Contestant -> peak memory, MiB (see cost.py)."""

    def costs(self, clock: str) -> dict[str, dict[str, float]]:
        first = next(iter(self.times))
        return {name: ratio(times, self.times[first], clock) for name, times in self.times.items()}

    def to_dict(self) -> dict[str, Any]:
        record = super().to_dict()
        del record["times_faster"]
        first = next(iter(self.memory.values()))
        return record | {
            "times_the_time": {clock: self.costs(clock) for clock in ("cpu", "wall")},
            "images_per_second": {name: self._rate(name) for name in self.times},
            "peak_mebibytes": self.memory,
            "times_the_memory": {name: peak / first for name, peak in self.memory.items()},
        }

    def lines(self) -> list[list[str]]:
        setting, first = self.described(), next(iter(self.memory.values()))
        lines = []
        for name, peak in self.memory.items():
            cost, wall = self.costs(self.clock)[name], self.costs("wall")[name]
            spread = f"{cost['median']:.2f} ({cost['min']:.2f} to {cost['max']:.2f})"
            time, rate = self._time(name), f"{self._rate(name):.4g}"
            memory = [f"{peak:.0f} MiB", f"{peak / first:.2f}"]
            lines.append([self.bench, setting, name, rate, time, spread, f"{wall['median']:.2f}", *memory])
        return lines

    def _rate(self, name: str) -> float:
        return self.images / self.times[name].summary()[self.clock]["median"]


class Report:
    """Collects rows; writes `<folder>/<date>-<machine>.json` after each and the Markdown table with it."""

    def __init__(self, folder: Path | None, machine: str | None, *, judged: bool = True, note: str = ""):
        self.rows: list[Entry] = []
        self.failures: list[str] = []
        """Contestants that were not timed because they are not equal, with the reason."""
        self.judged, self.note = judged, note
        self.machine = machine or machine_name()
        self.path = folder / f"{datetime.date.today():%Y-%m-%d}-{self.machine}.json" if folder else None

    def add(self, row: Entry) -> None:
        """Print the row and save everything so far; times that are not judged have no targets."""
        if isinstance(row, Row) and not self.judged:
            row = dataclasses.replace(row, targets={})
        self.rows.append(row)
        for line in row.lines():
            print("  ".join(line), flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [row.to_dict() for row in self.rows]
            date = f"{datetime.date.today():%Y-%m-%d}"
            record = {"date": date, "environment": environment(), "note": self.note, "rows": rows}
            self.path.write_text(json.dumps(record, indent=1) + "\n")
            self.path.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        found = environment()
        machine = f"{found['gpu']}, " if found["gpu"] else ""
        versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
        tables = "\n".join(self._table(kind) for kind in dict.fromkeys(type(row) for row in self.rows))
        return (
            f"# Benchmark, {datetime.date.today():%Y-%m-%d}, {machine}{found['processor']}, {found['cores']} cores\n\n"
            f"Code {found['commit']}; {versions}. Contestants take turns after an equality check. Process CPU\n"
            "time on a CPU, wall time on a GPU; the ratio is the median over rounds.\n\n"
            + (f"{self.note}\n\n" if self.note else "")
            + tables
        )

    def _table(self, kind: type[Entry]) -> str:
        lines = [line for row in self.rows if type(row) is kind for line in row.lines()]
        table = [kind.HEAD, ["---"] * len(kind.HEAD), *lines]
        return "".join("| " + " | ".join(cells) + " |\n" for cells in table)


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, versions, commit. No host name."""
    installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    return {
        "processor": _processor(),
        "gpu": _gpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "packages": dict(sorted(installed.items())),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def machine_name() -> str:
    """A short name of the processor, for the file name."""
    words = re.sub(r"\(\w+\)|@.*|\bCPU\b|\bProcessor\b", "", _gpu() or _processor()).lower()
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {os.cpu_count()}-cores").strip("-")


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
