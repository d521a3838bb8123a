"""The three floors: imports point down, and the lower two run without tracking and without FAISS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]

IMPORT_LOWER_FLOORS = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mlflow", "faiss", "dinobench"}:
            raise ModuleNotFoundError(f"{name} is taken as not installed", name=name)

sys.meta_path.insert(0, Missing())
for floor in ("pretrain", "suites"):
    package = importlib.import_module(floor)
    for module in pkgutil.walk_packages(package.__path__, floor + "."):
        importlib.import_module(module.name)
"""


def test_imports_point_down_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would switch off the loggers of every module imported so far, for all tests after this one.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == 0


def test_lower_floors_import_without_mlflow_and_faiss(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_LOWER_FLOORS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
