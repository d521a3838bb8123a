"""The recipe: everything that defines a training, typed and strict. Its dump is a recipe again.

Merged in this order, later wins:
    field defaults < presets/<scale>.yaml < recipes/<method>.yaml < its section `at: {<preset>: ...}` < command line
The sections up to `schedule` are the science and, with the seed, give a run its identity; the rest is plumbing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from pretrain.data.datasets import DataConfig, dataset_label
from pretrain.data.masks import MaskConfig
from pretrain.data.views import ViewsConfig
from pretrain.errors import UsageError, unknown_name
from pretrain.mapping import MAX_DEPTH, parse_yaml, read_mapping
from pretrain.methods import method as methods
from pretrain.models.backbones import ModelConfig
from pretrain.models.heads import HeadConfig
from pretrain.models.patch_head import PatchConfig
from pretrain.objectives.losses import ObjectiveConfig
from pretrain.objectives.regularizers import RegularizerConfig
from pretrain.objectives.targets import TargetConfig
from pretrain.training import ablations
from pretrain.training.optim import OptimConfig
from pretrain.training.runtime import RuntimeConfig
from pretrain.training.schedules import ScheduleConfig
from pretrain.training.teacher import TeacherConfig

PRESETS_FOLDER = Path(__file__).parent.parent / "recipes" / "presets"
PLUMBING = ("runtime", "tracking", "checkpoint", "evaluation")
_ONE_ARGUMENT = "model.kwargs."


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodConfig(_Section):
    """Which method, and the parameters it defines itself."""

    name: str
    parameters: dict[str, Any] = {}


class TrackingConfig(_Section):
    """MLflow."""

    enabled: bool = True
    require: bool = False
    """Stop when the tracking server cannot be reached; otherwise the run goes on with its journal."""
    label: str = ""
    """Which row of which ablation this is, as `ablation/row`."""


class CheckpointConfig(_Section):
    """When checkpoints are written and which are kept."""

    every_epochs: int = Field(default=20, ge=1)
    """Epochs between two kept checkpoints; the last step is always kept."""
    every_steps: int = Field(default=0, ge=0)
    """Steps between two writes of last.pt, from which a run resumes; 0 = at every kept checkpoint only."""
    keep: int = Field(default=5, ge=1)
    """How many kept checkpoints stay; older ones are removed, last.pt never."""


class EvaluationConfig(_Section):
    """Suites that run on every kept checkpoint after the training."""

    suites: tuple[str, ...] = ()


class Recipe(_Section):
    """A resolved recipe."""

    method: MethodConfig
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    masks: MaskConfig = MaskConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    patch: PatchConfig = PatchConfig()
    target: TargetConfig = TargetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    seed: int = Field(default=0, ge=0)
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _source: str | None = PrivateAttr(default=None)
    _preset: str | None = PrivateAttr(default=None)

    @property
    def origins(self) -> dict[str, str]:
        """Where each value that is not a field default came from: dotted key -> file or command line."""
        return self._origins

    @property
    def source(self) -> str | None:
        """Path of the method's file when it lies outside the package."""
        return self._source

    @property
    def preset(self) -> str | None:
        return self._preset

    @property
    def identity(self) -> str:
        """First 8 hex digits of the hash of the science sections and the seed."""
        return recipe_hash(self.model_dump(mode="json"))[:8]

    @property
    def label(self) -> str:
        """<method>-<arch>-<data>: what a reader tells runs apart by."""
        return f"{self.method.name}-{self.model.label}-{dataset_label(self.data.name)}"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def recipe_hash(recipe: dict[str, Any]) -> str:
    """SHA-256 of a recipe's science sections and seed, from its plain dump (as stored in a checkpoint)."""
    science = {key: value for key, value in recipe.items() if key not in PLUMBING}
    if "data" in science:  # where the images lie is plumbing
        science["data"] = {key: value for key, value in science["data"].items() if key != "cache"}
    return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS_FOLDER.glob("*.yaml"))


def resolve(
    method: str,
    *,
    preset: str | None = None,
    data: str | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe of a method at a preset, with overrides `section.key=value`.

    `model.kwargs.depth=4` changes one argument of the network, `model.kwargs={depth: 4}` all of them.
    `method` is a name, a row of an ablation (`dino_table7/mse`), the path of a method's .py file, or the path of a
    resolved recipe (.yaml), which is taken as it is, without preset.

    Raises:
        UsageError: an unknown method, preset or key (the nearest name is offered), or a value of the wrong type.
    """
    merged, origins = {}, {}
    source = None
    if method.endswith((".yaml", ".yml")):
        if preset or data:
            raise UsageError(f"{method} is a resolved recipe: it takes no --preset or --data, only key=value")
        _merge(merged, origins, _read_yaml(Path(method)), Path(method).name)
    else:
        preset = _choose_preset(preset, data)
        row, layers = "", []
        if not method.endswith(".py") and ("/" in method or method in ablations.ablation_names()):
            row, (method, layers) = method, ablations.find_row(method, preset)
        file, recipe_file = methods.find_method(method)
        source = str(file) if file.parent != methods.METHODS_FOLDER else None
        recipe = _read_yaml(recipe_file)
        at = recipe.pop("at", {})
        _merge(merged, origins, {"method": {"name": file.stem}}, recipe_file.name)
        _merge(merged, origins, _read_yaml(PRESETS_FOLDER / f"{preset}.yaml"), f"presets/{preset}.yaml")
        _merge(merged, origins, recipe, recipe_file.name)
        _merge(merged, origins, at.get(preset, {}), f"{recipe_file.name} at {preset}")
        for layer in [*layers, {"tracking": {"label": row}}] if row else []:
            _merge(merged, origins, layer, row)
    command: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for text in overrides:
        layer = _override(text)
        if text.startswith(_ONE_ARGUMENT):
            arguments |= layer["model"]["kwargs"]
        else:
            _merge(command, {}, layer, "")
    if data is not None:
        _merge(command, {}, {"data": {"name": data}}, "")
    if seed is not None:
        command["seed"] = seed
    _merge(merged, origins, command, "command line")
    if arguments:
        model = merged.setdefault("model", {})
        model["kwargs"], origins["model.kwargs"] = {**model.get("kwargs", {}), **arguments}, "command line"
    return _validate(merged, origins, source, preset)


def _validate(merged: dict, origins: dict[str, str], source: str | None, preset: str | None) -> Recipe:
    _check_keys(merged, Recipe)
    try:
        recipe = Recipe.model_validate(merged)
        methods.parameters_of(recipe.method.name, recipe.method.parameters, source)
    except ValidationError as error:
        raise UsageError(_explain(error, origins)) from None
    recipe._origins, recipe._source, recipe._preset = origins, source, preset
    return recipe


def _choose_preset(preset: str | None, data: str | None) -> str:
    """The preset asked for; else the one made for the data set; else digits, or ImageNet scale for other images."""
    names = preset_names()
    if preset is not None:
        if preset not in names:
            raise unknown_name("preset", preset, names)
        return preset
    if data is None:
        return "digits"
    base = data.split("[")[0].split(":")[0]
    return base if base in names else "imagenet_vits16"


def _read_yaml(path: Path) -> dict[str, Any]:
    return read_mapping(path, kind="recipe", holds="sections (key: value)")


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"override {text!r} is not of the form section.key=value, for example optim.lr=0.001")
    if key.count(".") > MAX_DEPTH:
        raise UsageError(f"override {text[:80]!r}... names a key in {key.count('.')} sections, expected one or two")
    result = parse_yaml(value, f"the value of the override {text!r}")
    for part in reversed(key.split(".")):
        result = {part: result}
    return result


def _merge(into: dict, origins: dict[str, str], layer: dict, origin: str, prefix: str = "") -> None:
    """Merge `layer` into `into` in place. `model.kwargs` belongs to the model's name: a layer replaces it whole."""
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and dotted != "model.kwargs":
            old = into.get(key)
            into[key] = dict(old) if isinstance(old, dict) else {}
            _merge(into[key], origins, value, origin, f"{dotted}.")
        else:
            into[key], origins[dotted] = value, origin


def _check_keys(values: dict, model: type[BaseModel], prefix: str = "") -> None:
    for key, value in values.items():
        if key not in model.model_fields:
            near = unknown_name("key", f"{prefix}{key}", [f"{prefix}{name}" for name in model.model_fields])
            raise near
        section = _section_type(model.model_fields[key].annotation)
        if section is not None:
            if not isinstance(value, dict):
                raise UsageError(f"{prefix}{key} is a section: write {prefix}{key}.<key>=value, not a single value")
            _check_keys(value, section, f"{prefix}{key}.")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    candidates: Iterator[Any] = iter((annotation, *get_args(annotation)))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _explain(error: ValidationError, origins: dict[str, str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    origin = f" (from {origins[key]})" if key in origins else ""
    return f"{key}={first['input']!r}{origin}: {first['msg'][0].lower()}{first['msg'][1:]}"
