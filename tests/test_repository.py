"""The repository as a whole: sizes, contents, and a README that names what exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dinobench.cli import app
from suites.suite import suite_names

ROOT = Path(__file__).parents[1]
PACKAGES = ("dinobench", "pretrain", "suites")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def own_files() -> list[Path]:
    """Every file of ours that is text: the packages, the tests, and what lies at the top."""
    folders = [ROOT / name for name in (*PACKAGES, "tests", "results", ".ci")]
    candidates = [path for folder in folders for path in folder.rglob("*")]
    candidates += [p for pattern in ("*.md", "*.py", "*.txt", "*.toml", "*.cff", ".*.yaml") for p in ROOT.glob(pattern)]
    binary = {".npz", ".pyc", ".png", ".parquet"}
    return sorted(p for p in candidates if p.is_file() and p.suffix not in binary and "__pycache__" not in p.parts)


def python_files() -> list[Path]:
    return [path for path in own_files() if path.suffix == ".py"]


def test_no_source_file_is_longer_than_400_lines() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_every_module_says_what_it_is() -> None:
    parsed = {path: ast.parse(path.read_text()) for path in python_files() if path.parts[len(ROOT.parts)] in PACKAGES}
    assert [path for path, tree in parsed.items() if not ast.get_docstring(tree)] == []


def test_nothing_is_left_unfinished() -> None:
    unfinished = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")
    found = {path.name: unfinished.findall(path.read_text()) for path in own_files()}
    assert {name: words for name, words in found.items() if words} == {}


def test_no_file_names_a_folder_of_one_machine() -> None:
    private = re.compile(r"(?<![\w.~}])/(?:root|home|Users|work|farm|mnt)/[\w.]+")
    found = {path.relative_to(ROOT).as_posix(): private.findall(path.read_text()) for path in own_files()}
    assert {name: paths for name, paths in found.items() if paths} == {}


def test_constraints_pin_every_dependency_and_name_no_host() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!+-]+( ; .+)?", line)] == []
    pinned = {line.split("==")[0].lower() for line in lines}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    assert {re.split(r"[^\w-]", requirement)[0] for requirement in wanted} - pinned == set()


def test_wheel_lists_exactly_the_three_packages() -> None:
    assert sorted(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(PACKAGES)


def test_no_package_file_is_ignored_by_git() -> None:
    # An ignored file is left out of the wheel without a word.
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = [p.relative_to(ROOT).as_posix() for p in own_files() if p.relative_to(ROOT).parts[0] in PACKAGES]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(names), capture_output=True, text=True, timeout=60)
    assert done.stdout == ""


def readme_commands() -> list[list[str]]:
    """The commands of the README's code blocks, words apart, without the prompt and what comes after a pipe."""
    blocks = re.findall(r"^```\w*\n(.*?)^```|((?:^ {4}.*\n)+)", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    lines = "\n".join(fenced or indented for fenced, indented in blocks).replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        for part in re.split(r"&&|\|", line.removeprefix("$ ").strip().removeprefix("$ ")):
            words = shlex.split(part, comments=True) if re.match(r"\s*(uv run |dinobench |nox )", part) else []
            commands.append(words[2:] if words[:2] == ["uv", "run"] else words)
    return [words for words in commands if words]


def test_readme_names_sessions_that_exist() -> None:
    functions = [
        node for node in ast.parse((ROOT / "noxfile.py").read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    sessions = {node.name for node in functions if node.decorator_list}
    named = {words[words.index("-s") + 1] for words in readme_commands() if words[0] == "nox" and "-s" in words}
    assert "tests" in named
    assert named - sessions == set()


def dinobench_commands() -> list[list[str]]:
    return [words[1:] for words in readme_commands() if words[0] == "dinobench"]


def parse(command: Any, name: str, arguments: list[str], parent: Any = None) -> None:
    """Let Typer read a command line without running it; it raises on an unknown verb, option or type."""
    context = command.make_context(name, list(arguments), parent=parent)
    if hasattr(command, "resolve_command"):
        verb, subcommand, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(subcommand, verb, rest, context)


def test_readme_commands_parse() -> None:
    command = typer.main.get_command(app.app)
    assert any(arguments[0] == "pretrain" for arguments in dinobench_commands())
    for arguments in dinobench_commands():
        parse(command, "dinobench", arguments)


def test_readme_names_methods_presets_keys_and_suites_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in dinobench_commands():
        if arguments[0] == "pretrain" and not arguments[1].endswith((".py", ".yaml")):
            assert app.run([*arguments, "--dry-run"]) == 0, (arguments, capsys.readouterr().err)
        suites = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--suite"]
        assert {name for word in suites for name in word.split(",")} <= set(suite_names())
