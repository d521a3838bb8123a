"""A network of another project, from its own names to the parts that `load` builds a network from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.models.architectures import infer_model, unusual_depth
from pretrain.models.foreign_heads import read_mlp, read_prototypes
from pretrain.models.parts import Parts, Payload, Request
from pretrain.models.patch_prototypes import PatchParts
from pretrain.models.timm_names import NOT_OF_THE_FEATURES, State, TimmState, recognise, to_timm

if TYPE_CHECKING:
    from pretrain.models.positions import Rule


@dataclass(frozen=True)
class Found:
    """A network as it lies in the file of another project."""

    backbone: State
    """Parameters under the project's names."""
    network: str
    """`teacher`, `student`, or `single` where the file holds one network only."""
    method: str
    rule: Rule = "dino"
    """For position embeddings at other sizes."""
    heads: dict[int, int] = field(default_factory=dict)
    """Width -> attention heads where the project departs from everybody else."""
    head: State = field(default_factory=dict)
    prototypes: str = "last_layer."
    """Prefix of the prototypes in `head`."""
    cosine: bool = False
    """Whether plain prototypes are normalised before they are used."""
    activation: Literal["gelu", "relu"] = "gelu"
    temperature: float | None = None
    patch: PatchParts | None = None
    patch_state: State = field(default_factory=dict)
    """Parameters `patch_head.*`."""
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Find = Callable[[Payload, Request], Found]


def foreign(find: Find) -> Callable[[Payload, Request], Parts]:
    """How a layout takes a file apart, from how it finds the wanted network in it."""

    def take_apart(payload: Payload, request: Request) -> Parts:
        found = find(payload, request)
        try:
            return _parts(found, request)
        except DinobenchError as error:
            raise DinobenchError(f"{request.path} ({found.method}, {found.network}): {error}") from error

    return take_apart


def _parts(found: Found, request: Request) -> Parts:
    backbone, prefix = only_backbone(found.backbone, request.path)
    if request.model is not None and recognise(backbone) is None:
        converted = TimmState("other", backbone)
    else:
        converted = to_timm(backbone)
    model = request.model or infer_model(
        converted.kind, converted.state, rule=found.rule, num_heads=request.num_heads, heads=found.heads
    )
    notes = [*found.notes, *converted.notes, *unusual_depth(model)]
    if prefix:
        notes.append(f"the backbone lies below {prefix} and nothing else is read")
    prototypes = read_prototypes(found.head, found.prototypes, cosine=found.cosine)
    head = read_mlp(found.head, prototypes, found.activation) if prototypes is not None else None
    config, head_state = head if head is not None else (None, {})
    facts = {"step": None, "images_seen": None, "epoch": None, "seed": None, **found.facts}
    facts |= {"method": found.method, "arch": model.label, "label": f"{found.method}-{model.label}"}
    return Parts(
        model=model,
        head=config,
        state={**_prefixed("backbone.", converted.state), **_prefixed("head.", head_state), **found.patch_state},
        temperature=found.temperature if prototypes is not None else None,
        facts={**facts, "network": found.network, "recipe_hash": None},
        prototypes=prototypes,
        patch=found.patch,
        dropped=tuple(sorted(converted.dropped)),
        droppable=NOT_OF_THE_FEATURES,
        notes=tuple(notes),
    )


def tensors(value: Any) -> State:
    """The tensors of a state dict without wrappers' prefixes; empty for anything else."""
    if not isinstance(value, dict):
        return {}
    return {_unwrapped(str(name)): item for name, item in value.items() if isinstance(item, Tensor)}


def below(state: State, prefix: str) -> State:
    """The parameters whose names begin with `prefix`, without it."""
    return {_unwrapped(name.removeprefix(prefix)): item for name, item in state.items() if name.startswith(prefix)}


def only_backbone(state: State, path: Path) -> tuple[State, str]:
    """The backbone in a state dict whose names share an unknown prefix (`vit.`, `model.encoder.`), and that prefix.

    The state dict itself and an empty prefix where there is none, or no backbone.

    Raises:
        DinobenchError: several networks are in it.
    """
    if recognise(state) is not None:
        return state, ""
    candidates: dict[str, State] = {"": state}
    for _ in range(3):
        candidates = {
            f"{prefix}{first}.": below(part, f"{first}.")
            for prefix, part in candidates.items()
            for first in sorted({name.partition(".")[0] for name in part if "." in name})
        }
        known = {prefix: part for prefix, part in candidates.items() if recognise(part) is not None}
        if len(known) > 1:
            raise DinobenchError(
                f"{path.name} holds several networks ({', '.join(known)}), expected one or names that say which is the "
                "teacher: save the one to measure alone in a new file"
            )
        if known:
            prefix, found = known.popitem()
            return found, prefix
    return state, ""


def _unwrapped(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}
