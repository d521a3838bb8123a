"""How other projects arrange a checkpoint file: which network lies where, and its head and prototypes.

A layout recognises a file by its keys and takes the wanted network out of it; what comes then is the same for all:
names become timm's (`timm_names`), the architecture is read off the shapes (`architectures`).

    layout       recognised by                            teacher | student
    msn          target_encoder, prototypes               target_encoder | encoder; head below `fc.`
    ijepa        target_encoder, predictor                target_encoder | encoder
    dino         teacher or student                       `backbone.` below them; also iBOT, DINOv2 and v3 eval dumps
    vissl        classy_state_dict                        one network: `_feature_blocks.` or `base_model.` of the trunk
    capi         model, clustering_optimizer              `student_ema.backbone.` | `student.backbone.`
    moco_v3      state_dict with `momentum_encoder.`      `momentum_encoder.` | `base_encoder.`
    swav         flat or state_dict with `prototypes.`    one network
    lightning    state_dict with a `backbone.`            `teacher_backbone.`, `momentum_backbone.` | the other one
    plain        flat, state_dict, model, safetensors     `state_dict_ema`, `model_ema`, `ema` | `state_dict`; or one
                 one state dict under any other key       network, and its key is told

The wrappers `module.` (DDP) and `_orig_mod.` (torch.compile) are taken off, however many there are, and only where
a name begins with them. A file with one network answers for the teacher.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import DinobenchError
from pretrain.models.checkpoint_file import SAFETENSORS
from pretrain.models.foreign import Found, below, foreign, only_backbone, tensors
from pretrain.models.parts import Layout, Network, Payload, Request
from pretrain.models.patch_prototypes import PatchParts, find_foreign
from pretrain.models.timm_names import State, recognise

if TYPE_CHECKING:
    from pretrain.models.positions import Rule

STUDENT_TEMPERATURE = 0.1
"""tau_s of DINO, iBOT and DINOv2, where it is no option (official DINOLoss)."""


def _dino(payload: Payload, request: Request) -> Found:
    state = tensors(_chosen(payload, request, {"teacher": "teacher", "student": "student"}))
    backbone = below(state, "backbone.")
    head = below(state, "head.") or below(state, "dino_head.")
    if not backbone:  # saved without its wrapper
        backbone, head = state, {}
    arguments = _arguments(payload)
    if "dino_head.mlp.0.weight" in state or any(name.startswith("ibot_head.") for name in state):
        method = "dinov2"
    else:
        method = "ibot" if "ibot_loss" in payload or _first_prefix(head, ("last_layer2.",)) else "dino"
    temperature = of_patches = STUDENT_TEMPERATURE
    if request.network == "teacher":
        temperature = _teacher_temperature(arguments, payload.get("epoch"))
        of_patches = _teacher_temperature(arguments, payload.get("epoch"), patch=True)
    patch, patch_state = _patch_head(state, head, method, of_patches)
    facts = {"epoch": _number(payload.get("epoch")), "seed": _number(arguments.get("seed"))}
    return Found(
        backbone, request.network, method, head=head, temperature=temperature, patch=patch, patch_state=patch_state,
        facts=facts,
    )  # fmt: skip


def _patch_head(state: State, head: State, method: str, temperature: float | None) -> tuple[PatchParts | None, State]:
    """The head of the patch tokens in DINO's family; iBOT and DINOv2 share that of the image unless they name it."""
    if separate := below(state, "ibot_head."):
        return find_foreign(separate, head, "last_layer.", temperature)
    if _first_prefix(head, ("last_layer2.",)):
        return find_foreign(head, head, "last_layer2.", temperature)
    return (PatchParts("shared", temperature) if head and method != "dino" else None), {}


def _msn(payload: Payload, request: Request) -> Found:
    state = tensors(_chosen(payload, request, {"teacher": "target_encoder", "student": "encoder"}))
    head = {**below(state, "fc."), **tensors({"prototypes.weight": payload["prototypes"]})}
    backbone = {name: value for name, value in state.items() if not name.startswith("fc.")}
    # The targets are sharpened afterwards, not by a temperature of their own.
    temperature = _number(payload.get("temperature"))
    return Found(
        backbone, request.network, "msn", head=head, prototypes="prototypes.", cosine=True,
        temperature=None if temperature is None else float(temperature),
        facts={"epoch": _number(payload.get("epoch"))},
    )  # fmt: skip


def _ijepa(payload: Payload, request: Request) -> Found:
    state = tensors(_chosen(payload, request, {"teacher": "target_encoder", "student": "encoder"}))
    return Found(state, request.network, "ijepa", rule="timm", facts={"epoch": _number(payload.get("epoch"))})


def _vissl(payload: Payload, request: Request) -> Found:
    _only_one(request)
    model = payload["classy_state_dict"]
    for key in ("base_model", "model"):
        model = model.get(key, {}) if isinstance(model, Mapping) else {}
    trunk, head = (tensors(model.get(key)) if isinstance(model, Mapping) else {} for key in ("trunk", "heads"))
    backbone = below(trunk, "_feature_blocks.") or below(trunk, "base_model.") or trunk
    prefix = next((name.removesuffix("weight") for name in head if ".prototypes" in name), "prototypes.")
    return Found(backbone, "single", "vissl", head=head, prototypes=prefix, cosine=True)


def _capi(payload: Payload, request: Request) -> Found:
    prefix = {"teacher": "student_ema.backbone.", "student": "student.backbone."}[request.network]
    return Found(below(tensors(payload["model"]), prefix), request.network, "capi", rule="timm")


def _moco_v3(payload: Payload, request: Request) -> Found:
    state = tensors(payload["state_dict"])
    teacher = request.network == "teacher"
    return Found(
        below(state, "momentum_encoder." if teacher else "base_encoder."), request.network, "moco_v3", rule="timm",
        heads={384: 12},  # its ViT-S: "12 heads", README
        facts={"epoch": _number(payload.get("epoch"))},
        notes=("the official evaluation reads base_encoder, the student",) if teacher else (),
    )  # fmt: skip


def _swav(payload: Payload, request: Request) -> Found:
    _only_one(request)
    state = tensors(payload.get("state_dict", payload))
    mlp = {f"mlp.{name}": value for name, value in below(state, "projection_head.").items()}
    prototypes = next(name for name in state if name.startswith("prototypes.")).removesuffix("weight")
    head = {**mlp, **{name: value for name, value in state.items() if name.startswith("prototypes.")}}
    others = ("projection_head.", "prototypes.")
    backbone = {name: value for name, value in state.items() if not name.startswith(others)}
    return Found(
        backbone, "single", "swav", head=head, prototypes=prototypes, cosine=True, activation="relu",
        temperature=STUDENT_TEMPERATURE,
    )  # fmt: skip


_LIGHTNING = {
    "teacher": ("teacher_backbone.", "momentum_backbone.", "teacher.backbone.", "backbone.teacher."),
    "student": ("student_backbone.", "student.backbone.", "backbone.student.", "backbone."),
}


def _lightning(payload: Payload, request: Request) -> Found:
    state = tensors(payload["state_dict"])
    has_teacher = _first_prefix(state, _LIGHTNING["teacher"])
    if has_teacher is None:
        _only_one(request)
    prefix = has_teacher if request.network == "teacher" else None
    prefix = prefix or _first_prefix(state, _LIGHTNING["student"])
    assert prefix is not None
    heads = [prefix.replace("backbone", name) for name in ("head", "projection_head")]
    head = next((found for found in (below(state, name) for name in heads) if found), {})
    facts = {"epoch": _number(payload.get("epoch")), "step": _number(payload.get("global_step"))}
    network = "single" if has_teacher is None else request.network
    return Found(below(state, prefix), network, "lightning", rule="timm", head=head, facts=facts)


_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
_STATES = ("state_dict", "model")


def _plain(payload: Payload, request: Request) -> Found:
    ema = next((key for key in _AVERAGED if tensors(payload.get(key))), None)
    usual = next((key for key in _STATES if tensors(payload.get(key))), None)
    notes = ()
    if ema is usual is None and not tensors(payload):
        usual = _only_state(payload, request)
        notes = (f"read from {usual}, its only state dict",)
    if ema is None:
        _only_one(request)
    elif request.network == "student" and usual is None:
        raise DinobenchError(f"{request.path} holds the averaged network ({ema}) only: ask for the teacher")
    key = ema if ema is not None and request.network == "teacher" else usual
    state = tensors(payload if key is None else payload[key])
    # timm and transformers keep positions by timm's rule; releases of DINO, iBOT and DINOv2 are flat torch files.
    official = key in (None, "state_dict") and not {"head.weight", "fc_norm.weight"} & state.keys()
    rule: Rule = "dino" if official and payload.get("format") != SAFETENSORS else "timm"
    facts = {"epoch": _number(payload.get("epoch"))}
    network = request.network if ema else "single"
    return Found(state, network, "weights", rule=rule, facts=facts, notes=notes)


def _only_state(payload: Payload, request: Request) -> str:
    """The key of the one state dict in a file that names it as nobody else does."""
    keys = [str(key) for key in _state_keys(payload)]
    if len(keys) > 1:
        raise DinobenchError(
            f"{request.path} holds several state dicts ({', '.join(keys)}), expected one, or names that say which is "
            "the teacher: save the one to measure alone in a new file"
        )
    return keys[0]


def _state_keys(payload: Payload) -> list[Any]:
    return [key for key, value in payload.items() if recognise(only_backbone(tensors(value), Path(str(key)))[0])]


def _chosen(payload: Payload, request: Request, keys: dict[Network, str]) -> Any:
    """The state dict of the wanted network."""
    key = keys[request.network]
    if not isinstance(payload.get(key), Mapping):
        there = [network for network, other in keys.items() if isinstance(payload.get(other), Mapping)]
        raise DinobenchError(
            f"{request.path} holds no {request.network} ({key}), only the {' and '.join(there) or 'head'}: ask for "
            f"that (--checkpoint-key {there[0] if there else 'teacher'})"
        )
    return payload[key]


def _only_one(request: Request) -> None:
    if request.network == "student":
        raise DinobenchError(
            f"{request.path} holds one network and does not say that it is a student: ask for the teacher, the default"
        )


def _arguments(payload: Payload) -> dict[str, Any]:
    """The options of the run: an argparse.Namespace in DINO and iBOT."""
    arguments = payload.get("args")
    return dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}


def _teacher_temperature(arguments: Mapping[str, Any], epoch: Any, *, patch: bool = False) -> float | None:
    """tau_t of the last epoch before the file was written, which holds the number of the next one (DINOLoss, iBOTLoss).

    That of the patches starts to rise when masking does.
    """
    name = "patch_temp" if patch else "temp"
    final, start = arguments.get(f"teacher_{name}"), arguments.get(f"warmup_teacher_{name}")
    if not isinstance(final, (int, float)):
        return None
    warmup, last = _number(arguments.get("warmup_teacher_temp_epochs")) or 0, (_number(epoch) or 0) - 1
    if not isinstance(start, (int, float)) or last < 0:
        return float(final)
    risen = max(last - (_number(arguments.get("pred_start_epoch")) or 0 if patch else 0), 0)
    return float(final if risen >= warmup else start + (final - start) * risen / max(warmup - 1, 1))


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else None


def _first_prefix(state: State, prefixes: Iterable[str]) -> str | None:
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in state)), None)


def _has(payload: Payload, *keys: str) -> bool:
    return all(key in payload for key in keys)


def _is_dino(payload: Payload) -> bool:
    return any(isinstance(payload.get(key), Mapping) for key in ("teacher", "student"))


def _is_moco_v3(payload: Payload) -> bool:
    return _first_prefix(tensors(payload.get("state_dict")), ("momentum_encoder.", "base_encoder.")) is not None


def _is_lightning(payload: Payload) -> bool:
    prefixes = (*_LIGHTNING["teacher"], *_LIGHTNING["student"])
    return _first_prefix(tensors(payload.get("state_dict")), prefixes) is not None


def _is_swav(payload: Payload) -> bool:
    return _first_prefix(tensors(payload.get("state_dict", payload)), ("prototypes.",)) is not None


def _is_plain(payload: Payload) -> bool:
    if any(tensors(value) for value in (payload, *map(payload.get, (*_AVERAGED, *_STATES)))):
        return True
    return bool(_state_keys(payload))


FOREIGN: tuple[Layout, ...] = (
    Layout("msn", lambda payload: _has(payload, "target_encoder", "prototypes"), foreign(_msn)),
    Layout("ijepa", lambda payload: _has(payload, "target_encoder", "predictor"), foreign(_ijepa)),
    Layout("dino", _is_dino, foreign(_dino)),
    Layout("vissl", lambda payload: _has(payload, "classy_state_dict"), foreign(_vissl)),
    Layout("capi", lambda payload: _has(payload, "model", "clustering_optimizer"), foreign(_capi)),
    Layout("moco_v3", _is_moco_v3, foreign(_moco_v3)),
    Layout("lightning", _is_lightning, foreign(_lightning)),
    Layout("swav", _is_swav, foreign(_swav)),
    Layout("plain", _is_plain, foreign(_plain)),
)
"""Tried in this order; the first that recognises a file takes it apart."""
