"""The three floors: imports point down, and the lower two run without tracking and without FAISS."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
ABOVE = {"mlflow", "faiss", "dinobench"}


class Missing:
    """Stands for an environment without what belongs to the floor above."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ABOVE:
            raise ModuleNotFoundError(f"{name} is taken as not installed", name=name)


def import_lower_floors() -> None:
    warnings.simplefilter("ignore")
    assert not {"pretrain", "suites", *ABOVE} & sys.modules.keys()  # of a process where nothing of them was imported
    sys.meta_path.insert(0, Missing())
    for floor in ("pretrain", "suites"):
        package = importlib.import_module(floor)
        for module in pkgutil.walk_packages(package.__path__, floor + "."):
            importlib.import_module(module.name)


def test_imports_point_down_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would switch off the loggers of every module imported so far, for all tests after this one.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == 0


def test_lower_floors_import_without_mlflow_and_faiss(processes: ForkServerContext) -> None:
    process = processes.Process(target=import_lower_floors)
    process.start()
    process.join(120)
    assert process.exitcode == 0
