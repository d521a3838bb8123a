"""Everything CI runs, by name.

    uv run nox                     lint, types and tests, in the project's own environment (nothing is installed twice)
    uv run nox -s tests -- -k knn  arguments after -- go to the tool
    uv run nox -l                  the list of sessions

A nox installed elsewhere (pipx, uv tool, the distribution) makes an environment per session, pinned by constraints.txt.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
PACKAGES = ("dinobench", "pretrain", "suites")
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "types", "tests"]


def _in_project_environment() -> bool:
    """Whether nox itself runs from an environment where this checkout is installed, as under `uv run nox`."""
    try:
        source = importlib.metadata.distribution("dinobench").read_text("direct_url.json") or "{}"
    except importlib.metadata.PackageNotFoundError:
        return False
    return json.loads(source).get("url") == ROOT.absolute().as_uri()


HERE = _in_project_environment()
# torch and the CUDA libraries take 6 GB: under `uv run nox` the sessions use the environment they were started from.
BACKEND = "none" if HERE else None


def _install(session: nox.Session, *requirements: str) -> None:
    """Install into the session's own environment, pinned; nothing to do in the project's."""
    if not HERE:
        session.install("-c", "constraints.txt", *requirements)


def _install_project(session: nox.Session) -> None:
    _install(session, "-e", ".", *nox.project.dependency_groups(PROJECT, "dev"))


def _python(session: nox.Session, *arguments: str) -> None:
    """Run the environment's Python; by its path where the environment is not nox's own."""
    session.run(sys.executable if HERE else "python", *arguments, external=HERE)


def _dinobench(session: nox.Session, *arguments: str) -> None:
    """Run the console script, as a user does; by its path where the environment is not nox's own."""
    session.run(str(Path(sys.executable).with_name("dinobench")) if HERE else "dinobench", *arguments, external=HERE)


@nox.session(venv_backend=BACKEND)
def lint(session: nox.Session) -> None:
    """Formatting, lint rules, and the three floors (imports only point down)."""
    _install_project(session)
    _python(session, "-m", "ruff", "format", "--check", ".")
    _python(session, "-m", "ruff", "check", ".")
    _python(session, "-c", "import sys, importlinter.cli as cli; sys.exit(cli.lint_imports())")


@nox.session(venv_backend=BACKEND)
def types(session: nox.Session) -> None:
    """Static types of the packages, the tests and this file."""
    _install_project(session)
    interpreter = ("--pythonpath", sys.executable) if HERE else ()
    _python(session, "-m", "pyright", *interpreter, *session.posargs)


@nox.session(venv_backend=BACKEND)
def tests(session: nox.Session) -> None:
    """The test suite on up to 4 cores; `-- -m slow` for the long tests, `-- -k golden` for the reference values."""
    _install_project(session)
    # Each worker imports torch anew, so more of them cost more than they save.
    # A worker keeps the tests of a file together, which share what is made once, until another has nothing left.
    workers = ("--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal")
    _python(session, "-m", "pytest", *workers, *session.posargs)


@nox.session(venv_backend=BACKEND, default=False)
def gpu(session: nox.Session) -> None:
    """The tests that need a CUDA device."""
    _install_project(session)
    _python(session, "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session(venv_backend=BACKEND, default=False)
def bench(session: nox.Session) -> None:
    """Speed and memory of step, data path and evaluation; with `-- --reference DIR` beside the official code."""
    _install_project(session)
    _python(session, "tests/bench/run.py", *session.posargs)


@nox.session(venv_backend=BACKEND, default=False)
def loss_curve(session: nox.Session) -> None:
    """Loss of the optimised training beside the plain one, 2,000 steps; `-- --method dino_vmf`."""
    _install_project(session)
    _python(session, "tests/bench/loss_curve.py", *session.posargs)


@nox.session(venv_backend=BACKEND, default=False)
def faults(session: nox.Session) -> None:
    """Break things on purpose (20 minutes on 2 cores) and write results/reliability.md; `-- --kills 20`, `-- -k disk`.

    With arguments the report goes to the session's temporary folder: part of the tests is no record.
    """
    _install_project(session)
    folder = Path(session.create_tmp()).absolute()
    record = folder / "reliability.json"
    output = folder if session.posargs else ROOT / "results"
    record.unlink(missing_ok=True)
    codes = range(2)  # 1: a test failed; the report says which, and fails in its turn
    # worksteal: a few of them take minutes
    options = ("-m", "faults or promise", "--numprocesses=2", "--dist=worksteal", "--reliability", str(record))
    command = (sys.executable if HERE else "python", "-m", "pytest", *options, *session.posargs)
    session.run(*command, external=HERE, success_codes=codes)
    _python(session, "tests/faults/reliability_report.py", str(record), "--output", str(output / "reliability.md"))


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Ask for known vulnerabilities of the pinned dependencies; without a network that is said, and no failure."""
    report = Path(session.create_tmp()).absolute() / "audit.json"
    report.unlink(missing_ok=True)
    # The pins as they stand, without resolving them again; any exit code, for pip-audit has one for all that can be.
    options = ("--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--progress-spinner", "off")
    try:
        session.install("pip-audit>=2.9,<3")
        session.run("pip-audit", *options, "--format", "json", "--output", str(report), success_codes=range(256))
        dependencies = json.loads(report.read_text())["dependencies"]
    except (CommandFailed, OSError, ValueError, KeyError, TypeError) as error:
        return session.warn(f"nobody could be asked for vulnerabilities ({error}): run it again with a network")
    found = [f"{d['name']} {d['version']}: {v['id']}" for d in dependencies for v in d.get("vulns", ())]
    if found:
        session.error(
            "\n".join(["known vulnerabilities; `nox -s constraints -- --upgrade` takes newer releases", *found])
        )


@nox.session(venv_backend=BACKEND, default=False)
def reproduce_tables(session: nox.Session) -> None:
    """Train what the papers' tables lack and write them; `-- --dry-run` lists it, `-- --only dino_table7`."""
    _install_project(session)
    _dinobench(session, "table", *session.posargs)


@nox.session(venv_backend=BACKEND, default=False)
def retrain_one_cell(session: nox.Session) -> None:
    """Train one committed cell again, chosen by the commit (or by `-- COMMIT`), and compare it with its record."""
    _install_project(session)
    commit = session.run("git", "rev-parse", *(session.posargs or ["HEAD"]), external=True, silent=True)
    _dinobench(session, "table", "--retrain", str(commit).strip())


def _running_pins(folder: Path) -> Path:
    """The running environment's versions as constraints: uv has them in its cache, so nothing is downloaded twice."""
    pins = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions() if d.name not in PACKAGES})
    path = folder / "running-constraints.txt"
    path.write_text("\n".join(pins) + "\n")
    return path


def _check_content(session: nox.Session, wheel_file: Path) -> None:
    """The wheel holds exactly the three packages, with every recipe, preset, definition and figure in them."""
    held = set(zipfile.ZipFile(wheel_file).namelist())
    tops = {name.split("/")[0] for name in held if ".dist-info/" not in name}
    if tops != set(PACKAGES):
        session.error(f"the wheel holds {sorted(tops)}, expected {sorted(PACKAGES)}")
    source = {p.relative_to(ROOT).as_posix() for top in PACKAGES for p in (ROOT / top).rglob("*") if p.is_file()}
    missing = {name for name in source if "__pycache__" not in name} - held
    if missing:
        session.error(f"not in the wheel: {sorted(missing)}")


@nox.session(reuse_venv=False, default=False)
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it afresh, run it from an empty folder and beside a decoy pretrain.py."""
    built = Path(session.create_tmp()).absolute() / "wheel"
    shutil.rmtree(built, ignore_errors=True)
    if session.venv_backend == "uv":
        session.run("uv", "build", "--quiet", "--wheel", "--out-dir", str(built), external=True)
    else:
        session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), ".")
    (wheel_file,) = built.glob("*.whl")
    _check_content(session, wheel_file)
    session.install("-c", str(_running_pins(built)) if HERE else "constraints.txt", str(wheel_file))
    for name, decoy in {
        "empty": None,
        "decoy": "raise SystemExit('a file of the user was imported instead of ours')\n",
    }.items():
        folder = built / name
        folder.mkdir()
        if decoy:
            (folder / "pretrain.py").write_text(decoy)
        with session.chdir(folder):
            session.run("dinobench", "--help", silent=True)
            session.run("dinobench", "ls", "methods")
            session.run("dinobench", "pretrain", "dino_vmf", "--dry-run", silent=True)


@nox.session(venv_backend="none", default=False)
def constraints(session: nox.Session) -> None:
    """Write constraints.txt (names, versions, markers, no hosts); `-- --upgrade` takes newer releases first."""
    session.run("uv", "lock", *session.posargs, external=True)
    options = ("--locked", "--no-hashes", "--no-annotate", "--no-header", "--no-emit-project")
    pins = session.run("uv", "export", "--quiet", *options, external=True, silent=True)
    if not isinstance(pins, str) or "://" in pins:
        session.error("the export is empty or names a host")
    header = "# Every dependency at the versions the tests were run with. Written by `uv run nox -s constraints`.\n"
    (ROOT / "constraints.txt").write_text(header + pins)
