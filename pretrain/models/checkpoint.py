"""From a checkpoint file to a network that can be measured.

`load` builds backbone and head from the sections `model` and `head` of the recipe in a file of ours, and from names
and shapes in a file of another project (`layouts`, `timm_names`, `architectures`). Every tensor of the backbone must
find its place: a network that is half random still gives a number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from pretrain.errors import DinobenchError, UsageError, unknown_name
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim
from pretrain.models.checkpoint_file import FORMAT, SAFETENSORS, file_sha256, read, save, save_safetensors
from pretrain.models.filling import Match, fill, listed
from pretrain.models.heads import HeadConfig, ProjectionHead
from pretrain.models.layouts import FOREIGN
from pretrain.models.parts import Layout, Network, Parts, Payload, Request
from pretrain.models.patch_head import PatchConfig
from pretrain.models.patch_prototypes import PatchPrototypes, build, find_ours, our_temperature
from pretrain.models.prototypes import Prototypes

__all__ = [
    "EXPORT_FORMAT",
    "FORMAT",
    "LAYOUTS",
    "Layout",
    "LoadedModel",
    "Network",
    "Parts",
    "export",
    "load",
    "read",
    "save",
    "weights_sha256",
]

EXPORT_FORMAT = "dinobench-backbone-1"
_EXPORTED_FACTS = ("method", "arch", "label", "step", "images_seen", "epoch", "seed", "network", "recipe_hash")
Config = TypeVar("Config", bound=BaseModel)


@dataclass
class LoadedModel:
    """A frozen network in eval mode, ready to be measured."""

    backbone: nn.Module
    """Images [B, 3, H, W] -> features [B, D]."""
    head: ProjectionHead | None
    prototypes: Prototypes | None
    """Those of the head; alone where the file has them without the MLP before them."""
    normaliser: str
    """`none`, `vmf` or `vmf_leading`: what the head adds to its logits."""
    temperature: float | None
    """tau at which this network's prototypes were used when the file was written."""
    provenance: dict[str, Any]
    """path, sha256, format, method, arch, label, step, images_seen, epoch, seed, network, recipe_hash, weights_sha256,
    model (its ModelConfig as plain values), matched (number of backbone tensors), missing, unexpected, coverage
    (percent), dropped (names of what no feature depends on), patch_head (its kind), notes. What a file does not tell is
    None."""
    patch: PatchPrototypes | None = None
    """The head of the patch tokens, where the method has one."""

    def __post_init__(self) -> None:
        # Another head in its place, for example a random one, has no patch head beside it.
        if self.patch is not None and self.patch.beside is not self.head:
            self.patch = None

    def report(self) -> str:
        """What was loaded, in one line."""
        facts = self.provenance
        where = [("step", facts["step"]), ("epoch", facts["epoch"]), ("images seen", facts["images_seen"])]
        told = ", ".join(f"{name} {value}" for name, value in where if value is not None)
        line = (
            f"{facts['network']} of {facts['label']}{f' ({told})' if told else ''}: {facts['matched']} backbone "
            f"tensors matched, {len(facts['missing'])} missing, {len(facts['unexpected'])} unexpected, "
            f"coverage {facts['coverage']:.4g} %"
        )
        extra = [f"dropped {listed(facts['dropped'])}"] if facts["dropped"] else []
        return "; ".join([line, *extra, *facts["notes"]])


def load(
    path: str | Path,
    *,
    network: Network = "teacher",
    allow_partial: bool = False,
    num_heads: int | None = None,
    model: ModelConfig | None = None,
) -> LoadedModel:
    """Build the network of a checkpoint for evaluation, from the file alone.

    Args:
        path: a checkpoint file of any layout in `LAYOUTS`.
        network: `teacher` (the default: what is evaluated in DINO) or `student`.
        allow_partial: build the backbone also when the file does not fit it; what is missing keeps a fixed random
            value.
        num_heads: attention heads of a foreign ViT, where its width does not tell.
        model: architecture of a foreign file, where its shapes do not tell.

    Raises:
        DinobenchError: see `read`; also an unknown layout, an unknown architecture, or weights that do not fit.
    """
    if network not in ("teacher", "student"):
        raise unknown_name("network", network, ("teacher", "student"))
    if num_heads is not None and num_heads < 1:
        raise UsageError(f"a ViT has at least one attention head, found num_heads={num_heads}: give its number")
    request = Request(Path(path), network, num_heads, model)
    payload = read(request.path, mmap=True)
    layout = next((layout for layout in LAYOUTS if layout.recognises(payload)), None)
    if layout is None:
        keys = ", ".join(sorted(str(key) for key in payload)[:8])
        raise DinobenchError(
            f"{path} has a layout that is not known here (keys: {keys}): expected one of "
            f"{', '.join(layout.name for layout in LAYOUTS)}; save the backbone's state dict alone in a new file"
        )
    try:
        return _assemble(layout.take_apart(payload, request), request, layout.name, allow_partial)
    except (DinobenchError, MemoryError):
        raise
    except Exception as error:  # shapes, types and entries that no such file has
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise DinobenchError(
            f"{path} looks like {layout.name}, but an entry in it is not what such a file holds ({reason}): give the "
            "file as its project wrote it"
        ) from error


def export(model: LoadedModel, path: str | Path) -> None:
    """Write the backbone under timm's names, with a header from which `load` builds it again.

    Raises:
        DinobenchError: the file cannot be written.
    """
    facts = {key: model.provenance.get(key) for key in (*_EXPORTED_FACTS, "model")}
    header = {"format": "pt", "dinobench": json.dumps({"format": EXPORT_FORMAT, **facts})}
    save_safetensors(path, model.backbone.state_dict(), header)


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _take_ours_apart(payload: Payload, request: Request) -> Parts:
    # Imported here: the recipe's modules build on this package.
    from pretrain.training.recipe import recipe_hash

    path, network = request.path, request.network
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
        "network": network,
        "method": method,
        "arch": model.label,
        "label": "-".join(str(part) for part in (method, model.label, data) if part),
        "recipe_hash": recipe_hash(recipe),
        "seed": payload.get("seed", recipe.get("seed")),
        **{key: payload.get(key) for key in ("step", "images_seen", "epoch")},
    }
    state = payload[network]
    config = _section(PatchConfig, recipe, "patch", path) if recipe.get("patch") is not None else None
    of_patches = temperature if network == "student" or config is None else our_temperature(config, recipe, payload)
    patch, added = find_ours(config, head, state, of_patches)
    return Parts(model, head, {**state, **added}, temperature, facts, patch=patch)


def _is_export(payload: Payload) -> bool:
    return payload.get("format") == SAFETENSORS and EXPORT_FORMAT in payload["metadata"].get("dinobench", "")


def _take_export_apart(payload: Payload, request: Request) -> Parts:
    try:
        facts = dict(json.loads(payload["metadata"]["dinobench"]))
    except ValueError as error:
        raise DinobenchError(f"the header of {request.path} is damaged ({error}): export it again") from error
    model = _section(ModelConfig, facts, "model", request.path)
    if request.network == "student" and facts.get("network") != "student":
        raise DinobenchError(f"{request.path} was exported from the {facts.get('network')}: ask for that")
    state = {f"backbone.{name}": value for name, value in payload["state_dict"].items()}
    return Parts(model, None, state, None, {key: facts.get(key) for key in _EXPORTED_FACTS})


LAYOUTS: tuple[Layout, ...] = (
    Layout(FORMAT, lambda payload: payload.get("format") == FORMAT, _take_ours_apart),
    Layout(EXPORT_FORMAT, _is_export, _take_export_apart),
    *FOREIGN,
)
"""Tried in this order."""


def _assemble(parts: Parts, request: Request, layout: str, allow_partial: bool) -> LoadedModel:
    path = request.path
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays put
        torch.manual_seed(0)  # what a partial load leaves is the same every time
        backbone = create_backbone(parts.model)
        match = fill(backbone, parts.state, "backbone.", parts.droppable)
        if not match.complete and not (allow_partial and match.matched):
            raise DinobenchError(match.refusal("backbone", path, parts.model.name))
        if match.not_finite:
            raise DinobenchError(match.broken(path))
        head, prototypes, patch, notes = _heads(parts, feature_dim(backbone), path)
    own = (patch.head, patch.prototypes) if patch is not None else ()
    for module in filter(None, (backbone, head, prototypes, *own)):
        module.eval().requires_grad_(False)
    provenance = {
        "path": str(path),
        "sha256": file_sha256(path),
        "format": layout,
        **parts.facts,
        "model": parts.model.model_dump(mode="json"),
        "weights_sha256": weights_sha256(backbone),
        "matched": len(match.matched),
        "missing": match.missing,
        "unexpected": match.unexpected,
        "coverage": match.coverage,
        "dropped": sorted([*parts.dropped, *match.dropped]),
        "patch_head": None if patch is None else patch.kind,
        "notes": [*parts.notes, *notes],
    }
    normaliser = parts.head.normaliser if parts.head is not None else "none"
    return LoadedModel(backbone, head, prototypes, normaliser, parts.temperature, provenance, patch)


def _heads(
    parts: Parts, dim: int, path: Path
) -> tuple[ProjectionHead | None, Prototypes | None, PatchPrototypes | None, list[str]]:
    """Head, its prototypes and the patch head on features of `dim`, and what is to be told of them."""
    head, notes = None, []
    if parts.head is not None:
        head = ProjectionHead(dim, parts.head)
        fits = fill(head, parts.state, "head.")
        if not fits.complete and parts.prototypes is None:
            raise DinobenchError(fits.refusal("head", path, "its recipe"))
        if not fits.complete:
            notes.append("the head does not fit the backbone: its prototypes are read alone")
            head = None
    alone = None if parts.prototypes is None else parts.prototypes.build()
    patch = build(parts.patch, parts.state, head, dim) if parts.patch is not None else None
    if isinstance(patch, Match):
        raise DinobenchError(patch.refusal("patch head", path, "its recipe"))
    return head, alone if head is None else head.last_layer, patch, notes


def _section(config: type[Config], recipe: Mapping[str, Any], name: str, path: Path) -> Config:
    try:
        return config.model_validate(recipe.get(name))
    except (ValidationError, UsageError) as error:
        raise DinobenchError(f"the section {name!r} of the recipe in {path} cannot be read: {error}") from error


def _dig(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
