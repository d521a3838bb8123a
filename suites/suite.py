"""A suite: a protocol on a data set with every number pinned, under a name and a version.

Definitions are YAML files, shipped in suites/definitions or anywhere on disk. The fingerprint is a hash of everything
that can change a score; it is paired with the version by a test, so that a changed number raises the version.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain.data.transforms import EvalTransform
from pretrain.errors import UsageError, unknown_name
from pretrain.mapping import read_mapping

DEFINITIONS = Path(__file__).parent / "definitions"
PROTOCOLS = Path(__file__).parent / "protocols"
_HELPERS = {"__init__", "protocol"}


class LastBlocks(BaseModel):
    """Concatenated CLS tokens of the last blocks, then the mean patch token of the last one if asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    last: int = Field(default=1, ge=1)
    avgpool: bool = False


Feature = Literal["cls", "cls+avg", "dino"] | LastBlocks
"""cls: pooled features of the backbone (CLS after the final norm). cls+avg: and the mean patch token. dino: the choice
of DINO's linear protocol by width, see suites.features."""
Baseline = Literal["raw_pixels", "pca", "random_init"]


class SuiteDataset(BaseModel):
    """What is measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    """Name or URI; None leaves it to the caller."""
    train: str = "train"
    test: str = "test"


class Suite(BaseModel):
    """One definition."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    version: int = Field(ge=1)
    protocol: str
    dataset: SuiteDataset = SuiteDataset()
    transform: EvalTransform = EvalTransform.model_validate({})
    feature: Feature = "cls"
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Of the protocol; checked by its own Parameters."""
    headline: str
    """The one score that is compared between checkpoints."""
    baselines: tuple[Baseline, ...] = ("raw_pixels", "pca", "random_init")
    """Measured once per data set beside the checkpoint. Not part of the fingerprint: they change no score."""
    baseline_seeds: int = Field(default=3, ge=1)
    """Random initialisations whose mean is the baseline random_init."""
    paper: str = ""
    description: str = ""

    @model_validator(mode="after")
    def _check_protocol(self) -> Suite:
        module = protocol_module(self.protocol)
        try:
            module.Parameters.model_validate(self.parameters)
        except ValidationError as error:
            raise UsageError(f"suite {self.name!r}: {_explain(error, 'parameters')}") from None
        if self.needs_prototypes and self.feature != "cls":
            raise UsageError(
                f"suite {self.name!r}: protocol {self.protocol!r} applies the head to the backbone's own features: "
                f"expected feature cls, found {self.feature!r}"
            )
        if self.reads_images and (self.feature, self.transform) != ("cls", EvalTransform.model_validate({})):
            raise UsageError(
                f"suite {self.name!r}: protocol {self.protocol!r} pins size and normalisation in its parameters: "
                "expected neither transform nor feature"
            )
        return self

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def needs_prototypes(self) -> bool:
        """Whether the protocol says nothing about a checkpoint without prototypes."""
        return getattr(protocol_module(self.protocol), "NEEDS_HEAD", False)

    @property
    def reads_images(self) -> bool:
        """Whether the protocol extracts its own features, see suites.protocols.protocol."""
        return getattr(protocol_module(self.protocol), "READS_IMAGES", False)

    def resolved_parameters(self) -> Any:
        """The protocol's Parameters with this suite's values."""
        return protocol_module(self.protocol).Parameters.model_validate(self.parameters)

    def fingerprint(self) -> str:
        """12 hex digits over protocol, data set, transform, feature, parameters (defaults included) and headline."""
        pinned = self.model_dump(
            mode="json", exclude={"name", "version", "baselines", "baseline_seeds", "paper", "description"}
        )
        if self.reads_images:
            del pinned["transform"], pinned["feature"]  # not used
        pinned["parameters"] = self.resolved_parameters().model_dump(mode="json")
        return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()[:12]


def protocol_names() -> list[str]:
    """The files of suites/protocols."""
    return sorted(path.stem for path in PROTOCOLS.glob("*.py") if path.stem not in _HELPERS)


def protocol_module(name: str) -> ModuleType:
    """The module of a protocol, checked to exist first so that its own errors speak."""
    if name not in protocol_names():
        raise unknown_name("protocol", name, protocol_names())
    return importlib.import_module(f"suites.protocols.{name}")


def suite_names() -> list[str]:
    """Names of the shipped definitions."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def load_suite(name_or_path: str | Path) -> Suite:
    """A shipped suite by name (`digits_knn`, or `digits_knn@1` to insist on a version), or a definition by path.

    Raises:
        UsageError: unknown name or version, unreadable file, unknown key (the nearest one is named), wrong value.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text))
    name, _, version = text.partition("@")
    if name not in suite_names():
        raise unknown_name("suite", name, suite_names())
    suite = _read(DEFINITIONS / f"{name}.yaml")
    if version and version != str(suite.version):
        raise UsageError(f"suite {name!r} has version {suite.version} in this release, asked for was {version!r}")
    return suite


def _read(path: Path) -> Suite:
    content = read_mapping(path, kind="suite definition", holds="a suite (name: ..., protocol: ...)")
    for key in content:
        if key not in Suite.model_fields:
            raise unknown_name(f"key in {path.name}", str(key), Suite.model_fields)
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        raise UsageError(f"{path}: {cause if isinstance(cause, UsageError) else _explain(error)}") from None


def _explain(error: ValidationError, prefix: str = "") -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in ((prefix,) if prefix else ()) + first["loc"])
    return f"{key or 'definition'}: {first['msg']}, found {first['input']!r}"
