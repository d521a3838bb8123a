"""`dinobench export`: timm loads the file to identical features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from dinobench.cli import app
from pretrain.models import checkpoint
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import load

Golden = Callable[[str], dict[str, np.ndarray]]
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}


def weights(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): torch.from_numpy(a) for key, a in arrays.items() if key.startswith(prefix)}


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert app.run(["export", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def in_timm(document: dict[str, Any], x: Tensor) -> Tensor:
    """Features of the network that the printed line gives in a program that knows timm only."""
    return eval(document["timm"], {"timm": timm}).eval()(x)


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("dino_vit", "32x32.x", "32x32.forward"),
        ("dinov2_vit_mlp_reg0", "56x56.x", "56x56.cls"),
        ("dinov2_vit_swiglu_reg4_aa", "56x56.x", "56x56.cls"),
    ],
)
def test_golden_features_in_timm_from_an_official_file(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, x: str, expected: str
) -> None:
    g = golden(name)
    torch.save({"teacher": {f"backbone.{key}": v for key, v in weights(g, "sd.").items()}}, tmp_path / "a.pth")
    document = exported(capsys, str(tmp_path / "a.pth"), "--num-heads", "3")
    assert document["file"] == str(tmp_path / "a.safetensors")
    features = in_timm(document, torch.from_numpy(g[x]))
    torch.testing.assert_close(features, torch.from_numpy(g[expected]), rtol=1e-5, atol=1e-5)
    model = load(tmp_path / "a.safetensors")
    assert model.provenance["weights_sha256"] == document["weights_sha256"]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(name="vit_tiny_patch16_224", kwargs=TINY),
        ModelConfig(name="vit_tiny_patch16_224", kwargs={**TINY, "mlp_ratio": 3.0}, mlp="swiglu"),
        ModelConfig(name="vit_small_patch14_reg4_dinov2", kwargs={"img_size": 28, "depth": 2}),
        ModelConfig(name="resnet18"),
        ModelConfig(name="swin_tiny_patch4_window7_224", kwargs={"depths": [1, 1], "num_heads": [3, 6]}),
        ModelConfig(name="vit_small_patch16_dinov3_qkvb", kwargs={"global_pool": "token", "depth": 2}),
    ],
    ids=lambda config: f"{config.label}-{config.mlp}",
)
@torch.no_grad()
def test_backbone_of_ours_gives_identical_features_in_timm(
    config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    backbone = create_backbone(config).eval()
    recipe = {"method": {"name": "dino"}, "data": {"name": "digits"}, "model": config.model_dump(mode="json")}
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    payload = {"format": checkpoint.FORMAT, "recipe": recipe, "step": 1, "teacher": state, "student": state}
    checkpoint.save(tmp_path / "last.pt", payload)
    document = exported(capsys, str(tmp_path / "last.pt"), "--output", str(tmp_path / "it's.safetensors"))
    side = 224 if "swin" in config.name else config.kwargs.get("img_size", 64)
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(in_timm(document, x), backbone(x), rtol=1e-6, atol=1e-6)


def test_export_prints_file_and_line(golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = golden("dino_vit")
    torch.save(weights(g, "sd."), tmp_path / "a.pth")
    assert app.run(["export", str(tmp_path / "a.pth"), "--num-heads", "3"]) == 0
    captured = capsys.readouterr()
    file, line, note = captured.out.splitlines()
    assert file == str(tmp_path / "a.safetensors")
    assert line.startswith("timm.create_model('vit_tiny_patch16_224', pretrained=True, num_classes=0, img_size=32")
    assert "at other sizes" in note
    assert "coverage 100 %" in captured.err


def test_export_of_the_student(golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = weights(golden("dino_vit"), "sd.")
    student = {name: value + 1 for name, value in teacher.items()}
    payload = {"teacher": {f"backbone.{k}": v for k, v in teacher.items()}}
    payload["student"] = {f"module.backbone.{k}": v for k, v in student.items()}
    torch.save(payload, tmp_path / "a.pth")
    document = exported(capsys, str(tmp_path / "a.pth"), "--num-heads", "3", "--checkpoint-key", "student")
    assert document["network"] == "student"
    model = load(tmp_path / "a.safetensors")
    assert torch.equal(model.backbone.state_dict()["cls_token"], student["cls_token"])
    assert model.provenance["network"] == "student"


def test_export_takes_the_name_of_a_model_that_shapes_do_not_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("test_convnext", num_classes=0).state_dict(), tmp_path / "a.pth")
    assert app.run(["export", str(tmp_path / "a.pth")]) == 3
    assert "no backbone that is known here" in capsys.readouterr().err
    document = exported(capsys, str(tmp_path / "a.pth"), "--arch", "test_convnext")
    x = torch.randn(1, 3, 64, 64)
    reference = timm.create_model("test_convnext", num_classes=0).eval()
    reference.load_state_dict(torch.load(tmp_path / "a.pth"))
    with torch.no_grad():
        torch.testing.assert_close(in_timm(document, x), reference(x))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><title>404</title>", "is a web page"),
        (b"PK\x03\x04 cut short", "truncated or damaged"),
    ],
)
def test_export_refuses_what_is_no_checkpoint_with_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: str
) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    assert app.run(["export", str(tmp_path / "bad.pth")]) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and told in captured.err
    assert not (tmp_path / "bad.safetensors").exists()


def test_export_of_a_partial_backbone_only_when_told(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights(golden("dino_vit"), "sd.")
    del state["norm.weight"]
    torch.save(state, tmp_path / "a.pth")
    assert app.run(["export", str(tmp_path / "a.pth"), "--num-heads", "3"]) == 3
    assert "--allow-partial" in capsys.readouterr().err
    document = exported(capsys, str(tmp_path / "a.pth"), "--num-heads", "3", "--allow-partial")
    assert document["missing"] == ["norm.weight"]


def test_export_does_not_overwrite_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["export", str(tmp_path / "a.safetensors")]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert app.run(["export", "a.pth", "--arch", "resnet18", "--num-heads", "3"]) == 2


def test_eval_takes_a_foreign_file_and_a_partial_one_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole round: an official layout, measured."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    state = create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=sizes)).state_dict()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, "whole.pth")
    arguments = ["eval", "--suite", "digits_knn", "--no-track", "--json", "--device", "cpu"]
    assert app.run([*arguments, "whole.pth"]) == 0
    facts = json.loads(capsys.readouterr().out)["provenance"]
    assert (facts["label"], facts["format"], facts["coverage"]) == ("dino-vit-d64l1p8", "dino", 100)
    del state["norm.bias"]
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, "part.pth")
    assert app.run([*arguments, "part.pth"]) == 3
    assert "--allow-partial" in capsys.readouterr().err
    assert app.run([*arguments, "--allow-partial", "part.pth"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["provenance"]["missing"] == ["norm.bias"]
    assert "teacher of dino-vit-d64l1p8: 17 backbone tensors matched, 1 missing" in captured.err
