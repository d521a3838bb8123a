"""Plugin of pytest that writes down what breaks, what was promised, and whether it held.

@pytest.mark.promise("disk full while a checkpoint is written", "the previous one stays whole; exit code 3")
def test_...(count, figure):
    count("SIGKILL", "training", kills_tried=1, kills_survived=1)   # summed over all tests, by label
    figure(memory_mb_per_1000_steps=0.2)                            # kept as it is; the largest where given twice

pytest -m "faults or promise" --reliability FILE.json     # also with -n; reliability_report.py makes the table
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "scikit-learn", "mlflow", "pydantic", "pillow", "hypothesis")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("reliability")
    group.addoption("--reliability", type=Path, metavar="FILE", help="write faults, promises and figures as JSON")
    group.addoption("--kills", type=int, default=200, metavar="N", help="processes to kill under -m faults (200)")


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist send what they saw to the process that started them; that one writes.
    if config.getoption("--reliability") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("--reliability")), "reliability recorder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("promise"):
            fault, promise = marker.args
            item.user_properties.append(("promise", [str(fault), str(promise)]))


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`count(*labels, **numbers)`: adds to the sums of the report."""

    def add(*labels: str, **numbers: float) -> None:
        request.node.user_properties.append(("count", [list(labels), numbers]))

    return add


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`figure(name=value)`: a measured number of the report."""
    return lambda **numbers: request.node.user_properties.append(("figure", numbers))


class Recorder:
    """Gathers the reports of all tests and writes one JSON document at the end.

    promises: [{fault, promise, test, outcome, seconds}]; counts: {name: {"label / label": sum}}; figures: {name: value}
    """

    def __init__(self, file: Path) -> None:
        self.file = file.absolute()
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "properties": []})
        test["seconds"] += report.duration
        if report.outcome != "passed" and test["outcome"] != "failed":
            test["outcome"] = report.outcome
        # Every phase carries all that was said so far; what the test itself said is there from its call on.
        test["properties"] = list(report.user_properties)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.document(), indent=1, sort_keys=False) + "\n")

    def document(self) -> dict[str, Any]:
        promises: list[dict[str, Any]] = []
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        figures: dict[str, float] = {}
        for name, test in sorted(self.tests.items()):
            for kind, value in test["properties"]:
                if kind == "promise":
                    result = {"outcome": test["outcome"], "seconds": round(test["seconds"], 2)}
                    promises.append({"fault": value[0], "promise": value[1], "test": name, **result})
                elif kind == "count":
                    for key, number in value[1].items():
                        counts[key][" / ".join(value[0])] += number
                elif kind == "figure":
                    for key, number in value.items():
                        figures[key] = max(number, figures.get(key, number))
        return {**_head(), "figures": figures, "counts": counts, "promises": promises}


def _head() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cpu_count": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
