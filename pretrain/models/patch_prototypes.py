"""The head of the patch tokens of a checkpoint, beside that of the image tokens.

    shared       one head for both: iBOT's `shared_head`, DINOv2 without `separate_head`
    last_layer   the MLP of the image head, prototypes of its own: iBOT's `last_layer2`, our `patch_last_layer`
    separate     a head of its own: DINOv2's `ibot_head`, our `patch_head`

Its parameters lie under `patch_head.*` in the parts of a file, MLP included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.models.filling import Match, fill
from pretrain.models.foreign_heads import ForeignPrototypes, read_mlp, read_prototypes
from pretrain.models.heads import HeadConfig, ProjectionHead
from pretrain.models.patch_head import PatchConfig
from pretrain.models.prototypes import Prototypes

State = dict[str, Tensor]
PatchKind = Literal["shared", "last_layer", "separate"]


@dataclass(frozen=True)
class PatchParts:
    """What a layout finds of it."""

    kind: PatchKind
    temperature: float | None = None
    """tau at which this network used them when the file was written."""
    head: HeadConfig | None = None
    """None for a shared head, and where no MLP leads to the prototypes."""
    prototypes: ForeignPrototypes | None = None
    """Where they can stand alone."""


@dataclass
class PatchPrototypes:
    """The prototypes of the patch tokens of a loaded network."""

    kind: PatchKind
    head: ProjectionHead | None
    """The image head itself where it is shared."""
    prototypes: Prototypes
    temperature: float | None
    beside: ProjectionHead | None
    """The image head they were loaded with."""


def build(
    parts: PatchParts, state: Mapping[str, Tensor], image_head: ProjectionHead | None, dim: int
) -> PatchPrototypes | Match | None:
    """The patch head of a file; None where there is nothing to build, the match where it does not fit.

    Args:
        parts: what the layout found.
        state: with the keys `patch_head.*`.
        image_head: the loaded head of the image tokens.
        dim: D of the backbone.
    """
    if parts.kind == "shared":
        if image_head is None or image_head.last_layer is None:
            return None
        return PatchPrototypes("shared", image_head, image_head.last_layer, parts.temperature, image_head)
    if parts.head is not None:
        head = ProjectionHead(dim, parts.head)
        match = fill(head, state, "patch_head.")
        if match.complete:
            return PatchPrototypes(parts.kind, head, head.last_layer, parts.temperature, image_head)
        if parts.prototypes is None:
            return match
    if parts.prototypes is None:
        return None
    return PatchPrototypes(parts.kind, None, parts.prototypes.build(), parts.temperature, image_head)


def find_ours(
    config: PatchConfig | None, image: HeadConfig | None, state: Mapping[str, Tensor], temperature: float | None
) -> tuple[PatchParts | None, State]:
    """The patch head in a network of ours and what is to be added to its state: the MLP that `last_layer` shares."""
    if config is None or image is None or not config.weight:
        return None, {}
    if config.head == "shared":
        return PatchParts("shared", temperature), {}
    added: State = {}
    if config.head == "last_layer":
        for own, where in (("head.mlp.", "mlp."), ("patch_last_layer.", "last_layer.")):
            added |= {f"patch_head.{where}{n.removeprefix(own)}": v for n, v in state.items() if n.startswith(own)}
    return PatchParts(config.head, temperature, config.head_config(image)), added


def our_temperature(config: PatchConfig, recipe: Mapping[str, Any], payload: Mapping[str, Any]) -> float | None:
    """tau_t of the patches in a file of ours; None while it still rises on a way of its own."""
    own = (config.temperature, config.warmup_temperature, config.warmup_epochs)
    start = (recipe.get("masks") or {}).get("start_epoch", 0)
    if own == (None, None, None) and not start:
        return payload.get("teacher_temperature")
    target = recipe.get("target") or {}
    warmup = target.get("warmup_epochs", 0) if config.warmup_epochs is None else config.warmup_epochs
    if payload.get("epoch", 0) < start + warmup:
        return None
    return target.get("temperature") if config.temperature is None else config.temperature


def find_foreign(state: State, image: State, prefix: str, temperature: float | None) -> tuple[PatchParts | None, State]:
    """The patch head of another project.

    Args:
        state: parameters of the patch head; those of iBOT's head, where the prototypes alone are its own.
        image: parameters of the image head.
        prefix: of the patch prototypes in `state`.
        temperature: at which they were used.

    Returns:
        The parts, and their parameters under `patch_head.*`; None where there are no such prototypes.
    """
    found = read_prototypes(state, prefix)
    if found is None:
        return None, {}
    same = read_prototypes(image, "last_layer.")
    if state is image and same is not None and _equal(found.state, same.state):
        return PatchParts("shared", temperature), {}
    mlp = read_mlp(state, found, "gelu")
    config, parameters = mlp if mlp is not None else (None, {})
    kind: PatchKind = "last_layer" if state is image else "separate"
    named = {f"patch_head.{name}": value for name, value in parameters.items()}
    return PatchParts(kind, temperature, config, found), named


def _equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
