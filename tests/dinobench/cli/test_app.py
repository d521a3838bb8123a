from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinobench.cli import app, pretrain
from pretrain.errors import CheckFailed, DinobenchError

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "mlflow",
    "pandas",
    "faiss",
    "sklearn",
    "matplotlib",
    "numpy",
    "yaml",
    "scipy",
    "rich",
)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from dinobench.cli import app; app.run(['--help']); print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {line.partition(".")[0] for line in done.stdout.splitlines()}
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    "verb",
    [
        (),
        ("pretrain",),
        ("eval",),
        ("figure",),
        ("ls",),
        ("runs",),
        ("runs", "ls"),
        ("runs", "sync"),
        ("show",),
        ("ui",),
    ],
)
def test_every_verb_has_help(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrian", "dino"], "Did you mean 'pretrain'"),
        (["pretrain", "dino", "--sed", "1"], "--seed"),
        (["pretrain", "dno"], "did you mean 'dino'"),
        (["pretrain", "dino", "--preset", "digit"], "did you mean 'digits'"),
        (["pretrain", "dino", "optim.lrr=1"], "optim.lr"),
        (["pretrain", "dino", "optim.lr=fast"], "optim.lr='fast'"),
        (["pretrain", "dino", "--resume", "--new"], "give one of them"),
        (["pretrain", "dino", "--seed", "-1"], "--seed"),
        (["eval", "--suite", "digits_kn", "x.pt"], "did you mean 'digits_knn'"),
        (["eval", "--suite", ",", "x.pt"], "--suite needs a name"),
        (["eval", "x.pt"], "--suite"),
        (["ls", "method"], "methods"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_usage_error_is_one_line_that_names_the_nearest(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DinobenchError("the data are not there"), 3, "error: the data are not there"),
        (CheckFailed("collapsed"), 4, "error: collapsed"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
        (ZeroDivisionError("at http://me:s3cret@host"), 1, "bug: ZeroDivisionError: at http://me:***@host"),
    ],
    ids=["mendable", "check", "ctrl-c", "terminated", "bug"],
)
def test_exit_codes(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    assert app.run(["ls", "methods"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(said)
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_who_is_told_to_stop_tidies_up_and_gives_the_signal_as_exit_code(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, tidied = signal.Signals[name], []

    def command(*arguments: Any, **options: Any) -> None:
        try:
            signal.raise_signal(number)
        finally:
            tidied.append(name)

    monkeypatch.setattr(app, "app", command)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert app.run([]) == 128 + number
    finally:
        signal.signal(number, before)
    assert tidied == [name]


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str], **options: Any) -> None:
        assert arguments == ["ls", "methods"]
        raise DinobenchError("the data are not there")

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(DinobenchError):
        app.run(["ls", "methods", "--debug"])


def test_a_dry_run_prints_a_recipe_with_origins_that_is_a_recipe_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["pretrain", "dino_vmf", "--dry-run", "--seed", "3", "optim.lr=0.123"]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.strip().startswith("lr:")]
    assert line.split("#")[1].strip() == "command line"
    assert "# presets/digits.yaml" in text
    assert "# default" in text
    assert list(tmp_path.iterdir()) == []
    Path("again.yaml").write_text(text)
    assert app.run(["pretrain", "again.yaml", "--dry-run", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert app.run(["pretrain", "dino_vmf", "--dry-run", "--json", "--seed", "3", "optim.lr=0.123"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == again["recipe"]


def test_annotated_lines_keep_mappings_that_are_one_value() -> None:
    values = {"model": {"name": "vit", "kwargs": {"depth": 3}}, "seed": 0}
    lines = pretrain.annotated(values, {"model.kwargs": "presets/digits.yaml"})
    assert [line.split("#")[0].strip() for line in lines] == ["model:", "name: vit", "kwargs: {depth: 3}", "seed: 0"]
