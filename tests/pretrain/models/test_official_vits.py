"""The ViTs of iBOT and DINOv2 against the official code: masks, LayerScale, registers, SwiGLU, sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain.models.backbones import (
    ModelConfig,
    create_backbone,
    kept_features,
    last_tokens,
    masked_tokens,
    patch_grid,
)
from pretrain.models.positions import PositionalViT

Arrays = dict[str, np.ndarray]
Golden = Callable[[str], Arrays]

NAMES = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "w12": "fc1", "w3": "fc2", "register_tokens": "reg_token"}
"""Official name -> timm's; `gamma_i` is iBOT's, the others are DINOv2's."""


def close(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def official_vit(reference: Arrays, prefix: str, **settings: Any) -> tuple[PositionalViT, Tensor | None]:
    """A backbone with the official weights, and the token for masked patches where there is one."""
    state = {key.removeprefix(prefix): torch.from_numpy(a) for key, a in reference.items() if key.startswith(prefix)}
    for official, ours in NAMES.items():
        state = {key.replace(official, ours): value for key, value in state.items()}
    mask_token = state.pop("masked_embed", state.pop("mask_token", None))
    sizes = {key: int(reference[key]) for key in ("img_size", "patch_size", "depth", "num_heads")}
    kwargs: dict[str, Any] = {**sizes, "embed_dim": state["norm.weight"].numel()}
    if "blocks.0.ls1.gamma" in state:
        kwargs["init_values"] = 1e-5
    if "reg_token" in state:
        # Official: the position of CLS is a parameter of its own and registers have none. Here CLS holds the sum.
        kwargs |= {"reg_tokens": state["reg_token"].shape[1], "no_embed_class": True}
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs, **settings))
    backbone.load_state_dict(state)
    assert isinstance(backbone, PositionalViT)
    return backbone.eval(), mask_token


@torch.no_grad()
def test_golden_ibot_vit_tokens_masked_and_not(golden: Golden) -> None:
    g = golden("ibot_vit")
    backbone, mask_token = official_vit(g, "sd.", pos_interpolation="dino")
    x, mask = torch.from_numpy(g["x"]), torch.from_numpy(g["mask"])
    assert patch_grid(backbone, x.shape[-1]) == tuple(mask.shape[1:])
    close(masked_tokens(backbone, x, mask.flatten(1), mask_token), g["tokens_masked"])
    close(masked_tokens(backbone, x, None, mask_token), g["tokens_unmasked"])
    close(masked_tokens(backbone, torch.from_numpy(g["x_local"]), None, None), g["tokens_local"])
    close(backbone(x), g["tokens_unmasked"][:, 0])


@torch.no_grad()
def test_golden_ibot_vit_layer_scale(golden: Golden) -> None:
    g = golden("ibot_vit")
    backbone, _ = official_vit(g, "ls.sd.", pos_interpolation="dino")
    close(masked_tokens(backbone, torch.from_numpy(g["x"]), None, None), g["ls.tokens"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dinov2_vit_mlp_reg0", {"pos_interpolation": "dino"}),
        ("dinov2_vit_swiglu_reg4_aa", {"pos_interpolation": "timm", "mlp": "swiglu"}),
    ],
)
@torch.no_grad()
def test_golden_dinov2_vit_tokens_of_every_size(golden: Golden, name: str, settings: dict[str, Any]) -> None:
    g = golden(name)
    backbone, mask_token = official_vit(g, "sd.", **settings)
    sizes = [key.removesuffix(".x") for key in g if key.endswith(".x")]
    for size in sizes:
        expected = {key.removeprefix(f"{size}."): a for key, a in g.items() if key.startswith(f"{size}.")}
        x = torch.from_numpy(expected["x"])
        prefix = 1 + expected["x_norm_regtokens"].shape[1]
        tokens = masked_tokens(backbone, x, None, mask_token)
        close(tokens[:, 0], expected["x_norm_clstoken"])
        close(tokens[:, 1:prefix], expected["x_norm_regtokens"])
        close(tokens[:, prefix:], expected["x_norm_patchtokens"])
        close(backbone(x), expected["cls"])
        masked = masked_tokens(backbone, x, torch.from_numpy(expected["mask"]), mask_token)
        close(masked[:, prefix:], expected["masked_x_norm_patchtokens"])
        first = backbone.embed(x)
        close(backbone.blocks(first), expected["x_prenorm"])
        blocks = last_tokens(backbone, x, 2)
        for (cls, patches), cls_expected, patches_expected in zip(
            blocks, expected["inter2_cls"], expected["inter2_patch"], strict=True
        ):
            assert patches is not None
            close(cls, cls_expected)
            close(patches, patches_expected)
        if "inter_nonorm" in expected:
            grid = backbone.blocks[0](first)[:, prefix:].unflatten(1, patch_grid(backbone, x.shape[-1]))
            close(grid.permute(0, 3, 1, 2), expected["inter_nonorm"][0])
        for key in (key for key in expected if key.startswith("linear_input")):
            num, pooled = int(key.removeprefix("linear_input_n")[0]), key.endswith("True")
            parts = [cls for cls, _ in blocks[-num:]]
            last = blocks[-1][1]
            assert last is not None
            close(torch.cat([*parts, last.mean(1)] if pooled else parts, -1), expected[key])
    assert len(sizes) == 3


def test_golden_dinov2_params_widths_of_swiglu(golden: Golden) -> None:
    """Also for sizes whose ratio is no exact fraction: 4096 -> 2736 gives W_1 and W_2 of 5472 rows together."""
    g = golden("dinov2_params")
    for hidden, width in g["swiglu_hidden_in_out"].tolist():
        dim = hidden // 4
        with torch.device("meta"):
            kwargs = {"img_size": 28, "patch_size": 14, "embed_dim": dim, "depth": 1, "num_heads": 4}
            config = ModelConfig(name="vit_tiny_patch16_224", mlp="swiglu", kwargs=kwargs, init="timm")
            mlp: Any = create_backbone(config).get_submodule("blocks.0.mlp")
        assert mlp.fc1.weight.shape == (2 * width, dim)
        assert mlp.fc2.weight.shape == (dim, width)


def test_swiglu_of_dinov2_vit_g_is_that_of_timm() -> None:
    name, kwargs = "vit_giant_patch14_dinov2", {"img_size": 28, "depth": 1}
    with torch.device("meta"):
        ours, theirs = (create_backbone(ModelConfig(name=name, kwargs=kwargs, mlp=mlp)) for mlp in ("swiglu", "timm"))
    shapes = [{key: value.shape for key, value in backbone.state_dict().items()} for backbone in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_gate_of_swiglu_starts_like_every_other_linear() -> None:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3}
    for init in ("timm", "dino"):
        torch.manual_seed(0)
        config = ModelConfig(name="vit_tiny_patch16_224", mlp="swiglu", kwargs=kwargs, init=init)  # type: ignore[arg-type]
        fc1 = create_backbone(config).get_submodule("blocks.0.mlp.fc1")
        assert isinstance(fc1, nn.Linear)
        for half in fc1.weight.chunk(2):
            assert float(half.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not fc1.bias.any()


def tiny(**kwargs: Any) -> PositionalViT:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs={**sizes, **kwargs}))
    assert isinstance(backbone, PositionalViT)
    return backbone


def test_masked_patches_tell_nothing_and_train_the_mask_token() -> None:
    backbone, mask_token = tiny().eval(), nn.Parameter(torch.randn(1, 24))
    x = torch.randn(2, 3, 16, 16)
    other = x.clone()
    other[:, :, :4, 4:8] = torch.randn(2, 3, 4, 4)  # patch 1
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 1] = True
    tokens = masked_tokens(backbone, x, mask, mask_token)
    torch.testing.assert_close(tokens, masked_tokens(backbone, other, mask, mask_token))
    assert not torch.allclose(tokens, masked_tokens(backbone, x, None, mask_token))
    tokens.sum().backward()
    assert mask_token.grad is not None and bool(mask_token.grad.any())


def feature_of_kept(backbone: PositionalViT, x: Tensor, keep: Tensor) -> Tensor:
    """One image at a time, only its kept patches: tokens are cut out after the positions are added."""
    features = []
    for image, patches in zip(x, keep, strict=True):
        tokens = backbone.embed(image[None])
        index = [*range(backbone.num_prefix_tokens), *(backbone.num_prefix_tokens + patches).tolist()]
        features.append(backbone.norm(backbone.blocks(tokens[:, index]))[:, 0])
    return torch.cat(features)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2, "no_embed_class": True}])
@torch.no_grad()
def test_kept_patches_keep_their_positions(kwargs: dict[str, Any]) -> None:
    backbone = tiny(**kwargs).eval()
    x = torch.randn(3, 3, 16, 16)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    torch.testing.assert_close(kept_features(backbone, x, keep), feature_of_kept(backbone, x, keep))
    every = torch.stack([torch.randperm(16) for _ in range(3)])
    torch.testing.assert_close(kept_features(backbone, x, every), backbone(x), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    backbone = tiny().train()
    mask = torch.rand(2, 16) < 0.4
    x, mask_token, keep = torch.randn(2, 3, 16, 16), torch.zeros(1, 24), torch.arange(8).expand(2, -1)
    gradients, saved = [], []
    for checkpointing in (False, True):
        backbone.set_grad_checkpointing(checkpointing)
        backbone.zero_grad()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            outputs = (masked_tokens(backbone, x, mask, mask_token), backbone.forward_kept(x, keep), backbone(x))
        sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
        saved.append(len(kept))
    assert saved[1] < saved[0] / 2
    torch.testing.assert_close(gradients[0], gradients[1])
