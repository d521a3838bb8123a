"""Loading a network from its file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.errors import DinobenchError, UsageError
from pretrain.models import checkpoint
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim
from pretrain.models.heads import HeadConfig, ProjectionHead

MODEL = ModelConfig(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
)
HEAD = HeadConfig(hidden=16, bottleneck=16, num_prototypes=10, prototypes="free", normaliser="vmf")


def network(seed: int) -> torch.nn.ModuleDict:
    torch.manual_seed(seed)
    backbone = create_backbone(MODEL, drop_path=0.1)
    return torch.nn.ModuleDict({"backbone": backbone, "head": ProjectionHead(feature_dim(backbone), HEAD)})


def payload() -> dict[str, Any]:
    return {
        "format": checkpoint.FORMAT,
        "recipe": {
            "method": {"name": "method_of_another_machine"},
            "data": {"name": "folder:/images"},
            "model": MODEL.model_dump(mode="json"),
            "head": HEAD.model_dump(mode="json"),
            "objective": {"student_temperature": 0.1},
        },
        "step": 7,
        "images_seen": 448,
        "epoch": 1,
        "seed": 5,
        "teacher_temperature": 0.04,
        "student": network(0).state_dict(),
        "teacher": network(1).state_dict(),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "last.pt", payload())
    return tmp_path / "last.pt"


def changed(path: Path, **changes: Any) -> Path:
    checkpoint.save(path, {**payload(), **changes})
    return path


@pytest.mark.parametrize(("name", "seed", "temperature"), [("teacher", 1, 0.04), ("student", 0, 0.1)])
@torch.no_grad()
def test_network_is_rebuilt_from_the_file_alone(path: Path, name: Any, seed: int, temperature: float) -> None:
    """The method of the file exists nowhere: no method module is needed to read a checkpoint."""
    model = checkpoint.load(path, network=name)
    original = network(seed).eval()
    x = torch.randn(2, 3, 16, 16)
    features = original["backbone"](x)
    assert torch.equal(model.backbone(x), features)
    assert model.head is not None and model.prototypes is model.head.last_layer
    assert torch.equal(model.head(features), original["head"](features))
    assert (model.normaliser, model.temperature) == ("vmf", temperature)
    assert not model.backbone.training
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_provenance_says_what_was_loaded(path: Path) -> None:
    model = checkpoint.load(path)
    facts = model.provenance
    expected = {
        "path": str(path),
        "format": checkpoint.FORMAT,
        "network": "teacher",
        "method": "method_of_another_machine",
        "arch": "vit-d24l2p4",
        "label": "method_of_another_machine-vit-d24l2p4-folder",
        "step": 7,
        "images_seen": 448,
        "epoch": 1,
        "seed": 5,
        "missing": [],
        "unexpected": [],
        "coverage": 100.0,
        "matched": len(network(1)["backbone"].state_dict()),
        "model": MODEL.model_dump(mode="json"),
    }
    assert {key: facts[key] for key in expected} == expected
    assert len(facts["sha256"]) == len(facts["weights_sha256"]) == 64
    assert facts["recipe_hash"]
    assert "teacher of method_of_another_machine-vit-d24l2p4-folder (step 7, epoch 1" in model.report()
    assert "0 missing, 0 unexpected, coverage 100 %" in model.report()


def test_hashes_tell_networks_and_files_apart(path: Path, tmp_path: Path) -> None:
    teacher, student = checkpoint.load(path), checkpoint.load(path, network="student")
    assert teacher.provenance["sha256"] == student.provenance["sha256"]
    assert teacher.provenance["weights_sha256"] != student.provenance["weights_sha256"]
    other = checkpoint.load(changed(tmp_path / "later.pt", step=8))
    assert other.provenance["sha256"] != teacher.provenance["sha256"]
    assert other.provenance["weights_sha256"] == teacher.provenance["weights_sha256"]
    with torch.no_grad():
        next(teacher.backbone.parameters()).view(-1)[0].add_(1e-3)
    assert checkpoint.weights_sha256(teacher.backbone) != other.provenance["weights_sha256"]


def test_loading_leaves_the_random_generator_alone(path: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    checkpoint.load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_backbone_without_head_has_no_prototypes(tmp_path: Path) -> None:
    whole = payload()
    teacher = {key: value for key, value in whole["teacher"].items() if key.startswith("backbone.")}
    recipe = {**whole["recipe"], "head": None}
    model = checkpoint.load(changed(tmp_path / "a.pt", recipe=recipe, teacher=teacher))
    assert model.head is None and model.prototypes is None
    assert model.normaliser == "none"


def test_missing_and_unexpected_tensors_are_refused_by_name(tmp_path: Path) -> None:
    teacher = payload()["teacher"]
    teacher["backbone.blocks.0.norm9.weight"] = teacher.pop("backbone.blocks.0.norm1.weight")
    with pytest.raises(DinobenchError, match=r"missing blocks\.0\.norm1\.weight, unexpected blocks\.0\.norm9\.weight"):
        checkpoint.load(changed(tmp_path / "a.pt", teacher=teacher))


def test_shape_that_does_not_fit_is_refused_with_both_shapes(tmp_path: Path) -> None:
    teacher = payload()["teacher"]
    teacher["head.last_layer.weight"] = torch.ones(11, 16)
    with pytest.raises(DinobenchError, match=r"head\.last_layer\.weight .* \(11, 16\).* \(10, 16\)"):
        checkpoint.load(changed(tmp_path / "a.pt", teacher=teacher))


def test_unknown_layout_shows_its_keys(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", {"state_dict": {}, "arch": "resnet50"})
    with pytest.raises(DinobenchError, match=r"layout that is not known here \(keys: arch, state_dict\)"):
        checkpoint.load(tmp_path / "a.pt")


def test_recipe_of_another_version_names_the_key(tmp_path: Path) -> None:
    recipe = {**payload()["recipe"], "model": {"nam": "x"}}
    with pytest.raises(DinobenchError, match=r"section 'model'.*cannot be read: (?s:.*)nam"):
        checkpoint.load(changed(tmp_path / "a.pt", recipe=recipe))


def test_file_without_the_network_is_refused(tmp_path: Path) -> None:
    whole = payload()
    del whole["student"]
    checkpoint.save(tmp_path / "a.pt", whole)
    with pytest.raises(DinobenchError, match="without student"):
        checkpoint.load(tmp_path / "a.pt", network="student")


def test_unknown_network_names_the_nearest_one(path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'teacher'"):
        checkpoint.load(path, network="techer")  # type: ignore[arg-type]
