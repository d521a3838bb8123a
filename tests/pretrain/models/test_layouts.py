"""Files of other projects, fabricated with the key names of PROTOCOLS.md section 6: nothing lost, equal features.

The weights are those of the golden files, so the expected features are the official code's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.models import checkpoint
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import LoadedModel, load

State = dict[str, Tensor]
Golden = Callable[[str], dict[str, np.ndarray]]


def weights(arrays: dict[str, np.ndarray], prefix: str) -> State:
    return {key.removeprefix(prefix): torch.from_numpy(a) for key, a in arrays.items() if key.startswith(prefix)}


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


VIT_FILES: dict[str, tuple[str, Callable[[State, State], dict[str, Any]]]] = {
    "dino": (
        "dino",
        lambda teacher, student: {
            "student": under("module.backbone.", student) | {"module.head.mlp.0.bias": torch.zeros(2)},
            "teacher": under("backbone.", teacher) | {"head.mlp.0.bias": torch.zeros(2)},
            # The official loop takes both from arrays, so they are numpy.float64.
            "optimizer": {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
                "param_groups": [{"lr": np.linspace(0, 1, 4)[1], "weight_decay": np.float64(0.04), "params": [0]}],
            },
            "epoch": 12,
            "args": argparse.Namespace(arch="vit_small", patch_size=16),
            "dino_loss": {"center": torch.zeros(1, 4)},
            "fp16_scaler": {"scale": 1.0},
        },
    ),
    "dino wrapped twice": (
        "dino",
        lambda teacher, student: {
            "student": under("module.module.backbone.", student),
            "teacher": under("module.backbone.", teacher),
        },
    ),
    "ibot": (
        "dino",
        lambda teacher, student: {
            "student": under("module.backbone.", student) | {"module.backbone.masked_embed": torch.zeros(1, 48)},
            "teacher": under("backbone.", teacher),
            "ibot_loss": {"center": torch.zeros(1, 4)},
            "epoch": 12,
        },
    ),
    "ibot extracted": ("plain", lambda teacher, student: {"state_dict": teacher}),
    "dinov2 eval dump": (
        "dino",
        lambda teacher, student: {
            "teacher": under("backbone.", teacher)
            | {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.mlp.0.weight": torch.zeros(2, 2)}
        },
    ),
    "release": ("plain", lambda teacher, student: dict(teacher)),
    "msn": (
        "msn",
        lambda teacher, student: {
            "encoder": under("module.", student) | {"module.fc.fc1.weight": torch.zeros(2, 48)},
            "target_encoder": under("module.", teacher) | {"module.fc.fc1.weight": torch.zeros(2, 48)},
            "prototypes": torch.randn(6, 4),
            "opt": {},
            "epoch": 12,
            "batch_size": 64,
            "world_size": 1,
            "lr": 1e-3,
            "temperature": 0.1,
        },
    ),
    "moco_v3": (
        "moco_v3",
        lambda teacher, student: {
            "state_dict": under("module.base_encoder.", student)
            | under("module.momentum_encoder.", teacher)
            | {"module.base_encoder.head.0.weight": torch.zeros(4, 48), "module.predictor.0.weight": torch.zeros(4, 4)}
            | {"module.momentum_encoder.head.0.weight": torch.zeros(4, 48)},
            "optimizer": {},
            "epoch": 12,
        },
    ),
    "vissl": (
        "vissl",
        lambda teacher, student: {
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": under("base_model.", teacher), "heads": {"0.clf.weight": torch.zeros(2, 2)}}
                }
            }
        },
    ),
    "capi": (
        "capi",
        lambda teacher, student: {
            "model": under("student.backbone.", student) | under("student_ema.backbone.", teacher),
            "optimizer": {},
            "clustering_optimizer": {},
        },
    ),
    "lightly": (
        "lightning",
        lambda teacher, student: {
            "state_dict": under("student_backbone.vit.", student) | under("teacher_backbone.vit.", teacher),
            "hyper_parameters": {"lr": 1e-3},
            "epoch": 12,
            "global_step": 99,
        },
    ),
    "solo": (
        "lightning",
        lambda teacher, student: {
            "state_dict": under("backbone.", student) | under("momentum_backbone.", teacher),
            "hyper_parameters": {},
        },
    ),
    "one network": ("lightning", lambda teacher, student: {"state_dict": under("backbone.", teacher)}),
    "timm": (
        "plain",
        lambda teacher, student: {"state_dict": student, "state_dict_ema": under("module.", teacher), "epoch": 12},
    ),
    "timm model": (
        "plain",
        lambda teacher, student: {
            "model": teacher | {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
        },
    ),
    "averaged alone": ("plain", lambda teacher, student: {"ema": teacher, "model": student}),
    "half": ("plain", lambda teacher, student: {name: value.bfloat16() for name, value in teacher.items()}),
    "key of its own": ("plain", lambda teacher, student: {"net": under("backbone.", teacher), "best": 3}),
    "backbone inside a name": ("dino", lambda teacher, student: {"teacher": under("backbone_module.", teacher)}),
    "unknown prefix": ("plain", lambda teacher, student: {"model": under("net._orig_mod.encoder.", teacher)}),
}
HAS_STUDENT = {
    "dino", "dino wrapped twice", "ibot", "msn", "moco_v3", "capi", "lightly", "solo", "timm", "averaged alone"
}  # fmt: skip
NAMED_TEACHER = HAS_STUDENT | {"dinov2 eval dump", "backbone inside a name"}


@pytest.mark.parametrize("name", VIT_FILES)
def test_golden_dino_vit_in_every_layout(golden: Golden, tmp_path: Path, name: str) -> None:
    g = golden("dino_vit")
    teacher = weights(g, "sd.")
    layout, make = VIT_FILES[name]
    path = tmp_path / "checkpoint.pth"
    torch.save(make(teacher, other(teacher)), path)
    model = load(path, num_heads=3)
    complete(model)
    if name == "half":
        stored = {key: value.float() for key, value in make(teacher, teacher).items()}
        assert all(torch.equal(value, stored[key]) for key, value in model.backbone.state_dict().items())
    else:
        close(model, torch.from_numpy(g["32x32.x"]), torch.from_numpy(g["32x32.forward"]))
    assert model.provenance["format"] == layout
    assert model.provenance["network"] == ("teacher" if name in NAMED_TEACHER else "single")
    if name in HAS_STUDENT:
        student = load(path, network="student", num_heads=3)
        complete(student)
        assert torch.equal(student.backbone.state_dict()["cls_token"], teacher["cls_token"] + 0.1)
        assert student.provenance["network"] == "student"
    else:
        with pytest.raises(DinobenchError, match=r"(holds no student|holds one network).*ask for t"):
            load(path, network="student")


@pytest.mark.parametrize("name", ["dino", "release", "ibot extracted"])
def test_golden_dino_vit_at_other_sizes_by_the_rule_of_its_family(golden: Golden, tmp_path: Path, name: str) -> None:
    g = golden("dino_vit")
    teacher = weights(g, "sd.")
    torch.save(VIT_FILES[name][1](teacher, other(teacher)), tmp_path / "a.pth")
    model = load(tmp_path / "a.pth", num_heads=3)
    for size in ("16x16", "48x48", "40x24", "33x35"):
        close(model, torch.from_numpy(g[f"{size}.x"]), torch.from_numpy(g[f"{size}.forward"]))


@pytest.mark.parametrize("prefix", ["sd.", "ls.sd."])
@torch.no_grad()
def test_golden_ibot_vit_from_its_checkpoint(golden: Golden, tmp_path: Path, prefix: str) -> None:
    g = golden("ibot_vit")
    state = weights(g, prefix)
    payload = {"student": under("module.backbone.", state), "teacher": under("backbone.", state), "ibot_loss": {}}
    torch.save(payload, tmp_path / "checkpoint.pth")
    model = load(tmp_path / "checkpoint.pth", num_heads=int(g["num_heads"]))
    complete(model)
    tokens = torch.from_numpy(g["ls.tokens" if prefix == "ls.sd." else "tokens_unmasked"])
    torch.testing.assert_close(model.backbone.forward_features(torch.from_numpy(g["x"])), tokens, rtol=1e-5, atol=1e-5)
    if prefix == "sd.":
        assert model.provenance["dropped"] == ["masked_embed"]
        assert "dropped masked_embed" in model.report()
        close(model, torch.from_numpy(g["x_local"]), torch.from_numpy(g["tokens_local"])[:, 0])


@pytest.mark.parametrize("chunks", ["none", "one", "two"])
@pytest.mark.parametrize("dump", [True, False])
@pytest.mark.parametrize("name", ["dinov2_vit_mlp_reg0", "dinov2_vit_swiglu_reg4_aa"])
def test_golden_dinov2_from_release_and_eval_dump(
    golden: Golden, tmp_path: Path, name: str, dump: bool, chunks: str
) -> None:
    """Also with `block_chunks`, whose names count chunks and then blocks: blocks.0.1. and blocks.1.1."""
    g = golden(name)
    state = weights(g, "sd.")
    chunk = {"none": "{i}", "one": "0.{i}", "two": "{i}.{i}"}[chunks]
    for i in (0, 1):
        new = chunk.format(i=i)
        state = {key.replace(f"blocks.{i}.", f"blocks.{new}.", 1): value for key, value in state.items()}
    path = tmp_path / "a.pth"
    torch.save({"teacher": under("backbone.", state)} if dump else state, path)
    model = load(path, num_heads=int(g["num_heads"]))
    complete(model)
    for size in ("56x56", "28x28", "84x56"):
        close(model, torch.from_numpy(g[f"{size}.x"]), torch.from_numpy(g[f"{size}.cls"]))
    assert model.provenance["dropped"] == ["mask_token"]
    assert model.provenance["model"]["pos_interpolation"] == ("timm" if "reg4" in name else "dino")


@pytest.mark.parametrize("wrapped", [True, False])
def test_golden_dino_vit_from_safetensors(golden: Golden, tmp_path: Path, wrapped: bool) -> None:
    g = golden("dino_vit")
    save_file(under("vit." if wrapped else "", weights(g, "sd.")), tmp_path / "a.safetensors", {"format": "pt"})
    model = load(tmp_path / "a.safetensors", num_heads=3)
    complete(model)
    close(model, torch.from_numpy(g["32x32.x"]), torch.from_numpy(g["32x32.forward"]))
    assert ("the backbone lies below vit." in model.report()) == wrapped


def test_golden_dino_vit_under_the_names_of_transformers(golden: Golden, tmp_path: Path) -> None:
    g = golden("dino_vit")
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "blocks.": "encoder.layer.",
    }
    state: State = {"pooler.dense.weight": torch.zeros(48, 48)}
    for name, value in weights(g, "sd.").items():
        if ".qkv." in name:
            stem, kind = name.replace("blocks.", "encoder.layer.").split("attn.qkv.")
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"{stem}attention.attention.{part}.{kind}"] = third.clone()
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state["layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    save_file(state, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors", num_heads=3)
    complete(model)
    close(model, torch.from_numpy(g["32x32.x"]), torch.from_numpy(g["32x32.forward"]))


@torch.no_grad()
def test_ijepa_is_the_mean_of_normed_patches_without_cls(golden: Golden, tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    reference = VisionTransformer(**sizes, num_classes=0, class_token=False, global_pool="", fc_norm=False).eval()
    for parameter in reference.parameters():
        parameter.normal_(std=0.2)
    state = reference.state_dict()
    payload = {
        "encoder": under("module.", other(state)),
        "target_encoder": under("module.", state),
        "predictor": {"module.predictor_embed.weight": torch.zeros(4, 48)},
        "opt": {},
        "scaler": None,
        "epoch": 3,
    }
    torch.save(payload, tmp_path / "a.pth.tar")
    model = load(tmp_path / "a.pth.tar", num_heads=3)
    complete(model)
    x = torch.randn(2, 3, 32, 32)
    close(model, x, reference.forward_features(x).mean(1))
    assert (model.provenance["format"], model.provenance["epoch"]) == ("ijepa", 3)


def test_exported_backbone_states_what_its_shapes_do_not(golden: Golden, tmp_path: Path) -> None:
    """Heads, the rule for positions and where it comes from are in the header."""
    g = golden("dino_vit")
    teacher = weights(g, "sd.")
    torch.save(VIT_FILES["dino"][1](teacher, other(teacher)), tmp_path / "a.pth")
    original = load(tmp_path / "a.pth", num_heads=3)
    checkpoint.export(original, tmp_path / "a.safetensors")
    model = load(tmp_path / "a.safetensors")
    complete(model)
    close(model, torch.from_numpy(g["48x48.x"]), torch.from_numpy(g["48x48.forward"]))
    same = ("weights_sha256", "model", "method", "network", "epoch", "label")
    assert {key: model.provenance[key] for key in same} == {key: original.provenance[key] for key in same}
    with pytest.raises(DinobenchError, match="was exported from the teacher"):
        load(tmp_path / "a.safetensors", network="student")
    header = {"dinobench": json.dumps({"format": checkpoint.EXPORT_FORMAT, "model": {"nam": "x"}})}
    save_file(teacher, tmp_path / "b.safetensors", header)
    with pytest.raises(DinobenchError, match=r"section 'model'.*cannot be read"):
        load(tmp_path / "b.safetensors")


def test_vit_small_of_moco_v3_has_twelve_heads(tmp_path: Path) -> None:
    config = ModelConfig(name="vit_small_patch16_224", kwargs={"depth": 1})
    state = create_backbone(config).state_dict()
    for name, prefix, expected in (("moco", "module.momentum_encoder.", 12), ("dino", "backbone.", 6)):
        torch.save({"state_dict": under(prefix, state)}, tmp_path / f"{name}.pth")
        model = load(tmp_path / f"{name}.pth")
        assert model.backbone.get_submodule("blocks.0.attn").num_heads == expected
