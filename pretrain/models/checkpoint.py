"""From a checkpoint file to a network that can be measured.

`load` builds backbone and head from the sections `model` and `head` of the recipe in the file. Other layouts enter
through LAYOUTS: one entry that recognises a file and names the function that takes it apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from pretrain.errors import DinobenchError, UsageError, unknown_name
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim
from pretrain.models.checkpoint_file import FORMAT, read, save
from pretrain.models.heads import HeadConfig, ProjectionHead
from pretrain.models.prototypes import Prototypes

__all__ = ["FORMAT", "LAYOUTS", "Layout", "LoadedModel", "Parts", "load", "read", "save", "weights_sha256"]

Network = Literal["teacher", "student"]
Config = TypeVar("Config", bound=BaseModel)


@dataclass
class LoadedModel:
    """A frozen network in eval mode, ready to be measured."""

    backbone: nn.Module
    """Images [B, 3, H, W] -> features [B, D]."""
    head: ProjectionHead | None
    prototypes: Prototypes | None
    normaliser: str
    """`none`, `vmf` or `vmf_leading`: what the head adds to its logits."""
    temperature: float | None
    """tau at which this network's prototypes were used when the file was written."""
    provenance: dict[str, Any]
    """path, sha256, format, method, arch, label, step, images_seen, epoch, seed, network, recipe_hash, weights_sha256,
    model (its ModelConfig as plain values), matched (number of backbone tensors), missing, unexpected, coverage
    (percent)."""

    def report(self) -> str:
        """What was loaded, in one line."""
        facts = self.provenance
        return (
            f"{facts['network']} of {facts['label']} at step {facts['step']} (epoch {facts['epoch']}, "
            f"{facts['images_seen']} images seen): {facts['matched']} backbone tensors matched, "
            f"{len(facts['missing'])} missing, {len(facts['unexpected'])} unexpected, "
            f"coverage {facts['coverage']:.0f} %"
        )


def load(path: str | Path, *, network: Network = "teacher") -> LoadedModel:
    """Build the network of a checkpoint for evaluation, from the file alone.

    Args:
        path: a checkpoint file.
        network: `teacher` (the default: what is evaluated in DINO) or `student`.

    Raises:
        DinobenchError: see `read`; also an unknown layout, or weights that do not fit the network in the recipe.
    """
    if network not in ("teacher", "student"):
        raise unknown_name("network", network, ("teacher", "student"))
    path = Path(path)
    payload = read(path, mmap=True)
    layout = next((layout for layout in LAYOUTS if layout.recognises(payload)), None)
    if layout is None:
        keys = ", ".join(sorted(str(key) for key in payload)[:8])
        raise DinobenchError(
            f"{path} has a layout that is not known here (keys: {keys}): "
            f"expected one of {', '.join(layout.name for layout in LAYOUTS)}"
        )
    parts = layout.take_apart(payload, network, path)
    return _assemble(parts, network, path, layout.name)


@dataclass(frozen=True)
class Parts:
    """What a layout finds in a file."""

    model: ModelConfig
    head: HeadConfig | None
    state: Mapping[str, Tensor]
    """Keys `backbone.*` and `head.*`."""
    temperature: float | None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One way to arrange a checkpoint file."""

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]
    take_apart: Callable[[Mapping[str, Any], Network, Path], Parts]


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _take_ours_apart(payload: Mapping[str, Any], network: Network, path: Path) -> Parts:
    # Imported here: the recipe's modules build on this package.
    from pretrain.training.recipe import recipe_hash

    absent = [key for key in ("recipe", network, "step") if key not in payload]
    if absent:
        raise DinobenchError(f"{path} is a {FORMAT} file without {', '.join(absent)}: take another checkpoint")
    recipe = payload["recipe"]
    model = _section(ModelConfig, recipe, "model", path)
    head = _section(HeadConfig, recipe, "head", path) if recipe.get("head") is not None else None
    method = _dig(recipe, "method", "name") or recipe.get("method")
    temperature = payload.get("teacher_temperature")
    if network == "student":
        temperature = _dig(recipe, "objective", "student_temperature")
    data = str(_dig(recipe, "data", "name") or "").split(":")[0]
    facts = {
        "method": method,
        "arch": model.label,
        "label": "-".join(str(part) for part in (method, model.label, data) if part),
        "recipe_hash": recipe_hash(recipe),
        "seed": payload.get("seed", recipe.get("seed")),
        **{key: payload.get(key) for key in ("step", "images_seen", "epoch")},
    }
    return Parts(model, head, payload[network], temperature, facts)


LAYOUTS: tuple[Layout, ...] = (Layout(FORMAT, lambda payload: payload.get("format") == FORMAT, _take_ours_apart),)


def _assemble(parts: Parts, network: Network, path: Path, layout: str) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten; the caller's generator stays put
        backbone = create_backbone(parts.model)
        head = ProjectionHead(feature_dim(backbone), parts.head) if parts.head is not None else None
    matched, missing, unexpected = _fill(backbone, parts.state, "backbone.", path)
    if head is not None:
        _fill(head, parts.state, "head.", path)
    for module in filter(None, (backbone, head)):
        module.eval().requires_grad_(False)
    with open(path, "rb") as file:
        file_hash = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "path": str(path),
        "sha256": file_hash,
        "format": layout,
        "network": network,
        **parts.facts,
        "model": parts.model.model_dump(mode="json"),
        "weights_sha256": weights_sha256(backbone),
        "matched": len(matched),
        "missing": missing,
        "unexpected": unexpected,
        "coverage": 100 * len(matched) / max(len(matched) + len(missing), 1),
    }
    prototypes = head.last_layer if head is not None else None
    normaliser = parts.head.normaliser if parts.head is not None else "none"
    return LoadedModel(backbone, head, prototypes, normaliser, parts.temperature, provenance)


def _fill(
    module: nn.Module, state: Mapping[str, Tensor], prefix: str, path: Path
) -> tuple[list[str], list[str], list[str]]:
    """Load the keys below `prefix`; anything that does not match exactly is refused. Gives the names by fate."""
    own = module.state_dict()
    given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    matched = sorted(own.keys() & given.keys())
    if missing or unexpected:
        raise DinobenchError(
            f"the {prefix[:-1]} in {path} does not fit its recipe: {len(matched)} tensors match, "
            f"missing {_listed(missing)}, unexpected {_listed(unexpected)}"
        )
    for name in matched:
        if own[name].shape != given[name].shape:
            raise DinobenchError(
                f"{prefix}{name} in {path} has shape {tuple(given[name].shape)}; "
                f"the recipe in the file makes it {tuple(own[name].shape)}"
            )
    module.load_state_dict(given)
    return matched, missing, unexpected


def _section(config: type[Config], recipe: Mapping[str, Any], name: str, path: Path) -> Config:
    try:
        return config.model_validate(recipe.get(name))
    except (ValidationError, UsageError) as error:
        raise DinobenchError(f"the section {name!r} of the recipe in {path} cannot be read: {error}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"


def _dig(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
