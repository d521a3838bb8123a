from __future__ import annotations

import json
from typing import Any

import pytest

from dinobench.cli import app


def run(true_result: Any, *options: str) -> int:
    return app.run(["verify", str(true_result.file), "--device", "cpu", *options])


def test_a_true_result_ends_with_0(true_result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(true_result) == 0
    captured = capsys.readouterr()
    assert "holds: measured again from checkpoint and images" in captured.out
    assert "more numbers agree" in captured.out
    assert run(true_result, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["scope"], document["mismatches"]) == ("holds", "checkpoint and images", [])


def test_one_altered_weight_ends_with_4(true_result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    true_result.alter_weight()
    assert run(true_result) == 4
    captured = capsys.readouterr()
    assert "checkpoint sha256 is " in captured.err
    assert "nothing was measured" in captured.err


def test_one_altered_label_ends_with_4(true_result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    true_result.alter_image("test_labels")
    assert run(true_result) == 4
    assert "dataset fingerprint (test) is " in capsys.readouterr().err


def test_one_altered_score_ends_with_4_and_one_document(true_result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    true_result.alter("scores", "top1", value=99.0)
    assert run(true_result, "--json") == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["verdict"], document["mismatches"], document["measured"]) == ("does not hold", ["top1"], True)
    assert ", stated is 99; measure again with `dinobench eval`" in captured.err


def test_features_from_the_cache_are_labelled_as_the_protocol_only(
    true_result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(true_result, "--from-cache") == 0
    assert "holds: protocol only" in capsys.readouterr().out


def test_what_is_missing_ends_with_3(true_result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    true_result.checkpoint.unlink()
    assert run(true_result) == 3
    assert "--checkpoint FILE" in capsys.readouterr().err
    assert app.run(["verify", str(true_result.file.with_name("none.json"))]) == 3


def test_help_states_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["verify", "--help"]) == 0
    assert "Exit code 0 when all hold, 4 when one does not, 3 when its checkpoint" in " ".join(
        capsys.readouterr().out.split()
    )
