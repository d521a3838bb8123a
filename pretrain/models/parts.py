"""What is asked of a checkpoint file, and what a layout gives back: the contract between `load` and the layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pretrain.models.backbones import ModelConfig
from pretrain.models.foreign_heads import ForeignPrototypes
from pretrain.models.heads import HeadConfig
from pretrain.models.patch_prototypes import PatchParts

Network = Literal["teacher", "student"]
Payload = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What to take out of a file."""

    path: Path
    network: Network = "teacher"
    num_heads: int | None = None
    """Attention heads of a ViT; None: as its width tells."""
    model: ModelConfig | None = None
    """The architecture; None: as the shapes tell."""


@dataclass(frozen=True)
class Parts:
    """What a layout finds in a file."""

    model: ModelConfig
    head: HeadConfig | None
    state: Mapping[str, Tensor]
    """Keys `backbone.*`, `head.*` and `patch_head.*`, named as the modules that `model`, `head` and `patch` build."""
    temperature: float | None
    facts: dict[str, Any] = field(default_factory=dict)
    prototypes: ForeignPrototypes | None = None
    """Where they can stand alone because the MLP before them is absent or does not fit."""
    patch: PatchParts | None = None
    """The head of the patch tokens."""
    dropped: tuple[str, ...] = ()
    """Parameters left out already because no feature depends on them."""
    droppable: re.Pattern[str] | None = None
    """Names of the backbone that may be left out where they have no place; None: every tensor must have one."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One way to arrange a checkpoint file."""

    name: str
    recognises: Callable[[Payload], bool]
    take_apart: Callable[[Payload, Request], Parts]
