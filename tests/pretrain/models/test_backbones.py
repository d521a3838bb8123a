"""Backbones by name: the official ViT's numbers, initialisation, tokens, attention kernels, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor
from torch.nn import functional as F

from pretrain.errors import UsageError
from pretrain.models.backbones import (
    ModelConfig,
    check_image_sizes,
    create_backbone,
    feature_dim,
    has_patch_tokens,
    kept_features,
    last_self_attention,
    last_tokens,
    masked_tokens,
    patch_grid,
)

Golden = Callable[[str], dict[str, np.ndarray]]
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


def tiny(**settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=TINY, **settings))


def official_vit(reference: dict[str, np.ndarray]) -> torch.nn.Module:
    sizes = {key: int(reference[key]) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=sizes, pos_interpolation="dino"))
    state = {key.removeprefix("sd."): torch.from_numpy(a) for key, a in reference.items() if key.startswith("sd.")}
    backbone.load_state_dict(state)
    return backbone.eval()


def inputs(reference: dict[str, np.ndarray]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for size in sorted({key.split(".")[0] for key in reference if key.endswith(".forward")}):
        arrays = {key.split(".")[1]: torch.as_tensor(a) for key, a in reference.items() if key.startswith(f"{size}.")}
        yield arrays["x"], arrays


@torch.no_grad()
def test_golden_dino_vit_features_and_tokens(golden: Golden) -> None:
    reference = golden("dino_vit")
    backbone: Any = official_vit(reference)
    for x, expected in inputs(reference):
        torch.testing.assert_close(backbone(x), expected["forward"], rtol=0, atol=1e-5)
        torch.testing.assert_close(backbone.embed(x), expected["tokens"], rtol=0, atol=1e-5)
        num_blocks = len(expected["inter_n2"])
        layers = [torch.cat([cls[:, None], patches], 1) for cls, patches in last_tokens(backbone, x, num_blocks)]
        torch.testing.assert_close(torch.stack(layers), expected["inter_n2"], rtol=0, atol=1e-5)
        if "last_selfattention" in expected:
            attention = last_self_attention(backbone, x)
            torch.testing.assert_close(attention, expected["last_selfattention"], rtol=0, atol=1e-5)
        if "inter_n99_count" in expected:
            assert len(last_tokens(backbone, x, 99)) == int(expected["inter_n99_count"])


@torch.no_grad()
def test_golden_dino_vit_float64(golden: Golden) -> None:
    reference = golden("dino_vit")
    backbone = official_vit(reference).double()
    checked = 0
    for x, expected in inputs(reference):
        if "forward_f64" in expected:
            torch.testing.assert_close(backbone(x.double()), expected["forward_f64"], rtol=0, atol=1e-9)
            checked += 1
    assert checked


@torch.no_grad()
def test_golden_dino_vit_multiscale(golden: Golden) -> None:
    """Mean CLS over the scales 1, 1/sqrt(2), 1/2 of one image, divided by its norm (official `multi_scale`)."""
    reference = golden("dino_vit")
    backbone = official_vit(reference)
    x = torch.from_numpy(reference["multiscale.x"])
    scales = [F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False) for s in (2**-0.5, 0.5)]
    feature = torch.stack([backbone(image) for image in (x, *scales)]).mean(0)
    torch.testing.assert_close(
        feature / feature.norm(), torch.from_numpy(reference["multiscale.feat"]), rtol=0, atol=1e-5
    )


def test_golden_dino_params_names_shapes_and_init_of_vit_tiny(golden: Golden) -> None:
    """Names in order, shapes, and mean and spread of every parameter within sampling error."""
    reference = golden("dino_params")
    torch.manual_seed(0)
    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", init="dino"))
    parameters = {name: parameter.detach() for name, parameter in backbone.named_parameters()}
    assert list(parameters) == reference["vit_tiny_names"].tolist()
    assert [str(tuple(p.shape)) for p in parameters.values()] == reference["vit_tiny_shapes"].tolist()
    for (name, values), (mean, std, _, _) in zip(
        parameters.items(), reference["vit_tiny_init_mean_std_min_max"], strict=True
    ):
        error = 12 * std / values.numel() ** 0.5
        assert float(values.mean()) == pytest.approx(mean, abs=error + 1e-12), name
        assert float(values.std()) == pytest.approx(std, abs=error + 1e-12), name


def test_stochastic_depth_is_for_the_student_only() -> None:
    def rates(drop_path: float) -> list[float]:
        torch.manual_seed(0)
        config = ModelConfig(name="vit_tiny_patch16_224", kwargs=TINY)
        backbone = create_backbone(config, drop_path=drop_path)
        return [module.drop_prob for module in backbone.modules() if isinstance(module, DropPath)]

    assert rates(0.0) == []
    assert rates(0.1) == pytest.approx([0.05, 0.05, 0.1, 0.1])


def test_initialisations_differ_where_they_say() -> None:
    def spread(init: str, name: str) -> float:
        return float(tiny(init=init).get_parameter(name).detach().std())

    assert spread("dino", "blocks.0.attn.qkv.weight") == pytest.approx(0.02, rel=0.1)
    assert spread("xavier", "blocks.0.attn.qkv.weight") == pytest.approx((2 / (24 + 72)) ** 0.5, rel=0.1)
    assert spread("xavier", "patch_embed.proj.weight") == pytest.approx((2 / (24 + 48)) ** 0.5, rel=0.1)
    assert spread("dino", "cls_token") == pytest.approx(0.02, rel=0.5)
    assert spread("timm", "cls_token") < 1e-5


@pytest.mark.parametrize(
    ("name", "kwargs", "patches"),
    [
        ("resnet18", {}, False),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}, False),
        ("vit_tiny_patch16_224", TINY, True),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 3}, True),
    ],
)
@torch.no_grad()
def test_any_model_with_pooled_features_takes_views_of_several_sizes(
    name: str, kwargs: dict[str, Any], patches: bool
) -> None:
    backbone = create_backbone(ModelConfig(name=name, kwargs=kwargs)).eval()
    assert has_patch_tokens(backbone) == patches
    side = 56
    for size in (side, 2 * side):
        features = backbone(torch.randn(2, 3, size, size))
        assert features.shape == (2, feature_dim(backbone))
    ((cls, tokens),) = last_tokens(backbone, torch.randn(2, 3, side, side), 1)
    assert cls.shape == (2, feature_dim(backbone))
    assert (tokens is not None) == patches


def test_several_blocks_need_a_vit() -> None:
    backbone = create_backbone(ModelConfig(name="resnet18"))
    with pytest.raises(UsageError, match="last 4 blocks need a ViT, found ResNet"):
        last_tokens(backbone, torch.randn(1, 3, 32, 32), 4)
    with pytest.raises(UsageError, match="attention maps need a ViT"):
        last_self_attention(backbone, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "call",
    [
        lambda backbone: masked_tokens(backbone, torch.zeros(1, 3, 32, 32), None, None),
        lambda backbone: kept_features(backbone, torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, dtype=torch.int64)),
        lambda backbone: patch_grid(backbone, 32),
    ],
)
def test_hiding_patches_needs_a_vit(call: Callable[[torch.nn.Module], object]) -> None:
    with pytest.raises(UsageError, match="needs a plain ViT, found ResNet: .* set patch.weight=0"):
        call(create_backbone(ModelConfig(name="resnet18")))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 2, 4)}),
        ("resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}),
    ],
)
def test_hierarchical_backbones_train_on_crops_of_224_and_96(name: str, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name=name, kwargs=kwargs, pos_interpolation="timm", init="dino")
    backbone = create_backbone(config, drop_path=0.1).train()
    check_image_sizes(backbone, [224, 96])
    features = [backbone(torch.randn(2, 3, side, side)) for side in (224, 96)]
    assert [f.shape for f in features] == [(2, feature_dim(backbone))] * 2
    torch.cat(features).square().sum().backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), parameter_name


def test_swin_gives_a_full_size_image_the_same_features_whatever_it_saw_before() -> None:
    kwargs = {"embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2)}
    backbone = create_backbone(ModelConfig(name="swin_tiny_patch4_window7_224", kwargs=kwargs)).eval()
    fixed = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **kwargs).eval()
    fixed.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        backbone(x[..., :96, :96])
        torch.testing.assert_close(backbone(x), fixed(x), rtol=1e-4, atol=1e-5)


def fused(backbone: Any) -> set[bool]:
    return {block.attn.fused_attn for block in backbone.blocks}


def test_attention_kernels_agree_and_can_be_forced() -> None:
    plain, kernel = tiny(attention="math"), tiny(attention="fused")
    assert fused(plain) == {False} and fused(kernel) == {True}
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), kernel(x), rtol=1e-4, atol=1e-5)


def test_auto_attention_is_plain_for_bfloat16_on_a_cpu() -> None:
    backbone = tiny(attention="auto")
    x = torch.randn(2, 3, 16, 16)
    for call in (backbone, lambda images: last_tokens(backbone, images, 1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(x)
        assert fused(backbone) == {False}
        call(x)
        assert fused(backbone) == {True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="vit_smal_patch16_224"), "did you mean vit_small_patch16_224"),
        (ModelConfig(name="vit_tiny_patch16_224", kwargs={"widht": 3}), "cannot be built with model.kwargs.*widht"),
        (ModelConfig(name="vit_tiny_patch16_224", kwargs={"num_heads": 5}), "cannot be built"),
        (ModelConfig(name="resnet18", pos_interpolation="dino"), "needs a plain ViT with learned positions"),
        (ModelConfig(name="resnet18", mlp="swiglu"), "no MLP that could be replaced: set model.mlp=timm"),
    ],
)
def test_model_that_cannot_be_built_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_backbone(config)


def test_stochastic_depth_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"set model.drop_path=0"):
        create_backbone(ModelConfig(name="vgg11"), drop_path=0.1)


def test_image_sizes_are_checked_before_training() -> None:
    check_image_sizes(tiny(), [16, 8])
    with pytest.raises(UsageError, match="15 px do not divide into patches of 4 px: use 12 or 16 px"):
        check_image_sizes(tiny(), [16, 15])
    backbone = create_backbone(ModelConfig(name="resnet18")).train()
    check_image_sizes(backbone, [32])
    assert backbone.training


@pytest.mark.parametrize(
    ("name", "kwargs", "label"),
    [
        ("vit_small_patch16_224", {}, "vits16"),
        ("vit_base_patch8_224", {"img_size": 96}, "vitb8"),
        ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3}, "vit-d64l3p4"),
        ("vit_tiny_patch16_224", {"depth": 3}, "vitt-l3p16"),
        ("resnet50", {}, "rn50"),
        ("swin_tiny_patch4_window7_224.ms_in1k", {}, "swint"),
        ("swin_small_patch4_window7_224", {}, "swin-small-patch4-window7-224"),
    ],
)
def test_label_is_short(name: str, kwargs: dict[str, Any], label: str) -> None:
    assert ModelConfig(name=name, kwargs=kwargs).label == label
