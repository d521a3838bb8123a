"""Shapes of published networks lead back to their timm model; what shapes cannot tell is asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pretrain.errors import DinobenchError
from pretrain.models.architectures import infer_model
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.timm_names import State, recognise, to_timm

PUBLISHED = {
    "vits16": ModelConfig(name="vit_small_patch16_224"),
    "vits8": ModelConfig(name="vit_small_patch8_224"),
    "vitb16": ModelConfig(name="vit_base_patch16_224"),
    "vitl16": ModelConfig(name="vit_large_patch16_224"),
    "vitt16": ModelConfig(name="vit_tiny_patch16_224"),
    "vits16 on 96 px": ModelConfig(name="vit_small_patch16_224", kwargs={"img_size": 96}),
    "vitl7": ModelConfig(name="vit_large_patch16_224", kwargs={"patch_size": 7}),
    "vith14 ijepa": ModelConfig(
        name="vit_tiny_patch16_224",
        kwargs={"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
        | {"global_pool": "avg", "class_token": False, "fc_norm": False},
    ),
    "vitg16 ijepa": ModelConfig(
        name="vit_tiny_patch16_224",
        kwargs={"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11}
        | {"global_pool": "avg", "class_token": False, "fc_norm": False},
    ),
    "dinov2 s": ModelConfig(name="vit_small_patch14_dinov2"),
    "dinov2 g": ModelConfig(name="vit_giant_patch14_dinov2"),
    "dinov2 b reg": ModelConfig(name="vit_base_patch14_reg4_dinov2"),
    "dinov2 g reg": ModelConfig(name="vit_giant_patch14_reg4_dinov2"),
    "dinov3 s": ModelConfig(name="vit_small_patch16_dinov3_qkvb", kwargs={"global_pool": "token"}),
    "dinov3 s plus": ModelConfig(name="vit_small_plus_patch16_dinov3_qkvb", kwargs={"global_pool": "token"}),
    "dinov3 l": ModelConfig(name="vit_large_patch16_dinov3", kwargs={"global_pool": "token"}),
    "dinov3 h plus": ModelConfig(name="vit_huge_plus_patch16_dinov3_qkvb", kwargs={"global_pool": "token"}),
    "dinov3 7b": ModelConfig(name="vit_7b_patch16_dinov3", kwargs={"global_pool": "token"}),
    "rn50": ModelConfig(name="resnet50"),
    "rn101": ModelConfig(name="resnet101"),
    "swint": ModelConfig(name="swin_tiny_patch4_window7_224"),
    "swint w14": ModelConfig(name="swin_tiny_patch4_window7_224", kwargs={"window_size": 14}),
}


def state_of(config: ModelConfig) -> State:
    """Shapes without memory for the numbers."""
    return dict(_state(config.model_dump_json()))


@cache
def _state(config: str) -> State:
    model = ModelConfig.model_validate_json(config)
    with torch.device("meta"):
        return create_backbone(model.model_copy(update={"init": "timm"})).state_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network_is_found_from_its_shapes(name: str) -> None:
    config = PUBLISHED[name]
    state = state_of(config)
    kind = recognise(state)
    assert kind is not None
    found = infer_model(kind, state, rule="timm")
    assert (found.name, found.mlp) == (config.name, config.mlp)
    assert {**found.kwargs, "mlp_ratio": 0} == {**config.kwargs, "mlp_ratio": 0}
    assert {key: value.shape for key, value in state_of(found).items()} == {k: v.shape for k, v in state.items()}


def tiny(**changes: Any) -> State:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return state_of(ModelConfig(name="vit_tiny_patch16_224", kwargs=sizes | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_ratio": 2.5},
        {"qkv_bias": False},
        {"reg_tokens": 3},
        {"reg_tokens": 3, "no_embed_class": True},
        {"init_values": 1e-5},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"no_embed_class": True},
    ],
)
def test_variants_are_read_off(changes: dict[str, Any]) -> None:
    state = tiny(**changes)
    found = infer_model("vit", state, rule="dino", num_heads=3)
    again = state_of(found)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in state.items()}
    assert found.pos_interpolation == ("timm" if "reg_tokens" in changes else "dino")


def heads(found: ModelConfig) -> int:
    return int(create_backbone(found.model_copy(update={"init": "timm"})).get_submodule("blocks.0.attn").num_heads)


def test_heads_are_those_of_the_published_width_unless_told() -> None:
    small = state_of(ModelConfig(name="vit_small_patch16_224", kwargs={"depth": 1}))
    assert heads(infer_model("vit", small, rule="dino")) == 6
    assert heads(infer_model("vit", small, rule="dino", heads={384: 12})) == 12  # MoCo v3
    assert heads(infer_model("vit", small, rule="dino", heads={384: 12}, num_heads=3)) == 3
    assert heads(infer_model("vit", tiny(embed_dim=128, num_heads=8), rule="dino")) == 2
    with pytest.raises(DinobenchError, match=r"width 48.*heads cannot be told.*--num-heads"):
        infer_model("vit", tiny(), rule="dino")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"patch_embed.proj.weight": (48, 12, 4, 4)}, r"shape \(48, 12, 4, 4\), expected \(width, 3, side, side\)"),
        ({"pos_embed": (1, 18, 48)}, r"pos_embed has 18 rows.*not square"),
        ({"blocks.0.mlp.fc1.weight": None}, r"without the tensor 'blocks\.0\.mlp\.fc1\.weight'"),
        ({"pos_embed": None}, r"without the tensor 'pos_embed'"),
        ({"blocks.999999999.norm1.weight": (48,)}, r"blocks most are missing"),
        ({"blocks.4.norm1.weight": (48,)}, r"blocks \[3\] are missing"),
        ({"patch_embed.proj.weight": (99_999, 3, 4, 4)}, r"stand for \d+ parameters, the file holds"),
    ],
)
def test_shapes_that_fit_no_vit_are_refused(change: dict[str, Any], told: str) -> None:
    state = tiny()
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.empty(shape, device="meta")
    with pytest.raises(DinobenchError, match=told):
        infer_model("vit", state, rule="dino", num_heads=3)


def test_wide_and_small_image_resnets_are_refused() -> None:
    state = state_of(ModelConfig(name="resnet50"))
    for change in (
        {"conv1.weight": (128, 3, 7, 7)},
        {"conv1.weight": (64, 3, 3, 3)},
        {"layer1.0.conv1.weight": (128, 64, 1, 1)},
    ):
        changed = state | {name: torch.empty(shape, device="meta") for name, shape in change.items()}
        with pytest.raises(DinobenchError, match=r"not known here, expected resnet18.*wide ones and stems"):
            infer_model("resnet", changed, rule="dino")
    del state["layer3.5.conv1.weight"]
    with pytest.raises(DinobenchError, match="not known here"):
        infer_model("resnet", {name: v for name, v in state.items() if not name.startswith("layer3.5.")}, rule="dino")


def test_names_of_unknown_networks_are_refused_with_what_is_expected() -> None:
    with pytest.raises(
        DinobenchError, match=r"named features\.0\.weight.*patch_embed\.proj\.weight.*rename the tensors"
    ):
        to_timm({"features.0.weight": torch.zeros(1)})
    with pytest.raises(DinobenchError, match=r"CAPI's own ViT.*timm does not have"):
        to_timm({"encoder.blocks.0.residual1.norm.weight": torch.zeros(1)})


def test_bias_of_keys_under_rotary_positions_is_refused() -> None:
    state = {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2), "storage_tokens": torch.zeros(1, 4, 4)}
    with pytest.raises(DinobenchError, match="bias for the keys"):
        to_timm(state | {"blocks.0.attn.qkv.bias": torch.ones(12)})
