"""ResNets, Swin and DINOv3 in files of other projects, against the networks of torchvision and timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.checkpoint import LoadedModel, load

State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    """Another network of the same shapes: reading it instead of the right one shows."""
    return {name: value + 0.1 if value.is_floating_point() else value for name, value in state.items()}


def complete(model: LoadedModel) -> None:
    facts = model.provenance
    assert (facts["missing"], facts["unexpected"], facts["coverage"]) == ([], [], 100.0)
    assert facts["matched"] == len(model.backbone.state_dict())


@torch.no_grad()
def close(model: LoadedModel, x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(model.backbone(x), expected, rtol=1e-5, atol=1e-5)


def resnet_files(state: State) -> dict[str, Any]:
    head = {"projection_head.0.weight": torch.zeros(4, 512), "prototypes.weight": torch.zeros(6, 4)}
    children = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    sequential = {f"{children[name.split('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()}
    queue = {"module.queue": torch.zeros(4, 4)}
    trunk = {"base_model": {"model": {"trunk": under("_feature_blocks.", state), "heads": {}}}}
    return {
        "dino": {"teacher": under("backbone.", state), "student": under("module.backbone.", other(state))},
        "release": state,
        "torchvision": state | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)},
        "swav": under("module.", state | head),
        "swav in training": {"state_dict": under("module.", state | head), "epoch": 1},
        "vissl": {"classy_state_dict": trunk},
        "moco": {"state_dict": under("module.momentum_encoder.", state) | under("module.base_encoder.", other(state))},
        "lightly": {"state_dict": under("backbone.", sequential)},
        "moco v2": {"state_dict": under("module.encoder_q.", state) | queue},
    }


@pytest.mark.parametrize("name", resnet_files({}))
@torch.no_grad()
def test_resnet_against_torchvision_in_every_layout(tmp_path: Path, name: str) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    reference = resnet18()
    reference.fc = nn.Identity()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    reference.eval()
    torch.save(resnet_files(reference.state_dict())[name], tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    complete(model)
    x = torch.randn(2, 3, 64, 64)
    close(model, x, reference(x))
    assert model.provenance["model"]["name"] == "resnet18"


@torch.no_grad()
def test_resnet50_of_dino_against_torchvision(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    reference = resnet50().eval()
    reference.fc = nn.Identity()
    state = {name: value for name, value in reference.state_dict().items() if "num_batches" not in name}
    torch.save({"teacher": under("backbone.", state)}, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    assert (model.provenance["arch"], model.provenance["coverage"]) == ("rn50", 100)
    x = torch.randn(1, 3, 64, 64)
    close(model, x, reference(x))


@pytest.mark.parametrize("ibot", [True, False])
@torch.no_grad()
def test_swin_of_ibot_and_of_timm(tmp_path: Path, ibot: bool) -> None:
    """The official code ends stage i with what timm starts stage i + 1 with, and stores its indices."""
    import timm

    torch.manual_seed(0)
    shape: dict[str, Any] = {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 7}
    reference = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **shape).eval()
    for parameter in reference.parameters():
        parameter.normal_(std=0.2)
    state = reference.state_dict()
    if ibot:
        state = {name.replace("layers.1.downsample", "layers.0.downsample"): value for name, value in state.items()}
        state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
        state["layers.1.blocks.1.attn_mask"] = torch.zeros(16, 49, 49)
        state["masked_embed"] = torch.zeros(1, 24)
        torch.save({"teacher": under("backbone.", state), "ibot_loss": {}}, tmp_path / "a.pth")
    else:
        torch.save({"model": state | {"head.fc.weight": torch.zeros(2, 48)}}, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    complete(model)
    x = torch.randn(1, 3, 224, 224)
    close(model, x, reference(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", ["release", "eval dump", "timm"])
@torch.no_grad()
def test_dinov3_against_timm(tmp_path: Path, gated: bool, biased: bool, layout: str) -> None:
    import timm

    torch.manual_seed(0)
    name = f"vit_small_{'plus_' if gated else ''}patch16_dinov3{'_qkvb' if biased else ''}"
    shape: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "mlp_ratio": 3}
    reference = timm.create_model(name, num_classes=0, global_pool="token", **shape).eval()
    for parameter in reference.parameters():
        parameter.normal_(std=0.2)
    state: State = {}
    official = {"reg_token": "storage_tokens", "fc1_g": "w1", "fc1_x": "w2"} | ({"fc2": "w3"} if gated else {})
    for key, value in reference.state_dict().items():
        for i in (1, 2):
            key = key.replace(f"gamma_{i}", f"ls{i}.gamma")
        for ours, theirs in official.items():
            key = key.replace(ours, theirs)
        state[key] = value
    for i in range(2):
        if biased:
            q, v = (state.pop(f"blocks.{i}.attn.{part}_bias") for part in "qv")
            state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones(64), v])
            mask = torch.ones(192)
            mask[64:128] = 0
            state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    state |= {"mask_token": torch.zeros(1, 64), "rope_embed.periods": torch.ones(8)}
    if layout == "timm":
        state = reference.state_dict()
    torch.save({"teacher": under("backbone.", state)} if layout == "eval dump" else state, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", num_heads=2)
    complete(model)
    x = torch.randn(2, 3, 48, 32)
    close(model, x, reference(x))
