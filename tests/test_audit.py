"""`nox -s audit`: vulnerabilities fail it; a machine without a network does not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from nox.command import CommandFailed

ROOT = Path(__file__).parents[1]
CLEAN = {"dependencies": [{"name": "torch", "version": "2.11", "vulns": []}, {"name": "odd", "skip_reason": "local"}]}
FOUND = {"dependencies": [{"name": "pillow", "version": "1.0", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}]}


class Session:
    """Stands for nox's: pip-audit writes `report`, or nothing."""

    def __init__(self, folder: Path, report: Any, *, installs: bool = True) -> None:
        self.folder, self.report, self.installs = folder, report, installs
        self.warnings: list[str] = []
        self.command: tuple[str, ...] = ()

    def create_tmp(self) -> str:
        return str(self.folder)

    def install(self, *packages: str) -> None:
        if not self.installs:
            raise CommandFailed("no network")

    def run(self, *command: str, success_codes: Any) -> None:
        self.command = command
        if self.report is not None:
            Path(command[command.index("--output") + 1]).write_text(self.report)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def error(self, text: str) -> None:
        raise AssertionError(text)


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.audit.func


@pytest.mark.parametrize(("report", "installs"), [(None, True), (None, False), ("", True), ("[]", True), ("{}", True)])
def test_without_an_answer_it_warns_and_passes(tmp_path: Path, audit: Any, report: str | None, installs: bool) -> None:
    session = Session(tmp_path, report, installs=installs)
    audit(session)
    assert "nobody could be asked" in session.warnings[0]


def test_an_answer_without_findings_passes_in_silence(tmp_path: Path, audit: Any) -> None:
    session = Session(tmp_path, json.dumps(CLEAN))
    audit(session)
    assert session.warnings == []
    assert "constraints.txt" in session.command


def test_findings_fail_with_their_names(tmp_path: Path, audit: Any) -> None:
    with pytest.raises(AssertionError, match="pillow 1.0: PYSEC-1\npillow 1.0: PYSEC-2"):
        audit(Session(tmp_path, json.dumps(FOUND)))


def test_an_answer_of_another_day_does_not_count(tmp_path: Path, audit: Any) -> None:
    (tmp_path / "audit.json").write_text(json.dumps(FOUND))
    session = Session(tmp_path, None)
    audit(session)
    assert session.warnings
