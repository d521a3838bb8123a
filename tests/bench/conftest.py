"""The scripts of this folder import each other by name; their tests import them as the scripts do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of this folder by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module
