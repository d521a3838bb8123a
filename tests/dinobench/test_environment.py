from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dinobench import environment


def test_written_results_do_not_make_the_code_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for file in ("dinobench/code.py", "results/table.md"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("committed")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "dinobench" / "environment.py"))
    (tmp_path / "results/table.md").write_text("written anew")
    clean = environment.code_commit()
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "dinobench/code.py").write_text("changed")
    assert environment.code_commit() == {**clean, "dirty": True}


def test_an_installed_package_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "dinobench" / "environment.py"))
    assert environment.code_commit() == {}
