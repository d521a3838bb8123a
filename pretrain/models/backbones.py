"""Backbones: any timm model that yields pooled features, built by name (images [B, 3, H, W] -> features [B, D]).

The module is timm's own with `num_classes=0`, so its state dict has timm's names; for ViTs these are the names of the
official DINO code too. ViTs take images of any size.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretrain.errors import UsageError
from pretrain.models.attention import Kernel, prepare_attention, set_attention

if TYPE_CHECKING:
    from pretrain.models.positions import PositionalViT

_VIT_NAMES = {"tiny": "t", "small": "s", "base": "b", "large": "l", "huge": "h", "giant": "g"}
_SHORT_NAMES = {
    "resnet18": "rn18",
    "resnet50": "rn50",
    "resnet101": "rn101",
    "swin_tiny_patch4_window7_224": "swint",
}


class ModelConfig(BaseModel):
    """Which backbone, and how it starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "vit_small_patch16_224"
    """Any timm model with pooled features."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the timm model: img_size, patch_size, embed_dim, depth, num_heads, ..."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the student (official main_dino.py: 0.1); the teacher has none."""
    drop_path_uniform: bool = False
    """The same rate in all blocks of a ViT (DINOv2) instead of a linear rise from 0."""
    drop_path_subset: bool = False
    """Rates above 0.1 leave samples out of a block's branches instead of computing and dropping them (DINOv2)."""
    mlp: Literal["timm", "swiglu"] = "timm"
    """`swiglu` is the gated MLP of DINOv2's ViT-g, for ViTs, instead of an MLP of ratio 4 (or kwargs.mlp_ratio)."""
    pos_interpolation: Literal["timm", "dino"] = "timm"
    """Rule for position embeddings at other sizes; `dino` gives the features of the official code."""
    init: Literal["timm", "dino", "xavier"] = "dino"
    """`dino` and `xavier` are for ViTs; other models keep timm's, as the official code keeps torchvision's."""
    attention: Kernel = "auto"
    """`auto` is fused but for bfloat16 on a CPU."""

    @property
    def label(self) -> str:
        """Short name for run folders and tables: vits16, rn50, vit-d64l3p4 (width, layers, patch)."""
        match = re.fullmatch(r"vit_(tiny|small|base|large|huge|giant)_patch(\d+)_\d+", self.name)
        if match is None:
            name = self.name.split(".")[0]
            return _SHORT_NAMES.get(name, name.replace("_", "-"))
        size, patch = match.groups()
        patch = self.kwargs.get("patch_size", patch)
        if not {"embed_dim", "depth"} & self.kwargs.keys():
            return f"vit{_VIT_NAMES[size]}{patch}"
        parts = {"d": self.kwargs.get("embed_dim"), "l": self.kwargs.get("depth"), "p": patch}
        shape = "".join(f"{letter}{value}" for letter, value in parts.items() if value is not None)
        return f"vit-{shape}" if parts["d"] and parts["l"] else f"vit{_VIT_NAMES[size]}-{shape}"


def create_backbone(config: ModelConfig, *, drop_path: float = 0.0) -> nn.Module:
    """Build the backbone with fresh weights drawn from torch's generator.

    Args:
        config: name, arguments and switches.
        drop_path: stochastic depth rate (student only), rising linearly from 0 over the blocks unless uniform.

    Raises:
        UsageError: unknown name, or arguments the model does not take.
    """
    # Imported here: timm takes seconds to import and reading a recipe does not need it.
    from timm.models.vision_transformer import VisionTransformer

    from pretrain.models.drop_path import set_drop_path
    from pretrain.models.positions import PositionalViT

    backbone = _create_timm(config, drop_path)
    if type(backbone) is VisionTransformer and backbone.pos_embed is not None:
        # timm chooses the class by the model's name; the subclass changes methods only.
        backbone.__class__ = PositionalViT
        assert isinstance(backbone, PositionalViT)
        backbone.pos_interpolation = config.pos_interpolation
    elif config.pos_interpolation == "dino":
        raise UsageError(
            f"model.pos_interpolation=dino needs a plain ViT with learned positions, found {config.name}: use timm"
        )
    if drop_path and (config.drop_path_uniform or config.drop_path_subset):
        if not isinstance(backbone, PositionalViT):
            raise UsageError(f"model.drop_path_uniform and drop_path_subset need a plain ViT, found {config.name}")
        set_drop_path(backbone, drop_path, uniform=config.drop_path_uniform, subset=config.drop_path_subset)
    if isinstance(backbone, VisionTransformer) and config.init != "timm":
        _init_vit(backbone, config.init)
    set_attention(backbone, config.attention)
    return backbone


def feature_dim(backbone: nn.Module) -> int:
    """D, the size of the pooled features."""
    return int(getattr(backbone, "head_hidden_size", None) or getattr(backbone, "num_features"))  # noqa: B009


def has_patch_tokens(backbone: nn.Module) -> bool:
    """Whether `last_tokens` gives patch tokens: true for ViTs."""
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(backbone, VisionTransformer)


def last_tokens(backbone: nn.Module, x: Tensor, n: int = 1) -> list[tuple[Tensor, Tensor | None]]:
    """Tokens after the last n blocks with the final norm applied, oldest first (official `get_intermediate_layers`).

    Args:
        backbone: a ViT, or any backbone for n = 1.
        x: images [B, 3, H, W].
        n: number of blocks; all of them when there are fewer.

    Returns:
        Pairs (CLS token or pooled features [B, D], patch tokens [B, N, D] or None for a backbone without).
    """
    if not has_patch_tokens(backbone):
        if n > 1:
            raise UsageError(f"features of the last {n} blocks need a ViT, found {type(backbone).__name__}: use 1")
        return [(backbone(x), None)]
    prepare_attention(backbone, x)
    vit: Any = backbone
    tokens, outputs = _embed(vit, x), []
    for block in vit.blocks:
        tokens = block(tokens)
        outputs = [*outputs, tokens][-n:]
    return [_split(vit, vit.norm(tokens)) for tokens in outputs]


def masked_tokens(backbone: nn.Module, x: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
    """All tokens after the final norm, [B, prefix + N, D]; the patches under the mask are hidden from the backbone.

    Args:
        backbone: a ViT.
        x: images [B, 3, H, W].
        mask: bool [B, N], patches replaced by `mask_token` before their positions are added; None hides nothing.
        mask_token: [1, D].

    Raises:
        UsageError: the backbone has no patch tokens.
    """
    vit = _positional(backbone)
    prepare_attention(backbone, x)
    return vit.forward_tokens(x, mask, mask_token)


def kept_features(backbone: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """Pooled features [B, D] of images [B, 3, H, W] that have lost all patches but `keep`, int64 [B, n] (MSN).

    Raises:
        UsageError: the backbone has no patch tokens.
    """
    vit = _positional(backbone)
    prepare_attention(backbone, x)
    return vit.forward_kept(x, keep)


def patch_grid(backbone: nn.Module, side: int) -> tuple[int, int]:
    """Rows and columns of patches of a square image, its side in pixels.

    Raises:
        UsageError: the backbone has no patch tokens, or does not take this size.
    """
    return _positional(backbone).grid(side, side)


def last_self_attention(backbone: nn.Module, x: Tensor) -> Tensor:
    """Softmaxed attention of the last block, [B, heads, 1 + N, 1 + N] (official `get_last_selfattention`)."""
    if not has_patch_tokens(backbone):
        raise UsageError(f"attention maps need a ViT, found {type(backbone).__name__}")
    prepare_attention(backbone, x)
    vit: Any = backbone
    tokens = _embed(vit, x)
    *before, last = vit.blocks
    for block in before:
        tokens = block(tokens)
    attention = last.attn
    batch, length, _ = tokens.shape
    qkv = attention.qkv(last.norm1(tokens)).reshape(batch, length, 3, attention.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (attention.q_norm(q) * attention.scale @ attention.k_norm(k).transpose(-2, -1)).softmax(dim=-1)


def check_image_sizes(backbone: nn.Module, sides: list[int]) -> None:
    """Refuse sides in pixels of square images that the backbone cannot take.

    Raises:
        UsageError: names the side and, for ViTs, the sizes that would do.
    """
    from pretrain.models.positions import PositionalViT, check_image_size

    for side in sides:
        if isinstance(backbone, PositionalViT):
            check_image_size(backbone, side)
            continue
        was_training = backbone.training
        try:
            with torch.no_grad():
                backbone.eval()(next(backbone.parameters()).new_zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(f"{type(backbone).__name__} cannot take images of {side} px: {error}") from error
        finally:
            backbone.train(was_training)


def _create_timm(config: ModelConfig, drop_path: float) -> nn.Module:
    import timm

    name = config.name
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"unknown model {name!r}: {hint}Any timm model with pooled features works")
    required = dict(config.kwargs)
    if config.mlp == "swiglu":
        from pretrain.models.swiglu import SwiGLU

        # timm's DINOv2 ViT-g brings the ratio of its own SwiGLU, which would be reduced a second time.
        required = {"mlp_ratio": 4.0, **required, "mlp_layer": SwiGLU}
    # What a model takes varies; these are left out where it does not take them.
    optional = {"dynamic_img_size": True, "drop_path_rate": drop_path}
    for key in config.kwargs:
        optional.pop(key, None)
    while True:
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **required, **optional)
        except (TypeError, AssertionError, ValueError) as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            key = refused.group(1) if refused else ""
            if key == "drop_path_rate" and drop_path:
                raise UsageError(f"{name} has no stochastic depth: set model.drop_path=0") from error
            if key in ("mlp_layer", "mlp_ratio") and key not in config.kwargs:
                raise UsageError(f"{name} has no MLP that could be replaced: set model.mlp=timm") from error
            if key not in optional:
                raise UsageError(f"{name} cannot be built with model.kwargs={config.kwargs}: {error}") from error
            del optional[key]


def _init_vit(backbone: nn.Module, init: Literal["dino", "xavier"]) -> None:
    """`dino`: truncated normal of std .02 for Linear weights, positions and CLS; the patch convolution as PyTorch does.

    `xavier`: Xavier uniform for Linear weights and the patch convolution seen as a Linear, the rest as `dino`.
    """
    for token in (backbone.pos_embed, backbone.cls_token, backbone.reg_token):
        if isinstance(token, nn.Parameter):
            nn.init.trunc_normal_(token, std=0.02)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            if init == "dino":
                nn.init.trunc_normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and init == "xavier":
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _embed(vit: Any, x: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> tokens before the first block."""
    from pretrain.models.positions import PositionalViT

    if isinstance(vit, PositionalViT):
        return vit.embed(x)
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))


def _positional(backbone: nn.Module) -> PositionalViT:
    from pretrain.models.positions import PositionalViT

    if not isinstance(backbone, PositionalViT):
        raise UsageError(
            f"hiding patches needs a plain ViT, found {type(backbone).__name__}: patch losses do not work with it; "
            "choose a ViT or set patch.weight=0"
        )
    return backbone


def _split(vit: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, prefix + N, D] -> CLS (or pooled patches, for a ViT without CLS) [B, D], patches [B, N, D]."""
    patches = tokens[:, vit.num_prefix_tokens :]
    return (tokens[:, 0] if vit.has_class_token else patches.mean(1)), patches
