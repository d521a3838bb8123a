"""The run folder: where a pretraining keeps everything, and how the same command finds it again.

    <output>/<method>-<arch>-<data>-s<seed>-<id>/          <id> = 8 hex digits of the recipe's science and seed
        recipe.yaml        the resolved recipe, itself a recipe
        run.json           state: status, step, the run's own key
        environment.json   machine, package versions, commit and command of every start
        metrics.jsonl      the truth; MLflow mirrors it
        train.log          what was said
        checkpoints/       last.pt, step=<n>.pt
        evals/             <suite>@<version>/<checkpoint hash>.json
        samples/           per-image correctness (parquet)
        figures/           curves and the prototype histogram
A second run of the same recipe (`--new`) is numbered: ...-<id>-2.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from dinobench.files import make_folder, not_writable, read_json, slug, write_json, write_text
from dinobench.journal import Journal
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    from pretrain.training.recipe import Recipe

LOCK_SECONDS = 1.0
"""Who looks whether anyone holds the lock holds it for a moment (`is_held`)."""
LOOK_SECONDS = 0.2
"""For the same reason: two who look at once must not take each other for the run."""
_REWRITE = "remove it and start the same command with --resume, which writes it again"
Status = Literal["running", "interrupted", "finished", "collapsed", "failed"]


class RunState(BaseModel):
    """run.json. `running` without a process that holds the lock means: it was killed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    """Drawn when the folder is made; what ties it to its entry in MLflow."""
    status: Status = "running"
    step: int = 0
    seconds: float = 0.0
    """Training time, summed over starts."""
    images_per_second: float = 0.0
    process: str = ""
    """<host>:<process id> of the last start."""
    note: str = ""
    mirrored: bool = False
    """Whether MLflow shows all of it; else the next start of the same command brings it up to date."""


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def state_file(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "last.pt"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def log_file(self) -> Path:
        return self.path / "train.log"

    @property
    def cell_file(self) -> Path:
        """Hidden: a folder with other files is no empty run folder."""
        return self.path / ".cell.json"

    @property
    def _holder_file(self) -> Path:
        return self.path / ".holder"

    @property
    def journal(self) -> Journal:
        return Journal(self.path / "metrics.jsonl")

    @property
    def exists(self) -> bool:
        return self.state_file.is_file()

    def state(self) -> RunState:
        try:
            return RunState.model_validate(read_json(self.state_file))
        except ValidationError as error:
            raise DinobenchError(
                f"{self.state_file} was altered: {error.error_count()} fields are wrong; move it away, then --resume "
                "goes on from the checkpoint"
            ) from error

    def update(self, **changes: Any) -> RunState:
        """Change fields of run.json, atomically."""
        state = RunState.model_validate({**self.state().model_dump(), **changes})
        write_json(self.state_file, state.model_dump())
        return state

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        from pretrain.mapping import parse_yaml

        try:
            recipe = parse_yaml(self.recipe_file.read_text(encoding="utf-8"), str(self.recipe_file))
        except (OSError, ValueError) as error:
            raise DinobenchError(f"cannot read {self.recipe_file}: it is missing or damaged; {_REWRITE}") from error
        if not isinstance(recipe, dict):
            raise DinobenchError(f"{self.recipe_file} is not a recipe: it was altered or damaged; {_REWRITE}")
        return recipe

    def kept_checkpoints(self) -> list[Path]:
        """The kept checkpoints, oldest first; last.pt alone when there is no other. Other names are not ours."""
        found = [path for path in self.checkpoints.glob("step=*.pt") if path.stem.partition("=")[2].isdecimal()]
        numbered = sorted(found, key=lambda path: int(path.stem.partition("=")[2]))
        return numbered or [path for path in (self.last_checkpoint,) if path.is_file()]

    def cell(self) -> str | None:
        """The cell of a table that this run was made for, if it was."""
        document = read_json(self.cell_file) if self.cell_file.is_file() else {"key": None}
        if not isinstance(document, dict) or not isinstance(document.get("key"), str | None):
            raise DinobenchError(f"{self.cell_file} was altered or damaged: it names no cell; move it away")
        return document.get("key")

    def starts(self) -> list[dict[str, Any]]:
        """environment.json: machine, versions, commit and command of every start, the oldest first."""
        file = self.path / "environment.json"
        document = read_json(file) if file.is_file() else {"starts": []}
        starts = document.get("starts") if isinstance(document, dict) else None
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise DinobenchError(f"{file} was altered or damaged: it has no list of starts; move it away")
        return starts

    def create(self, recipe: Recipe) -> None:
        """Fill a new folder. run.json comes last: a folder without it was never started, or has lost it."""
        for folder in (self.checkpoints, self.figures, self.path / "evals", self.path / "samples"):
            make_folder(folder)
        write_text(self.recipe_file, recipe.to_yaml())
        write_json(self.state_file, RunState(key=uuid.uuid4().hex, process=_this_process()).model_dump())

    def started(self, environment: dict[str, Any]) -> RunState:
        """Note a start: in run.json who runs it now, in environment.json on what."""
        write_json(self.path / "environment.json", {"starts": [*self.starts(), environment]})
        return self.update(status="running", process=_this_process(), note="", mirrored=False)

    def holder(self) -> str:
        """<host>:<process id> of who locked the folder last."""
        try:
            return self._holder_file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return "?"

    def is_held(self) -> bool:
        """Whether a process works in this folder now; one that we may only read counts as free."""
        try:
            with FileLock(self.path / ".lock", timeout=LOOK_SECONDS):
                return False
        except Timeout:
            return True
        except OSError:
            return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process works in a run folder; `holder` says which. The system frees the lock of a killed process.

        Raises:
            DinobenchError: another process holds it, or we may not write there.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise DinobenchError(
                f"another process ({self.holder()}) is working on {self.path}: wait for it (`dinobench runs show "
                f"{self.path}` says how far it is), or start a second run with --new"
            ) from None
        except OSError as error:
            raise not_writable(self.path, error) from error
        try:
            write_text(self._holder_file, _this_process())
            yield
        finally:
            lock.release()


def find_run(recipe: Recipe, output: Path, *, new: bool = False) -> RunFolder:
    """The folder of this recipe under `output`, see `locate_run`; made where it is not there.

    Raises:
        DinobenchError: `output` is a run folder itself, the folder holds another recipe, or we may not write there.
    """
    run = locate_run(recipe, output, new=new)
    make_folder(run.path)
    _refuse_other_recipe(run, recipe)
    return run


def locate_run(recipe: Recipe, output: Path, *, new: bool = False) -> RunFolder:
    """Where a start of this recipe works: the latest of its runs, or a number not yet taken. Nothing is made.

    Raises:
        DinobenchError: `output` is a run folder itself.
    """
    if (output / "recipe.yaml").is_file():
        raise DinobenchError(
            f"--output {output} is a run folder with a recipe of its own; name the folder that holds the runs, "
            f"like --output {output.parent}"
        )
    name = f"{slug(recipe.label)}-s{recipe.seed}-{recipe.identity}"
    number = 1
    while (output / _numbered(name, number + 1)).exists():
        number += 1
    run = RunFolder(output / _numbered(name, number))
    if new and (run.exists or run.kept_checkpoints()):
        run = RunFolder(output / _numbered(name, number + 1))
    return run


def _refuse_other_recipe(run: RunFolder, recipe: Recipe) -> None:
    from pretrain.training.recipe import recipe_hash

    if run.recipe_file.is_file():
        try:
            found = recipe_hash(run.recipe())[:8]
        except (AttributeError, TypeError):  # a section that is none, a value that JSON does not have
            found = "none"
        if found != recipe.identity:
            raise DinobenchError(
                f"{run.path} holds another recipe (id {found}, this one is {recipe.identity}): "
                "its recipe.yaml was changed; choose another --output or move the folder away"
            )
    elif run.exists or run.kept_checkpoints():
        return  # its recipe.yaml is lost and will be written again: the name of the folder says which recipe it was
    elif strangers := sorted(path.name for path in run.path.iterdir() if not path.name.startswith(".")):
        known = {"checkpoints", "figures", "evals", "samples"}
        if set(strangers) - known:
            raise DinobenchError(
                f"{run.path} is not a run folder but holds {strangers[0]}: choose another --output or move it away"
            )


def list_runs(output: Path) -> list[RunFolder]:
    """All runs under `output`, by name."""
    return [RunFolder(file.parent) for file in sorted(output.glob("*/run.json"))]


def open_run(path: Path) -> RunFolder:
    """An existing run.

    Raises:
        DinobenchError: there is none.
    """
    run = RunFolder(path)
    if not run.exists:
        raise DinobenchError(f"{path} is not a run folder (it has no run.json); `dinobench runs ls` lists them")
    return run


def run_of_checkpoint(checkpoint: Path) -> RunFolder | None:
    """The run in whose folder a checkpoint lies, or None for a lone file."""
    run = RunFolder(checkpoint.absolute().parent.parent)
    return run if checkpoint.absolute().parent == run.checkpoints and run.exists else None


def describe_status(run: RunFolder) -> str:
    """The status in one word; `killed` is a run that says running while nobody works on it."""
    status = run.state().status
    return "killed" if status == "running" and not run.is_held() else status


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
