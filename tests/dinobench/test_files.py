from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dinobench import files
from pretrain.errors import DinobenchError


@pytest.mark.promise("a write that fails at its last step", "the old file stays, no other is left")
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    files.write_json(path, {"step": 1})

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(DinobenchError, match="no space left on device"):
        files.write_json(path, {"step": 2})
    assert files.read_json(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.promise("killed while a small file is written", "the next write removes the half file that was left")
def test_what_a_killed_process_left_is_removed_by_the_next_write_and_nothing_younger(tmp_path: Path) -> None:
    old, young = tmp_path / ".state[1].json.12.tmp", tmp_path / ".state[1].json.13.tmp"
    probe, other = tmp_path / ".write-test-12", tmp_path / ".other.json.12.tmp"
    for path in (old, young, probe, other):
        path.write_text("{")
    for path in (old, probe, other):
        os.utime(path, times=(0, time.time() - 2 * files.ABANDONED_SECONDS))
    files.write_json(files.make_folder(tmp_path) / "state[1].json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"state[1].json", young.name, other.name}


@pytest.mark.parametrize("told", [KeyboardInterrupt, SystemExit])
def test_a_write_that_is_interrupted_leaves_nothing(
    told: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise told

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(told):
        files.write_json(tmp_path / "state.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"step": ')
    with pytest.raises(DinobenchError, match=r"run\.json is not a JSON document"):
        files.read_json(tmp_path / "run.json")


def test_a_folder_below_a_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DinobenchError, match=r"cannot write .*taken.*--output"):
        files.make_folder(tmp_path / "taken" / "runs")


def test_no_permission_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(DinobenchError, match="permission denied; choose another folder with --output"):
        files.make_folder(tmp_path / "runs")


def test_a_folder_given_as_a_checkpoint_is_told_from_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match="is a folder, a checkpoint file was expected"):
        files.sha256(tmp_path)
    with pytest.raises(DinobenchError, match="no such file"):
        files.sha256(tmp_path / "absent.pt")


def test_slugs_hold_no_separator() -> None:
    assert files.slug("folder:/data/my set") == "folder_data_my_set"
