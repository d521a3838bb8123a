"""The head of the patch tokens: of iBOT and DINOv2 against the official outputs, and of our own files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.models import checkpoint
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import load
from pretrain.models.heads import HeadConfig
from pretrain.models.network import Network
from pretrain.models.patch_head import PatchConfig

State = dict[str, Tensor]
Golden = Callable[[str], dict[str, np.ndarray]]
HEAD = HeadConfig(hidden=16, bottleneck=16, num_prototypes=10, prototypes="free", normaliser="vmf")


def weights(arrays: dict[str, np.ndarray], prefix: str) -> State:
    return {key.removeprefix(prefix): torch.from_numpy(a) for key, a in arrays.items() if key.startswith(prefix)}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def model(width: int = 24) -> ModelConfig:
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": 2, "num_heads": 3}
    return ModelConfig(name="vit_tiny_patch16_224", kwargs=shape)


@pytest.mark.parametrize(("variant", "kind"), [("shared", "shared"), ("separate", "last_layer")])
@torch.no_grad()
def test_golden_ibot_head_for_patches(golden: Golden, tmp_path: Path, variant: str, kind: str) -> None:
    g = golden("ibot_head")
    state = under("backbone.", create_backbone(model()).state_dict()) | under("head.", weights(g, f"{variant}.sd."))
    torch.save({"teacher": state, "ibot_loss": {}}, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth", num_heads=3)
    assert loaded.patch is not None and loaded.patch.head is not None and loaded.head is not None
    assert loaded.patch.kind == loaded.provenance["patch_head"] == kind
    tokens = torch.from_numpy(g[f"{variant}.x"])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loaded.head(tokens[:, 0]), torch.from_numpy(g[f"{variant}.cls"]), **close)
    torch.testing.assert_close(loaded.patch.head(tokens[:, 1:]), torch.from_numpy(g[f"{variant}.patch"]), **close)
    assert (loaded.patch.head is loaded.head) == (kind == "shared")
    assert not any(parameter.requires_grad for parameter in loaded.patch.head.parameters())


def test_shared_head_of_ibot_may_have_one_name(golden: Golden, tmp_path: Path) -> None:
    head = {name: value for name, value in weights(golden("ibot_head"), "shared.sd.").items() if "layer2" not in name}
    state = under("backbone.", create_backbone(model()).state_dict()) | under("head.", head)
    torch.save({"teacher": state, "ibot_loss": {}}, tmp_path / "ibot.pth")
    torch.save({"teacher": state, "dino_loss": {}}, tmp_path / "dino.pth")
    found = load(tmp_path / "ibot.pth", num_heads=3).patch
    assert found is not None and found.kind == "shared"
    assert load(tmp_path / "dino.pth", num_heads=3).patch is None


@pytest.mark.parametrize("plain", [False, True], ids=["weight norm", "plain, as DINOv3"])
@torch.no_grad()
def test_golden_dinov2_head_as_separate_patch_head(golden: Golden, tmp_path: Path, plain: bool) -> None:
    g = golden("dinov2_head")
    own = weights(g, "sd.")
    other = {name: value + 0.1 for name, value in own.items()}
    if plain:
        direction = torch.nn.functional.normalize(own.pop("last_layer.weight_v"), dim=1)
        own["last_layer.weight"] = own.pop("last_layer.weight_g") * direction
    backbone = under("backbone.", create_backbone(model()).state_dict())
    heads = under("dino_head.", other) | under("ibot_head.", own)
    torch.save({"teacher": backbone | heads}, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth", num_heads=3)
    assert loaded.patch is not None and loaded.patch.head is not None
    assert (loaded.patch.kind, loaded.patch.temperature) == ("separate", None)
    logits = loaded.patch.head(torch.from_numpy(g["x"]))
    torch.testing.assert_close(logits, torch.from_numpy(g["y"]), rtol=1e-4, atol=1e-5)
    torch.save({"teacher": backbone | under("dino_head.", other)}, tmp_path / "shared.pth")
    shared = load(tmp_path / "shared.pth", num_heads=3).patch
    assert shared is not None and shared.kind == "shared"


@pytest.mark.parametrize(
    ("epoch", "start", "expected"), [(100, 0, 0.07), (1, 0, 0.04), (3, 0, 0.06), (3, 2, 0.04), (5, 2, 0.06)]
)
def test_patch_temperature_rises_with_the_masks(
    golden: Golden, tmp_path: Path, epoch: int, start: int, expected: float
) -> None:
    arguments: dict[str, Any] = {"teacher_patch_temp": 0.07, "warmup_teacher_patch_temp": 0.04}
    arguments |= {"teacher_temp": 0.05, "warmup_teacher_temp_epochs": 4, "pred_start_epoch": start}
    state = under("backbone.", create_backbone(model()).state_dict())
    state |= under("head.", weights(golden("ibot_head"), "separate.sd."))
    payload = {"teacher": state, "student": state, "epoch": epoch, "args": argparse.Namespace(**arguments)}
    torch.save(payload, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth", num_heads=3)
    assert loaded.patch is not None and loaded.patch.temperature == pytest.approx(expected)
    assert loaded.temperature == 0.05
    student = load(tmp_path / "a.pth", network="student", num_heads=3).patch
    assert student is not None and student.temperature == 0.1


def payload(patch: PatchConfig, **recipe: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    network = Network(model(), HEAD, patch)
    sections = {"model": model(), "head": HEAD, "patch": patch}
    return {
        "format": checkpoint.FORMAT,
        "recipe": {name: section.model_dump(mode="json") for name, section in sections.items()}
        | {"method": {"name": "ibot_vmf"}, "objective": {"student_temperature": 0.1}, **recipe},
        "step": 7,
        "epoch": 3,
        "teacher_temperature": 0.04,
        "teacher": network.state_dict(),
        "student": network.state_dict(),
    }


CONFIGS = {
    "shared": PatchConfig(weight=1.0),
    "last_layer": PatchConfig(weight=1.0, head="last_layer", num_prototypes=14),
    "separate": PatchConfig(weight=1.0, head="separate", num_prototypes=14, bottleneck=20),
}


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_patch_head_of_our_own_file_is_that_of_its_network(tmp_path: Path, kind: str) -> None:
    content = payload(CONFIGS[kind])
    checkpoint.save(tmp_path / "last.pt", content)
    network = Network(model(), HEAD, CONFIGS[kind]).eval()
    network.load_state_dict(content["teacher"])
    found = load(tmp_path / "last.pt").patch
    assert found is not None and found.head is not None and found.kind == kind
    assert found.temperature == 0.04
    tokens = torch.randn(5, 24)
    z = network._project_patches(tokens)
    assert torch.equal(found.head.project(tokens), z)
    assert torch.equal(found.prototypes.vectors(), network.patch_prototypes.vectors())
    bias = network.patch_log_normaliser(0.04, found.prototypes.vectors())
    assert bias is not None
    torch.testing.assert_close(found.head.logits(z, 0.04), z @ found.prototypes.vectors().T / 0.04 + bias)
    student = load(tmp_path / "last.pt", network="student").patch
    assert student is not None and student.temperature == 0.1


def test_method_without_patch_objective_has_no_patch_head(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.pt", payload(PatchConfig()))
    assert load(tmp_path / "last.pt").patch is None


@pytest.mark.parametrize(("warmup", "start", "expected"), [(3, 0, 0.06), (4, 0, None), (2, 1, 0.06), (2, 2, None)])
def test_own_temperature_of_patches_is_told_once_it_is_reached(
    tmp_path: Path, warmup: int, start: int, expected: float | None
) -> None:
    config = PatchConfig(weight=1.0, temperature=0.06, warmup_epochs=warmup)
    recipe = {"masks": {"start_epoch": start}, "target": {"temperature": 0.04, "warmup_epochs": 9}}
    checkpoint.save(tmp_path / "last.pt", payload(config, **recipe))
    found = load(tmp_path / "last.pt").patch
    assert found is not None and found.temperature == expected


def test_damaged_patch_head_of_our_own_is_refused(tmp_path: Path) -> None:
    content = payload(CONFIGS["separate"])
    del content["teacher"]["patch_head.last_layer.weight"]
    checkpoint.save(tmp_path / "last.pt", content)
    with pytest.raises(DinobenchError, match=r"the patch head in .* does not fit .*missing last_layer\.weight"):
        load(tmp_path / "last.pt")


def test_another_head_in_its_place_has_no_patch_head_beside_it(tmp_path: Path) -> None:
    """The baseline of random weights puts a new head into the loaded network."""
    from dataclasses import replace

    checkpoint.save(tmp_path / "last.pt", payload(CONFIGS["separate"]))
    loaded = load(tmp_path / "last.pt")
    assert loaded.patch is not None
    assert replace(loaded, temperature=0.1).patch is loaded.patch
    assert replace(loaded, head=None).patch is None
