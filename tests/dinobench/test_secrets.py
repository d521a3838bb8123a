"""A password in the address of the tracking store is told to nobody; and no command calls to the outside by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinobench import addresses, mirror
from dinobench.cli import app
from dinobench.journal import Journal
from dinobench.reporter import Reporter

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and what it imports announce their own deprecations

SECRET = "hunter2-s3cret"
QUICK = ("schedule.epochs=2", "schedule.warmup_epochs=1", "head.num_prototypes=32", "evaluation.suites=[]")
ADDRESSES = {
    "server that is not there": f"http://me:{SECRET}@127.0.0.1:9",
    "token in place of a name": f"http://{SECRET}@127.0.0.1:9",
    "password that breaks the address": f"http://me:{SECRET}/@127.0.0.1:9",
    "database without its driver": f"postgresql://me:{SECRET}@127.0.0.1:9/mlflow",
    "password among the options": f"postgresql://127.0.0.1:9/mlflow?user=me&password={SECRET}",
    "scheme that nobody knows": f"nothing://me:{SECRET}@127.0.0.1:9",
}


def files_with(secret: str, folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


@pytest.mark.promise("tracking address with a password", "never printed, logged or written")
@pytest.mark.parametrize("kind", ADDRESSES)
def test_a_password_is_neither_printed_nor_written(
    kind: str,
    fake_loop: Any,
    measurer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "runs"
    run = measurer.run("dino", 0, 90.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESSES[kind])
    commands = [
        ["pretrain", "dino", *QUICK, "--output", str(output)],
        ["pretrain", "dino", *QUICK, "tracking.require=true", "--output", str(output), "--new"],
        ["runs", "sync", str(run.path)],
        ["runs", "reap", "--output", str(output)],
        ["runs", "show", str(run.path)],
        ["ui", "--output", str(output)],
        ["doctor", "--output", str(output), "--json"],
        ["doctor", "--output", str(output)],
    ]
    codes = [app.run(command) for command in commands]
    assert 1 not in codes
    told = capfd.readouterr()
    assert "***" in told.err + told.out  # something was said of it
    assert SECRET not in told.err + told.out
    assert files_with(SECRET, tmp_path) == []
    logs = list(output.glob("*/train.log"))
    assert logs
    assert all("dinobench runs sync" in log.read_text() for log in logs[:1])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:a@b:c/d@host/x twice", "at https://me:***@host/x twice"),
        ("https://token@host and a@b.org", "https://***@host and a@b.org"),
        ("'https://me:pw@host'", "'https://me:***@host'"),
        ("db?user=me&password=pw&sslmode=off", "db?user=me&password=***&sslmode=off"),
        ("http://h/?access_token=pw#x", "http://h/?access_token=***#x"),
        ("http://host:5000/#/experiments/1", "http://host:5000/#/experiments/1"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
    ],
)
def test_passwords_of_addresses_are_hidden(text: str, shown: str) -> None:
    assert addresses.masked(text) == shown


def test_secrets_of_the_environment_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "dapi0123")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:b%40ttery@host")
    assert addresses.masked("correct horse, dapi0123, b%40ttery, b@ttery") == "***, ***, ***, ***"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a")
    assert addresses.masked("a cat") == "a cat"


def test_log_and_mirror_hide_what_an_error_says(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str) -> None:
        raise RuntimeError(f"no plugin for {uri}")

    monkeypatch.setattr(mirror.tracking, "connect", broken)
    reporter = Reporter()
    reporter.keep(run.log_file)
    made = mirror.Mirror(run, f"odd://me:{SECRET}@host", reporter.warn)
    made.log(Journal(run.path / "metrics.jsonl").append({"loss/total": 1.0}, 1))
    assert not made.close(5)
    assert SECRET not in str(made.failure)
    assert "odd://me:***@host" in run.log_file.read_text()


@pytest.fixture
def calls_outside(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach another process through the network, which fails."""
    made: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        made.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return made


@pytest.mark.promise("commands on a machine without network", "no socket is opened, no name is looked up")
def test_commands_open_no_socket(
    calls_outside: list[Any], measured_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        ["pretrain", "dino_vmf", "--dry-run"],
        ["ls", "methods"],
        ["ls", "datasets"],
        ["ls", "suites"],
        ["runs", "ls", "--output", str(tmp_path)],
        ["show", str(measured_once / "tiny.pt")],
        ["eval", "--suite", "digits_knn", "--data", f"npz:{measured_once / 'digits.npz'}", "--device", "cpu"],
    ]
    commands[-1] += ["--output", str(tmp_path), "--json", str(measured_once / "tiny.pt")]
    for command in commands:
        assert app.run(command) == 0, capsys.readouterr().err
    assert calls_outside == []


CLEAN = """
import socket, sys
made = []
def refuse(*arguments, **options):
    made.append(arguments)
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from dinobench.cli import app
code = app.run(sys.argv[1:])
import os, time
from mlflow.telemetry.client import get_telemetry_client
time.sleep(2)
assert "mlflow" in sys.modules
print("TOLD", code, made, get_telemetry_client(), os.environ["MLFLOW_DISABLE_TELEMETRY"])
"""
SET_BY_TESTS = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "PYTEST_CURRENT_TEST", "CI")


@pytest.mark.slow
@pytest.mark.promise("MLflow's and Hugging Face's telemetry", "off, also where no variable says so")
def test_telemetry_is_off_in_a_clean_environment(measured_once: Path, tmp_path: Path) -> None:
    """MLflow sends nothing when it sees pytest or a CI: so all that tells it so is taken away."""
    kept = {name: value for name, value in os.environ.items() if name not in SET_BY_TESTS}
    kept["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    command = ["eval", "--suite", "digits_knn", "--data", f"npz:{measured_once / 'digits.npz'}", "--device", "cpu"]
    command += ["--output", str(tmp_path), "--json", str(measured_once / "tiny.pt")]
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, *command], env=kept, capture_output=True, text=True, timeout=300
    )
    assert "TOLD 0 [] None true" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


def test_mlflow_is_imported_only_after_its_telemetry_is_off() -> None:
    """And by no file but tracking.py: `importlib.import_module("mlflow")` stands after the defaults are set."""
    from dinobench import tracking

    source = Path(tracking.__file__).read_text()
    assert tracking.DEFAULTS["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert source.index("os.environ.setdefault(name, value)") < source.index('importlib.import_module("mlflow")')
