"""Every method in the catalogue, on real digits: it trains, says what it does, and its checkpoint can be measured."""

from __future__ import annotations

import ast
import math

import pytest
import torch

from pretrain.errors import CheckFailed, UsageError
from pretrain.methods.method import find_method, load_method, method_names
from pretrain.models.checkpoint import load
from pretrain.training.loop import create_loader, train
from pretrain.training.optim import parameter_groups
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

# 1297 images / 128 = 10 steps an epoch.
SHORT = (
    "optim.batch_size=128",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "head.hidden=32",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "runtime.log_every=10",
    "runtime.device=cpu",
)


@pytest.mark.parametrize("method", method_names())
def test_two_epochs_on_digits_are_finite_and_leave_a_checkpoint_to_measure(method, tmp_path):
    recipe = resolve(method, preset="digits", overrides=SHORT)
    log = {}
    outcome = train(recipe, folder=tmp_path, log=lambda metrics, step: log.setdefault(step, {}).update(metrics))
    assert outcome.status == "finished" and outcome.step == 20
    losses = {name: values[name] for values in log.values() for name in values if name.startswith("loss/")}
    assert losses and all(math.isfinite(value) for value in losses.values())
    assert all(name.count("/") == 1 for values in log.values() for name in values)
    model = load(outcome.checkpoints[-1])
    assert model.provenance["coverage"] == 100 and model.provenance["method"] == method
    has_prototypes = recipe.head.num_prototypes > 0
    assert (model.prototypes is not None) == has_prototypes
    last = log[20]
    assert ("prototypes/unique" in last) == has_prototypes
    if has_prototypes:
        assert last["prototypes/redundancy"] == recipe.head.num_prototypes / last["prototypes/unique"]
    if recipe.patch.weight:
        assert last["patch/target_entropy"] > 0 and last["patch_prototypes/used"] > 1


@pytest.mark.parametrize("method", method_names())
def test_every_method_names_its_paper_and_objective(method):
    text = ast.get_docstring(ast.parse(find_method(method)[0].read_text()))
    lines = text.splitlines()
    assert ": " in lines[0] and lines[1] == ""
    assert lines[2].startswith("Paper: ") and lines[3].startswith("Objective: ")


def test_patch_prototypes_of_their_own_are_followed_by_name(tmp_path):
    overrides = [*SHORT, "patch.head=separate", "patch.num_prototypes=24", "patch.bottleneck=16"]
    log = {}
    train(resolve("dinov2", preset="digits", overrides=overrides), folder=tmp_path, log=lambda m, s: log.update(m))
    assert log["patch_prototypes/redundancy"] == 24 / log["patch_prototypes/unique"]
    assert log["patch_prototypes/norm_q50"] > 0 and log["patch_prototypes/kappa_q50"] > 0


@pytest.mark.parametrize(
    ("overrides", "state"),
    [
        (["teacher.kind=student_copy", "target.centring=none"], {"uniform", "constant", "features"}),
        (["target.centring=none"], {"constant", "features"}),
        (["target.temperature=0.1", "target.warmup_temperature=0.1"], {"uniform"}),
    ],
)
def test_ablations_that_collapse_are_called_by_name(overrides, state, tmp_path):
    more = [
        "schedule.epochs=14",
        "optim.batch_size=64",
        "runtime.stop_on_collapse=true",
        "head.batch_norm=false",
        "optim.lr=0.02",
    ]
    with pytest.raises(CheckFailed) as caught:
        train(resolve("dino", preset="digits", overrides=[*SHORT, *more, *overrides]), folder=tmp_path)
    assert any(f"collapsed ({name})" in str(caught.value) for name in state), str(caught.value)


CONVOLUTIONS = ("model.name=resnet18", "model.kwargs={channels: [8, 16, 32, 64]}")
WINDOWS = (
    "model.name=swin_tiny_patch4_window7_224",
    "model.kwargs={img_size: 16, patch_size: 2, window_size: 2, embed_dim: 12, depths: [1, 1], num_heads: [1, 2]}",
)


@pytest.mark.parametrize("backbone", [CONVOLUTIONS, WINDOWS], ids=["resnet", "swin"])
@pytest.mark.parametrize("method", ["dino_vmf", "swav", "byol"])
def test_image_methods_train_other_backbones_than_vits(method, backbone, tmp_path):
    overrides = [*SHORT, *backbone, "schedule.epochs=1", "schedule.warmup_epochs=0"]
    log = {}
    outcome = train(
        resolve(method, preset="digits", overrides=overrides), folder=tmp_path, log=lambda m, s: log.update(m)
    )
    assert math.isfinite(log["loss/total"]) and load(outcome.checkpoints[-1]).provenance["coverage"] == 100


@pytest.mark.parametrize("backbone", [CONVOLUTIONS, WINDOWS], ids=["resnet", "swin"])
@pytest.mark.parametrize("method", ["ibot", "dinov2", "msn"])
def test_methods_with_masks_refuse_a_backbone_without_patch_tokens(method, backbone, tmp_path):
    with pytest.raises(UsageError, match="ViT"):
        train(resolve(method, preset="digits", overrides=[*SHORT, *backbone]), folder=tmp_path)


@pytest.mark.parametrize(
    "row",
    ["dino_table7/no_multi_crop", "dino_table7/predictor", "dino_table15/softmax_batch", "dino_teacher/previous_epoch",
     "dino_teacher/previous_iteration", "ibot_head/separate", "ibot_head/patch_only"],
)  # fmt: skip
def test_rows_of_ablations_train(row, tmp_path):
    log = {}
    train(resolve(row, preset="digits", overrides=SHORT), folder=tmp_path, log=lambda m, s: log.update(m))
    assert math.isfinite(log["loss/total"])


def test_no_decay_on_prototype_norms_is_a_switch_of_every_method_with_prototypes():
    for method in ("dino_vmf", "ibot_vmf"):
        undecayed = []
        for decay in (True, False):
            recipe = resolve(method, preset="digits", overrides=[*SHORT, f"optim.decay_prototype_norms={decay}"])
            student = load_method(method)(recipe, Plan(2, 3)).student
            groups = parameter_groups(student, recipe.optim)
            undecayed.append(sum(len(group["params"]) for group in groups if group["decay_multiplier"] == 0))
        assert undecayed[1] == undecayed[0] + 1


def test_the_teacher_is_the_student_of_before():
    """Figure 6 of DINO: what each kind of teacher holds while step t runs."""

    def history(kind):
        recipe = resolve("dino", preset="digits", overrides=[*SHORT, f"teacher.kind={kind}"])
        trainer = Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))
        batches = create_loader(recipe, trainer.runtime).batches(0)
        students, teachers = [], []
        for step in range(6):
            students.append(trainer.method.student.backbone.pos_embed.detach().clone())
            teachers.append(trainer.method.teacher.backbone.pos_embed.detach().clone())
            trainer.step(next(batches), step)
        return students, teachers

    expected = {
        "student_copy": [0, 1, 2, 3, 4, 5],
        "previous_iteration": [0, 0, 1, 2, 3, 4],
        "previous_epoch": [0, 0, 0, 3, 3, 3],
        "none": [0, 1, 2, 3, 4, 5],
    }
    for kind, steps in expected.items():
        students, teachers = history(kind)
        assert all(torch.equal(teacher, students[step]) for teacher, step in zip(teachers, steps, strict=True)), kind
