"""What no file of others and no page may do: run code, be unpickled, leave its place, listen or call to the outside."""

from __future__ import annotations

import ast
import functools
import json
import os
import socket
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dinobench.cli import app, ui
from pretrain.data.stores import open_store
from pretrain.errors import DinobenchError
from pretrain.mapping import LOADER
from pretrain.models.checkpoint_file import read
from pretrain.training.recipe import resolve
from suites.suite import load_suite

ROOT = Path(__file__).parents[1]
FILES = sorted(file for name in ("dinobench", "pretrain", "suites") for file in (ROOT / name).rglob("*.py"))


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """(file, node) of everything in the packages."""
    trees = [(file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())) for file in FILES]
    return [(file, node) for file, tree in trees for node in ast.walk(tree)]


@functools.cache
def all_calls() -> list[tuple[str, str, ast.Call]]:
    """(file, dotted name, call) of every call."""
    return [(file, ast.unparse(node.func), node) for file, node in nodes() if isinstance(node, ast.Call)]


def calls(*names: str) -> list[tuple[str, ast.Call]]:
    """(file, call) of every call whose dotted name ends with one of these."""
    wanted = tuple(f".{name}" for name in names)
    return [(file, call) for file, dotted, call in all_calls() if f".{dotted}".endswith(wanted)]


def keyword(call: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(word.value) for word in call.keywords if word.arg == name), None)


def test_the_search_finds_what_is_there() -> None:
    assert ("pretrain/models/checkpoint_file.py", True) in [
        (file, keyword(call, "weights_only")) for file, call in calls("torch.load")
    ]


@pytest.mark.promise(
    "checkpoint of somebody else", "torch.load builds weights only, in one file; nothing else unpickles"
)
def test_torch_loads_weights_only_in_one_file() -> None:
    by_file = {(file, keyword(call, "weights_only")) for file, call in calls("torch.load", "jit.load", "hub.load")}
    # What rank 0 sends to the other ranks of the same command comes from no file.
    assert by_file == {("pretrain/models/checkpoint_file.py", True), ("suites/ranks.py", False)}


@pytest.mark.promise("code in data", "no eval, exec, shell, pickle, yaml.load or extractall in the packages")
def test_nothing_runs_or_unpacks_what_it_reads() -> None:
    builtin = {"eval", "exec", "compile", "__import__"}
    dotted = (
        "os.system", "os.popen", "os.execv", "pickle.load", "pickle.loads", "dill.load", "joblib.load", "marshal.loads",
        "shelve.open", "read_pickle", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "extractall",
        "tarfile.extract", "archive.extract", "unpack_archive",
    )  # fmt: skip
    found = [(file, ast.unparse(call.func)) for file, call in calls(*builtin, *dotted)]
    # network.eval() and re.compile() are others
    assert [(file, name) for file, name in found if name in builtin or name.endswith(dotted)] == []


def test_unpicklers_build_no_class() -> None:
    found = [
        (file, node.name)
        for file, node in nodes()
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases)
    ]
    assert found == [("suites/ground_truth.py", "_PlainUnpickler")]  # its tests: no class, whatever the protocol
    assert [file for file, _ in calls("pickle.Unpickler")] == []


def test_numpy_loads_no_objects() -> None:
    loads = [(file, keyword(call, "allow_pickle")) for file, call in calls("np.load", "numpy.load")]
    assert loads
    assert {allowed for _, allowed in loads} == {False}


def test_no_command_goes_through_a_shell() -> None:
    for file, call in calls("subprocess.run", "subprocess.Popen", "subprocess.call", "check_output", "check_call"):
        assert not keyword(call, "shell"), file
        assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr)), f"{file}: a text, not a list"


def test_yaml_is_read_by_the_safe_loader_in_one_file() -> None:
    names = ("safe_load", "SafeLoader", "CSafeLoader", "Loader", "compose", "parse")
    readers = {file for file, _ in calls("LOADER", *(f"yaml.{name}" for name in names))}
    assert readers == {"pretrain/mapping.py"}
    assert issubclass(LOADER, (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def test_code_is_imported_in_few_places() -> None:
    """Methods (also a file that the user names), protocols, and optional packages by names that stand there."""
    found = {file for file, _ in calls("import_module", "exec_module", "spec_from_file_location")}
    assert found == {
        "pretrain/methods/method.py",
        "suites/suite.py",
        "dinobench/tracking.py",
        "dinobench/slurm.py",
        "dinobench/tables/runner.py",
    }


def test_nothing_is_downloaded() -> None:
    created = [keyword(call, "pretrained") for _, call in calls("timm.create_model")]
    assert created
    assert not any(created)
    downloads = [
        keyword(call, "download") for _, call in calls("datasets.CIFAR100", "datasets.Food101", "datasets.DTD")
    ]
    assert not any(downloads)
    asking = {file for file, _ in calls("urlopen", "requests.get", "requests.post", "urlretrieve", "HTTPConnection")}
    assert asking == {"dinobench/addresses.py"}  # whether the tracking server of the user is there


EVIL = (
    "!!python/object/apply:os.system ['touch ran']",
    "!!python/object/new:os.system ['touch ran']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:pretrain.errors.DinobenchError {}",
)


@pytest.mark.promise("recipe or suite that names Python objects", "refused, exit code 2; nothing runs")
@pytest.mark.parametrize("evil", EVIL)
def test_recipes_and_suites_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"method: {{name: {evil}}}\n")
    (tmp_path / "suite.yaml").write_text(f"name: x\nversion: 1\nprotocol: {evil}\n")
    for command in (
        ["pretrain", "--dry-run", "recipe.yaml"],
        ["pretrain", "--dry-run", "dino", f"data.name={evil}"],
        ["eval", "--suite", "suite.yaml", "a.pt"],
        ["table", "--dry-run", "--checkpoints", "recipe.yaml"],
    ):
        assert app.run(command) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../evil", "os", "..evil", "/tmp/evil", "pretrain.errors", "method", "protocol"])
def test_a_recipe_or_suite_names_no_module_but_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    recipe = resolve("dino").model_dump(mode="json")
    recipe["method"]["name"] = name
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "x", "version": 1, "protocol": name, "headline": "a"}))
    for use in (lambda: resolve("recipe.yaml"), lambda: load_suite("suite.yaml")):
        with pytest.raises(DinobenchError):
            use()
    assert not (tmp_path / "ran").exists()


def test_a_file_of_the_user_is_run_only_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dinobench pretrain ./my_method.py` is the one exception: that is what the command is for."""
    monkeypatch.chdir(tmp_path)
    for name in ("dino.py", "pretrain.py", "suites.py", "yaml.py", "sitecustomize.py"):
        (tmp_path / name).write_text("open('ran', 'w')\n")
    assert app.run(["pretrain", "--dry-run", "dino"]) == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.promise("archive whose members have absolute paths, `..` or links", "read in place; nothing is written")
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_archives_cannot_escape(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    inner = tmp_path / "inner"
    inner.mkdir()
    path = inner / f"a{suffix}"
    names = ["../evil.png", "/tmp/evil.png", "a/../../evil.png", "fine.png"]
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"content")
            link = zipfile.ZipInfo("link.png")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "../secret.png")
    else:
        with tarfile.open(path, f"w:{'gz' if suffix.endswith('gz') else ''}") as archive:
            (inner / "content").write_bytes(b"content")
            for name in names:
                archive.add(inner / "content", name)
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                link = tarfile.TarInfo(f"link{kind.decode()}.png")
                link.type, link.linkname = kind, "../secret.png"
                archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    store = open_store(path)
    found = {name: store.read(name) for name in store.sizes}
    assert found["fine.png"] == b"content"
    assert b"secret" not in found.values()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_parts_of_a_checkpoint_lie_beside_its_index(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    torch.save({}, tmp_path / "secret.pt")
    for place in ("../secret.pt", str(tmp_path / "secret.pt"), "a/../../secret.pt"):
        index = tmp_path / "inner" / "a.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": place}}))
        with pytest.raises(DinobenchError, match="not beside it"):
            read(index)


class Served:
    """In place of the process of a server."""

    command: list[str]
    environment: dict[str, str]

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        Served.command, Served.environment = command, env

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        return 0

    def terminate(self) -> None:
        pass


@pytest.mark.promise("`dinobench ui` in an environment that would open it", "loopback only, host and CORS checks on")
def test_ui_binds_loopback_with_its_checks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = {
        "MLFLOW_HOST": "0.0.0.0",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "*",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "*",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true",
        "MLFLOW_UVICORN_OPTS": "--host 0.0.0.0",
        "MLFLOW_GUNICORN_OPTS": "-b 0.0.0.0:80",
    }
    for name, value in opened.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    monkeypatch.setattr(ui.subprocess, "Popen", Served)
    assert ui.serve("postgresql://me:s3cret@db/mlflow", 5123) == 0
    assert Served.command[Served.command.index("--host") + 1] == "127.0.0.1"
    assert not {"--allowed-hosts", "--cors-allowed-origins", "--disable-security-middleware"} & {*Served.command}
    assert not opened.keys() & Served.environment.keys()
    assert Served.environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert not any("s3cret" in word for word in Served.command)  # everybody may list the processes of a machine
    assert Served.environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:s3cret@db/mlflow"


@pytest.mark.parametrize("option", [["--host", "0.0.0.0"], ["--allowed-hosts", "*"]])
def test_ui_has_no_option_for_a_public_address(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["ui", *option]) == 2
    assert "No such option" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.promise("page of another site that asks `dinobench ui`", "refused (403) by its name and by its origin")
def test_ui_refuses_other_hosts_and_origins(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    code = "from dinobench import tracking; from dinobench.cli import ui; import sys; tracking.connect(sys.argv[1])"
    code += "; ui.serve(sys.argv[1], int(sys.argv[2]))"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    opened = {"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true", "MLFLOW_UVICORN_OPTS": "--host 0.0.0.0"}
    process = subprocess.Popen([sys.executable, "-c", code, uri, str(port)], env={**os.environ, **opened})

    def ask(path: str, data: bytes | None = None, **headers: str) -> int:
        named = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, headers=named)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    search = "/api/2.0/mlflow/experiments/search"
    try:
        wait_for(lambda: ask("/health") == 200)
        assert ask(search, b'{"max_results": 1}') == 200
        assert ask(search, b'{"max_results": 1}', Host="evil.example") == 403
        assert ask(search, b'{"max_results": 1}', Origin="http://evil.example") == 403
        addresses = {line.split()[1].split(":")[0] for line in listening() if line.split()[1].endswith(f":{port:04X}")}
        assert addresses == {"0100007F"}  # 127.0.0.1, and nothing on 0.0.0.0
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError("the server did not start")


def listening() -> list[str]:
    """Lines of the kernel's table of sockets that listen (state 0A)."""
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    lines = [line for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [line for line in lines if line.split()[3] == "0A"]
