"""Heads and prototypes of other projects: read with the MLP that leads to them, else alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.checkpoint import load

State = dict[str, Tensor]
Golden = Callable[[str], dict[str, np.ndarray]]


def weights(arrays: dict[str, np.ndarray], prefix: str) -> State:
    return {key.removeprefix(prefix): torch.from_numpy(a) for key, a in arrays.items() if key.startswith(prefix)}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[Tensor, Tensor], State]] = {
    "weight_norm": lambda g, v: {"weight_g": g, "weight_v": v},
    "parametrizations": lambda g, v: {
        "parametrizations.weight.original0": g,
        "parametrizations.weight.original1": v,
    },
    "plain": lambda g, v: {"weight": g * F.normalize(v, dim=1)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", "abcd")
@torch.no_grad()
def test_golden_dino_head_with_prototypes_in_three_layouts(
    golden: Golden, tmp_path: Path, variant: str, layout: str
) -> None:
    """Variants: 3 layers, 1 layer, BatchNorm, 4 layers with trained magnitudes."""
    g = golden("dino_head")
    head = weights(g, f"{variant}.sd.")
    magnitude, direction = head.pop("last_layer.weight_g"), head.pop("last_layer.weight_v")
    head |= under("last_layer.", LAYOUTS[layout](magnitude, direction))
    teacher = under("backbone.", weights(golden("dino_vit"), "sd.")) | under("head.", head)
    torch.save({"teacher": teacher, "dino_loss": {}}, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", num_heads=3)
    assert model.head is not None and model.prototypes is model.head.last_layer
    logits = model.head(torch.from_numpy(g[f"{variant}.x"]))
    torch.testing.assert_close(logits, torch.from_numpy(g[f"{variant}.y"]), rtol=1e-4, atol=1e-5)
    assert model.prototypes.kind == ("free" if layout == "plain" else "weight_norm")
    torch.testing.assert_close(model.prototypes.norms(), magnitude.flatten(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_golden_dinov2_head_of_an_eval_dump(golden: Golden, tmp_path: Path) -> None:
    """Its features are 24 wide, the backbone's 48: then the prototypes stand alone, and it is said."""
    g = golden("dinov2_head")
    head = weights(g, "sd.")
    teacher = under("backbone.", weights(golden("dinov2_vit_mlp_reg0"), "sd."))
    dump = teacher | under("dino_head.", head) | under("ibot_head.", head)
    torch.save({"teacher": dump}, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", num_heads=3)
    assert model.head is None and model.prototypes is not None
    torch.testing.assert_close(model.prototypes.norms(), head["last_layer.weight_g"].flatten())
    assert "the head does not fit the backbone: its prototypes are read alone" in model.report()
    wide = {**head, "mlp.0.weight": head["mlp.0.weight"].repeat(1, 2)}
    torch.save({"teacher": teacher | under("dino_head.", wide)}, tmp_path / "b.pth")
    model = load(tmp_path / "b.pth", num_heads=3)
    assert model.head is not None and model.provenance["method"] == "dinov2"
    x = torch.from_numpy(g["x"])
    torch.testing.assert_close(model.head(x.repeat(1, 2) / 2), torch.from_numpy(g["y"]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prototypes_without_the_mlp_are_read_alone(golden: Golden, tmp_path: Path) -> None:
    head = weights(golden("ibot_head"), "separate.sd.")
    alone = {name: value for name, value in head.items() if name.startswith("last_layer")}
    teacher = under("backbone.", weights(golden("ibot_vit"), "sd."))
    torch.save({"teacher": teacher | under("head.", alone), "ibot_loss": {}}, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", num_heads=3)
    assert model.head is None and model.prototypes is not None
    expected = alone["last_layer.weight_g"] * F.normalize(alone["last_layer.weight_v"], dim=1)
    torch.testing.assert_close(model.prototypes.vectors(), expected)
    assert model.patch is not None and model.patch.head is None
    own = alone["last_layer2.weight_g"] * F.normalize(alone["last_layer2.weight_v"], dim=1)
    torch.testing.assert_close(model.patch.prototypes.vectors(), own)


def msn_head(norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential()
    for number, (width, next_width) in enumerate([(48, 20), (20, 20), (20, 8)], start=1):
        head.add_module(f"fc{number}", nn.Linear(width, next_width))
        if number < 3 and norm:
            head.add_module(f"bn{number}", nn.BatchNorm1d(next_width))
        if number < 3:
            head.add_module(f"gelu{number}", nn.GELU())
    return head.eval()


@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_msn_compares_directions(golden: Golden, tmp_path: Path, norm: bool) -> None:
    head, prototypes = msn_head(norm), 3 * torch.randn(6, 8)
    state = under("module.", weights(golden("dino_vit"), "sd.") | under("fc.", head.state_dict()))
    payload = {"encoder": state, "target_encoder": state, "prototypes": prototypes, "temperature": 0.1, "epoch": 4}
    torch.save(payload, tmp_path / "a.pth.tar")
    model = load(tmp_path / "a.pth.tar", num_heads=3)
    assert model.head is not None
    x = torch.randn(5, 48)
    torch.testing.assert_close(model.head(x), F.normalize(head(x), dim=1) @ F.normalize(prototypes, dim=1).T)
    assert model.temperature == 0.1


@torch.no_grad()
def test_swav_has_relu_and_batch_norm(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(512, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 8)).eval()
    mlp[1].running_mean.normal_()
    prototypes = torch.randn(6, 8)
    state = {name: value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")}
    state |= under("projection_head.", mlp.state_dict()) | {"prototypes.weight": prototypes}
    torch.save(under("module.", state), tmp_path / "a.pth.tar")
    model = load(tmp_path / "a.pth.tar")
    assert model.head is not None
    x = torch.randn(5, 512)
    torch.testing.assert_close(model.head(x), F.normalize(mlp(x), dim=1) @ F.normalize(prototypes, dim=1).T)
    assert model.provenance["coverage"] == 100


@torch.no_grad()
def test_head_of_lightly(golden: Golden, tmp_path: Path) -> None:
    """Its MLP is called `layers` and its prototypes are parametrised."""
    g = golden("dino_head")
    head = {name.replace("mlp.", "layers."): value for name, value in weights(g, "a.sd.").items()}
    magnitude, direction = head.pop("last_layer.weight_g"), head.pop("last_layer.weight_v")
    head |= under("last_layer.", LAYOUTS["parametrizations"](magnitude, direction))
    backbone = weights(golden("dino_vit"), "sd.")
    state = under("student_backbone.vit.", backbone) | under("teacher_backbone.vit.", backbone)
    torch.save({"state_dict": state | under("teacher_head.", head)}, tmp_path / "a.ckpt")
    model = load(tmp_path / "a.ckpt", num_heads=3)
    assert model.head is not None
    logits = model.head(torch.from_numpy(g["a.x"]))
    torch.testing.assert_close(logits, torch.from_numpy(g["a.y"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("epoch", "arguments", "expected"),
    [
        (100, {"teacher_temp": 0.04}, 0.04),
        (100, {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30}, 0.07),
        (1, {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 4}, 0.04),
        (3, {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 4}, 0.06),
        (4, {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 4}, 0.07),
        (100, {}, None),
    ],
)
def test_temperature_is_that_of_the_last_epoch(
    golden: Golden, tmp_path: Path, epoch: int, arguments: dict[str, Any], expected: float | None
) -> None:
    """The file holds the number of the next epoch; the schedule is a linspace that includes its end."""
    state = under("backbone.", weights(golden("dino_vit"), "sd.")) | under(
        "head.", weights(golden("dino_head"), "a.sd.")
    )
    payload = {"teacher": state, "student": state, "epoch": epoch, "args": argparse.Namespace(**arguments, seed=3)}
    torch.save(payload, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", num_heads=3)
    assert model.temperature == pytest.approx(expected) if expected else model.temperature is None
    assert (model.provenance["epoch"], model.provenance["seed"]) == (epoch, 3)
    assert load(tmp_path / "a.pth", network="student", num_heads=3).temperature == 0.1
