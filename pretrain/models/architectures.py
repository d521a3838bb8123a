"""From the shapes of a backbone's parameters (under timm's names) to the timm model they belong to.

Read off: width, depth, patch size, image size (from the position embedding), MLP or SwiGLU and its size, LayerScale,
registers, bias of qkv; for ResNets the blocks per stage; for Swin depths, heads and window. The number of attention
heads leaves no trace in the shapes of a ViT: it is that of the published models of its width, or 64 channels each.

Shapes: D width, p patch side, h hidden width of the MLP, N patches.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pretrain.errors import DinobenchError
from pretrain.models.backbones import ModelConfig
from pretrain.models.timm_names import Kind, State

if TYPE_CHECKING:
    from pretrain.models.positions import Rule

STANDARD = {192: ("tiny", 12, 3), 384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16)}
"""D -> name in timm, depth, heads of the ViTs everybody means."""
PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32)}
"""Patch sizes that timm has a name for."""
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
"""D -> heads of published ViTs; from ViT-H on not 64 channels each. DINOv3's H+ is another 1280 with 20."""
HEAD_DIM = 64
DINOV3 = {
    # D, depth, gated MLP -> name, heads
    (384, 12, False): ("vit_small_patch16_dinov3", 6),
    (384, 12, True): ("vit_small_plus_patch16_dinov3", 6),
    (768, 12, False): ("vit_base_patch16_dinov3", 12),
    (1024, 24, False): ("vit_large_patch16_dinov3", 16),
    (1280, 32, True): ("vit_huge_plus_patch16_dinov3", 20),
    (4096, 40, True): ("vit_7b_patch16_dinov3", 32),
}
RESNETS = {
    # bottleneck blocks, blocks per stage
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (2, 2, 2, 2)): "resnet26",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def infer_model(
    kind: Kind, state: State, *, rule: Rule, num_heads: int | None = None, heads: dict[int, int] | None = None
) -> ModelConfig:
    """The timm model that these parameters belong to.

    Args:
        kind: what `timm_names.recognise` says.
        state: parameters under timm's names.
        rule: of the project for position embeddings at other sizes; DINOv2 with registers has timm's.
        num_heads: of a ViT, where the project is known to differ from the published models.
        heads: the project's own D -> heads, before `HEADS`.

    Raises:
        DinobenchError: shapes that fit no model here, or that leave the number of heads open.
    """
    try:
        if kind == "resnet":
            return _resnet(state)
        if kind == "swin":
            return _swin(state)
        if kind == "dinov3":
            return _dinov3(state, num_heads)
        return _vit(state, rule, num_heads, heads or {})
    except KeyError as error:
        raise DinobenchError(
            f"the architecture cannot be read off without the tensor {error}: it is missing or was renamed; give the "
            "file as its project wrote it"
        ) from error


def unusual_depth(model: ModelConfig) -> list[str]:
    """A sentence where a ViT of a published width has another depth: whole blocks may be missing from the file."""
    published = {f"vit_{name}_": (width, depth) for width, (name, depth, _) in STANDARD.items()}
    for start, (width, depth) in published.items():
        found = model.kwargs.get("depth", depth)
        if model.name.startswith(start) and "embed_dim" not in model.kwargs and found != depth:
            return [f"{found} blocks where the published ViTs of width {width} have {depth}: is the file whole?"]
    return []


def _vit(state: State, rule: Rule, num_heads: int | None, own_heads: dict[int, int]) -> ModelConfig:
    width, patch = _patches(state)
    depth = _count(state, r"^blocks\.(\d+)\.")
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    gated = hidden == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    layer_scale = "blocks.0.ls1.gamma" in state
    image_size, positions_of_patches_only = _image_size(state, patch, registers)
    _check_plausible(state, depth * (4 * width**2 + width * (hidden + hidden // (1 + gated))))
    size, standard_depth, standard_heads = STANDARD.get(width, ("tiny", 12, 3))
    heads = num_heads or own_heads.get(width) or _heads(width)
    plain_mlp = hidden == 4 * width and not gated
    usual = width in STANDARD and (depth, heads) == (standard_depth, standard_heads) and plain_mlp
    kwargs: dict[str, Any] = {}
    if layer_scale and patch == 14 and registers in (0, 4) and (usual or _is_giant(width, depth, heads, hidden, gated)):
        name = f"vit_{size if usual else 'giant'}_patch14{'_reg4' if registers else ''}_dinov2"
        kwargs |= {} if image_size == 518 else {"img_size": image_size}
        gated = False  # the name brings its own gate
    else:
        named_patch = patch if patch in PATCHES[size] else 16
        name = f"vit_{size}_patch{named_patch}_224"
        kwargs |= {} if image_size == 224 else {"img_size": image_size}
        kwargs |= {} if patch == named_patch else {"patch_size": patch}
        kwargs |= {} if width in STANDARD else {"embed_dim": width}
        kwargs |= {} if width in STANDARD and depth == standard_depth else {"depth": depth}
        kwargs |= {} if width in STANDARD and heads == standard_heads else {"num_heads": heads}
        kwargs |= {} if plain_mlp else _mlp_ratio(width, hidden, gated)
        kwargs |= {"init_values": 1e-5} if layer_scale else {}
        kwargs |= {"reg_tokens": registers} if registers else {}
    kwargs |= _pooling(state)
    if positions_of_patches_only and "cls_token" in state and "reg4" not in name:
        kwargs["no_embed_class"] = True
    if "blocks.0.attn.qkv.bias" not in state:
        kwargs["qkv_bias"] = False
    return ModelConfig(
        name=name,
        kwargs=kwargs,
        mlp="swiglu" if gated else "timm",
        pos_interpolation="timm" if registers else rule,
    )


def _dinov3(state: State, num_heads: int | None) -> ModelConfig:
    width, patch = _patches(state)
    depth = _count(state, r"^blocks\.(\d+)\.")
    gated = "blocks.0.mlp.fc1_g.weight" in state
    hidden = state[f"blocks.0.mlp.{'fc1_g' if gated else 'fc1'}.weight"].shape[0]
    _check_plausible(state, depth * (4 * width**2 + (2 + gated) * width * hidden))
    fallback = ("vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3", 0)
    name, standard_heads = DINOV3.get((width, depth, gated), fallback)
    heads = num_heads or standard_heads or _heads(width)
    kwargs: dict[str, Any] = {"global_pool": "token"}  # official: the normed CLS token
    if not standard_heads:
        kwargs |= {"embed_dim": width, "depth": depth}
    kwargs |= {} if heads == standard_heads else {"num_heads": heads}
    kwargs |= {} if patch == 16 else {"patch_size": patch}
    kwargs |= {} if hidden == (2 if "7b" in name else 4) * width else {"mlp_ratio": _ratio(width, hidden)}
    registers = state["reg_token"].shape[1]
    kwargs |= {} if registers == 4 else {"num_reg_tokens": registers}
    biased = "blocks.0.attn.q_bias" in state
    if biased and "7b" in name:
        kwargs["qkv_bias"] = True
    return ModelConfig(name=f"{name}_qkvb" if biased and "7b" not in name else name, kwargs=kwargs)


def _swin(state: State) -> ModelConfig:
    width, patch = _patches(state)
    stages = _count(state, r"^layers\.(\d+)\.")
    depths = [_count(state, rf"^layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)]
    tables = [state[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape for stage in range(stages)]
    window = (int(tables[0][0] ** 0.5 + 0.5) + 1) // 2  # (2 w - 1)^2 relative positions
    found = {"embed_dim": width, "depths": depths, "num_heads": [heads for _, heads in tables], "window_size": window}
    standard = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    kwargs = {key: value for key, value in found.items() if value != standard[key]}
    if patch != 4:
        kwargs["patch_size"] = patch
    return ModelConfig(name="swin_tiny_patch4_window7_224", kwargs=kwargs)


def _resnet(state: State) -> ModelConfig:
    first, second, third, fourth = (_count(state, rf"^layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    stages = (first, second, third, fourth)
    bottleneck = "layer1.0.conv3.weight" in state
    stem, inner = tuple(state["conv1.weight"].shape), state["layer1.0.conv1.weight"].shape[0]
    name = RESNETS.get((bottleneck, stages))
    if name is None or stem != (64, 3, 7, 7) or inner != 64:
        raise DinobenchError(
            f"a ResNet with stages {stages}, stem {stem} and {inner} channels in its first block is not known here, "
            f"expected {', '.join(RESNETS.values())} with stem (64, 3, 7, 7) and 64 channels: wide ones and stems for "
            "small images (whose missing pooling the weights do not show) cannot be measured"
        )
    return ModelConfig(name=name)


def _patches(state: State) -> tuple[int, int]:
    """D and p of the patch embedding."""
    shape = tuple(state["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise DinobenchError(
            f"patch_embed.proj.weight has shape {shape}, expected (width, 3, side, side): not for RGB images, or not "
            "an image model"
        )
    return shape[0], shape[2]


def _image_size(state: State, patch: int, registers: int) -> tuple[int, bool]:
    """Side in pixels of the images the position embedding is for, and whether it has rows for patches only."""
    length = state["pos_embed"].shape[1]
    prefix = int("cls_token" in state)
    for other in dict.fromkeys((prefix, 0, prefix + registers)):
        side = int(max(length - other, 0) ** 0.5 + 0.5)
        if side and side * side == length - other:
            return side * patch, other == 0
    raise DinobenchError(
        f"pos_embed has {length} rows, which is no square grid of patches with {prefix} CLS and {registers} register "
        "tokens: networks for images that are not square cannot be rebuilt from their shapes"
    )


def _pooling(state: State) -> dict[str, Any]:
    """CLS where there is one and its norm is the last step; else the mean of the patches (I-JEPA: normed before)."""
    if "fc_norm.weight" in state:
        return {"global_pool": "avg"} if "cls_token" in state else {"global_pool": "avg", "class_token": False}
    return {} if "cls_token" in state else {"global_pool": "avg", "class_token": False, "fc_norm": False}


def _heads(width: int) -> int:
    if width in HEADS:
        return HEADS[width]
    if width % HEAD_DIM:
        raise DinobenchError(
            f"a ViT of width {width} is none of the published ones and {width} is no multiple of {HEAD_DIM}, so its "
            "number of attention heads cannot be told: say it (`dinobench export CKPT --num-heads N` writes a file "
            "that states it)"
        )
    return width // HEAD_DIM


def _is_giant(width: int, depth: int, heads: int, hidden: int, gated: bool) -> bool:
    return (width, depth, heads, hidden, gated) == (1536, 40, 24, 8192, True)


def _mlp_ratio(width: int, hidden: int, gated: bool) -> dict[str, float]:
    if not gated:
        return {"mlp_ratio": _ratio(width, hidden)}
    # Imported here: it brings timm, which takes seconds.
    from pretrain.models.swiglu import swiglu_width

    if hidden // 2 == swiglu_width(4 * width):
        return {}
    return {"mlp_ratio": _ratio(width, 3 * hidden // 4)}  # two thirds of it are the gate's width


def _ratio(width: int, hidden: int) -> float:
    """The ratio that int(width * ratio) turns into `hidden` again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _count(state: State, pattern: str) -> int:
    """Number of blocks, counted from 0 without a gap."""
    numbers = {int(match[1]) for match in map(re.compile(pattern).match, state) if match}
    if numbers != set(range(len(numbers))):
        absent = sorted(set(range(max(numbers) + 1)) - numbers)[:3] if max(numbers) < 10_000 else "most"
        raise DinobenchError(f"blocks {absent} are missing ({len(numbers)} are there): the file lost a part")
    return len(numbers)


def _check_plausible(state: State, implied: int) -> None:
    """Refuse shapes that stand for far more parameters than the file holds, before memory is taken for them."""
    given = sum(value.numel() for value in state.values())
    if implied > 10 * given + 10_000_000:
        raise DinobenchError(
            f"the shapes stand for {implied} parameters, the file holds {given}: most tensors are missing; take the "
            "whole file"
        )
