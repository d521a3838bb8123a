"""From the parameter names of other projects to timm's: the same numbers under the names `create_backbone` gives.

    ViT           DINO, MSN, MoCo v3, I-JEPA     timm's names already
                  iBOT                           gamma_i -> ls{i}.gamma
                  DINOv2                         w12, w3 -> fc1, fc2; blocks.<chunk>.<block>. -> blocks.<block>.;
                                                 register_tokens -> reg_token, and then, because timm's CLS has no
                                                 position of its own there: cls_token + pos_embed[:, :1] -> cls_token
                  transformers                   query, key, value -> one qkv, and its long names
    DINOv3        storage_tokens -> reg_token, ls{i}.gamma -> gamma_i, w1, w2, w3 -> fc1_g, fc1_x, fc2,
                  qkv.bias -> q_bias, v_bias (the bias of the keys is masked to zero there)
    Swin          downsample at the end of stage i -> at the start of stage i + 1
    ResNet        torchvision's names are timm's; a Sequential of its children (lightly) gets them back

Sources: facebookresearch/dinov2@b8931f7, facebookresearch/dinov3@6876159, bytedance/ibot@da316d8, microsoft/Swin,
huggingface/transformers ViTModel and Dinov2Model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pretrain.errors import DinobenchError

State = dict[str, Tensor]
Kind = Literal["vit", "dinov3", "swin", "resnet", "other"]

NOT_OF_THE_FEATURES = re.compile(
    r"(^|\.)(mask_token|masked_embed)$"  # stands for hidden patches
    r"|(^|\.)(relative_position_index|attn_mask)$|^rope_embed\."  # made anew from the sizes
    r"|^(local_cls_norm|heads?|head_dist|fc|classifier|pooler|projectors?|predictor|decoder)\."
    r"|^decoder_"
)
"""Parameters that no feature depends on: without a place in the backbone they are dropped, and told of."""
_RESNET_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Places of a torchvision ResNet's children in a Sequential; 2 and 3 are ReLU and pooling."""
_OFFICIAL = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)
_DINOV3 = (
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^storage_tokens$", "reg_token"),
)
_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)

_SIGNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("dinov3", ("patch_embed.proj.weight", "storage_tokens")),
    ("dinov3", ("patch_embed.proj.weight", "reg_token", "blocks.0.gamma_1")),  # timm's own names for it
    ("swin", ("patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table")),
    ("vit", ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")),
    ("vit", ("patch_embed.proj.weight", "blocks.0.0.attn.qkv.weight")),
    ("vit", ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.attention.attention.query.weight")),
    ("resnet", ("conv1.weight", "layer1.0.conv1.weight")),
    ("resnet", ("0.weight", "4.0.conv1.weight")),
)
"""Names that tell the architectures apart; the first that fits."""


@dataclass
class TimmState:
    """A backbone's parameters under timm's names."""

    kind: Kind
    state: State
    dropped: list[str] = field(default_factory=list)
    """Official names of what timm has no place for and no feature depends on."""
    notes: list[str] = field(default_factory=list)


def recognise(state: State) -> Kind | None:
    """Which architecture the names of a backbone speak of; None for one that is not known here."""
    return next((kind for kind, names in _SIGNS if all(name in state for name in names)), None)


def to_timm(state: State) -> TimmState:
    """A backbone's parameters under timm's names, for any architecture that `recognise` knows.

    Raises:
        DinobenchError: the names are not known here, or hold something timm has no place for.
    """
    kind = recognise(state)
    if kind is None:
        raise _unknown(state)
    if kind == "resnet":
        converted = TimmState(kind, _resnet(state))
    elif kind == "swin":
        converted = TimmState(kind, _swin(state))
    elif kind == "dinov3":
        converted = _dinov3(state)
    else:
        converted = _vit(state)
    return converted


def _vit(state: State) -> TimmState:
    state = _renamed(state, _OFFICIAL)
    if "embeddings.patch_embeddings.projection.weight" in state:
        state = _renamed(_renamed(state, _TRANSFORMERS), _OFFICIAL)
        _merge_qkv(state)
    converted = TimmState("vit", state)
    tokens, positions = state.get("reg_token"), state.get("pos_embed")
    # timm's files of the same network have no position for CLS any more: a square number of them.
    if tokens is not None and positions is not None and "cls_token" in state and _is_square(positions.shape[1] - 1):
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
        converted.notes.append("the position of CLS is added to the CLS token, as timm keeps it beside registers")
    return converted


def _dinov3(state: State) -> TimmState:
    converted = TimmState("dinov3", {})
    for name, value in _renamed(state, _DINOV3).items():
        if name.endswith("bias_mask"):
            converted.dropped.append(name)
        elif name.endswith("attn.qkv.bias"):
            mask = state.get(name + "_mask")
            q, k, v = (value if mask is None else value * mask).chunk(3)
            if bool(k.any()):
                raise DinobenchError(
                    f"{name} has a bias for the keys, expected zeros or a mask beside it as in DINOv3: with rotary "
                    "positions it changes the features and timm has no place for it"
                )
            stem = name.removesuffix("qkv.bias")
            converted.state |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
        else:
            converted.state[name] = value
    return converted


def _swin(state: State) -> State:
    if not any(name.startswith("layers.0.downsample.") for name in state):
        return dict(state)  # timm's own
    shift = re.compile(r"^layers\.(\d+)\.downsample\.")
    return {
        shift.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", name): value for name, value in state.items()
    }


def _resnet(state: State) -> State:
    if "conv1.weight" in state:
        return dict(state)
    named = {}
    for name, value in state.items():
        child, dot, rest = name.partition(".")
        named[f"{_RESNET_CHILDREN.get(child, child)}{dot}{rest}"] = value
    return named


def _merge_qkv(state: State) -> None:
    for name in [name for name in state if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            state[name.replace("query", "qkv")] = torch.cat([state.pop(part) for part in parts])


def _renamed(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _is_square(number: int) -> bool:
    return number > 0 and int(number**0.5 + 0.5) ** 2 == number


def _unknown(state: State) -> DinobenchError:
    if any(".residual1." in name for name in state):
        return DinobenchError(
            "the backbone is CAPI's own ViT (RMSNorm, rotary positions, registers at the edge), which timm does not "
            "have, expected a ViT, Swin or ResNet: it cannot be measured here"
        )
    names = ", ".join(sorted(state)[:4]) or "none"
    return DinobenchError(
        f"no backbone that is known here: its {len(state)} tensors are named {names}, ...; expected a ViT "
        "(patch_embed.proj.weight, blocks.0.attn.qkv.weight), a Swin (layers.0.blocks.0.attn.qkv.weight) or a ResNet "
        "(conv1.weight, layer1.0.conv1.weight): rename the tensors to timm's names and save them in a new file"
    )
