"""The contract between a method and the training loop, and the catalogue of methods.

The file system is the registry: `pretrain/methods/dino.py` is the method `dino`, its last line names `METHOD`, and
`pretrain/recipes/dino.yaml` is its recipe. DINOBENCH_METHODS=DIR adds a folder laid out the same way (file and recipe
side by side); a path to a .py file works as a name too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pretrain.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from pretrain.data.loader import Batch
    from pretrain.models.prototypes import Prototypes
    from pretrain.training.health import Health
    from pretrain.training.recipe import Recipe
    from pretrain.training.schedules import Plan

METHODS_FOLDER = Path(__file__).parent
RECIPES_FOLDER = METHODS_FOLDER.parent / "recipes"


class NoParameters(BaseModel):
    """A method without parameters of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Method(nn.Module):
    """What the loop needs from a method. Everything a checkpoint must hold is in `state_dict()`.

    `student` is what the optimiser trains, with `backbone.*` and `head.*` below it; `teacher` is evaluated.
    The loop calls, per step: `before_step`, `loss` (once per micro-batch), backward, `before_update`, the optimiser,
    `after_step`.
    """

    Parameters: ClassVar[type[BaseModel]] = NoParameters
    """Validates `method.parameters` of the recipe."""

    # Both are an nn.Module; Any lets a method name its own class.
    student: Any
    teacher: Any
    health: Health

    def __init__(self, recipe: Recipe, plan: Plan):
        super().__init__()
        self.recipe, self.plan = recipe, plan

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, a scalar, and the device scalars that `health` was told to expect."""
        raise TypeError(f"{type(self).__name__} must define loss(batch, step)")

    def before_step(self, step: int) -> None:
        """Prepare a step, before its first micro-batch."""

    def before_update(self, step: int) -> None:
        """Change the gradients before clipping is done and the optimiser runs."""

    def after_step(self, step: int) -> None:
        """Update what is not trained by gradient: teacher, centre."""

    def values(self, step: int) -> dict[str, float]:
        """Scheduled values of this step, for the log."""
        return {}

    def backbone(self) -> nn.Module:
        """The network to evaluate: images [B, 3, H, W] -> features [B, D]."""
        return self.teacher.get_submodule("backbone")

    def prototypes(self, head: Literal["image", "patch"] = "image") -> Prototypes | None:
        """The prototypes to analyse, or None for a method without, or without any of its own for patches."""
        return None

    def teacher_temperature(self, step: int) -> float | None:
        """The temperature at which the teacher's prototypes were used, or None."""
        return None

    def distribute(self, student: nn.Module) -> None:
        """Use `student` (the same network, wrapped for several ranks) for the forward pass."""
        object.__setattr__(self, "_distributed", student)

    @property
    def forward_student(self) -> nn.Module:
        return getattr(self, "_distributed", self.student)

    def no_sync(self) -> AbstractContextManager:
        """No gradient exchange between ranks inside: for all micro-batches of a step but the last."""
        distributed = getattr(self, "_distributed", None)
        return distributed.no_sync() if distributed is not None else nullcontext()


def method_names() -> list[str]:
    """Every method that has a file and a recipe, in the package and in DINOBENCH_METHODS."""
    return sorted({path.stem for folder in _folders() for path in _method_files(folder)})


def find_method(name: str) -> tuple[Path, Path]:
    """The file and the recipe of a method, given by name or by the path of its .py file.

    Raises:
        UsageError: there is no such method (the nearest name is offered), or a file lacks its recipe.
    """
    if name.endswith(".py"):
        source = Path(name).resolve()
        if not source.is_file():
            raise UsageError(f"no method file {source}: give the path of a .py file or one of {method_names()}")
        if not source.with_suffix(".yaml").is_file():
            raise UsageError(f"{source.name} has no recipe beside it: write {source.with_suffix('.yaml')}")
        return source, source.with_suffix(".yaml")
    for folder in _folders():
        for path in _method_files(folder):
            if path.stem == name:
                return path, _recipe_of(path)
    raise unknown_name("method", name, method_names())


def load_method(name: str, source: str | None = None) -> type[Method]:
    """The class that `METHOD` names in the method's file. Errors inside the file are not hidden."""
    path, _ = find_method(source or name)
    module = _import(path)
    method = getattr(module, "METHOD", None)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UsageError(f"{path} must end with `METHOD = <a subclass of pretrain.methods.method.Method>`")
    return method


def parameters_of(name: str, values: dict[str, Any], source: str | None = None) -> BaseModel:
    """The method's own parameters, validated."""
    return load_method(name, source).Parameters.model_validate(values)


def _folders() -> Iterator[Path]:
    yield METHODS_FOLDER
    if extra := os.environ.get("DINOBENCH_METHODS"):
        folder = Path(extra).expanduser()
        if not folder.is_dir():
            raise UsageError(f"DINOBENCH_METHODS={extra} is not a folder: set it to one, or unset it")
        yield folder.resolve()


def _method_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if _recipe_of(path).is_file()]


def _recipe_of(path: Path) -> Path:
    return (RECIPES_FOLDER if path.parent == METHODS_FOLDER else path.parent) / f"{path.stem}.yaml"


def _import(path: Path) -> ModuleType:
    if path.parent == METHODS_FOLDER:
        return importlib.import_module(f"pretrain.methods.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"dinobench_method_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
