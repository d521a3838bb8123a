"""Every method in the catalogue, on real digits: it trains, says what it does, and its checkpoint can be measured."""

from __future__ import annotations

import ast
import math

import pytest

from pretrain.methods.method import find_method, method_names
from pretrain.models.checkpoint import load
from pretrain.training.loop import train
from pretrain.training.recipe import resolve

# 1297 images / 64 = 20 steps an epoch.
SHORT = (
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
    assert outcome.status == "finished" and outcome.step == 40
    losses = {name: values[name] for values in log.values() for name in values if name.startswith("loss/")}
    assert losses and all(math.isfinite(value) for value in losses.values())
    assert all(name.count("/") == 1 for values in log.values() for name in values)
    model = load(outcome.checkpoints[-1])
    assert model.provenance["coverage"] == 100 and model.provenance["method"] == method
    has_prototypes = recipe.head.num_prototypes > 0
    assert (model.prototypes is not None) == has_prototypes
    last = log[40]
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
    from pretrain.errors import CheckFailed

    more = ["schedule.epochs=14", "runtime.stop_on_collapse=true", "head.batch_norm=false", "optim.lr=0.02"]
    with pytest.raises(CheckFailed) as caught:
        train(resolve("dino", preset="digits", overrides=[*SHORT, *more, *overrides]), folder=tmp_path)
    assert any(f"collapsed ({name})" in str(caught.value) for name in state), str(caught.value)
