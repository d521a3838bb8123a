"""The optimiser step: equal to the official loop, in micro-batches, and after a resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.errors import DinobenchError, UsageError
from pretrain.methods.method import method_names
from pretrain.training.recipe import Recipe
from pretrain.training.runtime import Runtime, RuntimeConfig
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer, local_batch_size
from tests.pretrain.training.tiny import assert_equal, run_steps, tiny_recipe, tiny_trainer


def _golden_trainer(g):
    size = {"img_size": int(g["img_size"]), "patch_size": int(g["patch_size"])}
    shape = {"embed_dim": int(g["embed_dim"]), "depth": int(g["depth"]), "num_heads": int(g["num_heads"])}
    hidden, bottleneck = (g[f"init.head.mlp.{i}.weight"].shape[0] for i in (0, 4))
    recipe = Recipe.model_validate(
        {
            "method": {"name": "dino"},
            "model": {
                "name": "vit_tiny_patch16_224",
                "kwargs": {**size, **shape},
                "drop_path": 0.0,
                "pos_interpolation": "dino",
            },
            "head": {
                "hidden": hidden,
                "bottleneck": bottleneck,
                "num_prototypes": int(g["out_dim"]),
                "train_magnitude": not bool(g["norm_last_layer"]),
            },
            "optim": {
                "batch_size": g["globals"].shape[2],
                "clip": float(g["clip_grad"]),
                "freeze_last_layer_epochs": int(g["freeze_last_layer"]),
            },
            "schedule": {"epochs": int(g["epochs"]), "warmup_epochs": 0},
            "runtime": {"precision": "fp64", "device": "cpu"},
        }
    )
    trainer = Trainer(recipe, Runtime.start(recipe.runtime), Plan(int(g["epochs"]), int(g["niter"])))
    trainer.learning_rates, trainer.weight_decays = g["lr_schedule"], g["wd_schedule"]
    trainer.method._momenta = g["momentum_schedule"]
    trainer.method._temperatures = g["teacher_temp_schedule"].repeat(int(g["niter"]))
    start = {k.removeprefix("init."): torch.from_numpy(v) for k, v in g.items() if k.startswith("init.")}
    for network in (trainer.method.student, trainer.method.teacher):
        network.load_state_dict(start)
    return trainer


def _assert_weights(network, g, prefix):
    for name, value in network.state_dict().items():
        np.testing.assert_allclose(value.numpy(), g[prefix + name], rtol=0, atol=1e-9, err_msg=name)


def test_golden_dino_train_steps_end_at_the_official_weights(golden):
    g = golden("dino_train_steps")
    trainer = _golden_trainer(g)
    for step in range(trainer.plan.total_steps):
        views = [torch.from_numpy(v).double() for v in (*g["globals"][step], *g["locals"][step])]
        trainer.step(Batch(views=views, index=torch.arange(len(views[0])), epoch=trainer.plan.epoch(step)), step)
        loss = float(trainer.method.health.sum_loss)
        trainer.method.health.sum_loss.zero_()
        np.testing.assert_allclose(loss, g["losses"][step], rtol=1e-9)
        if step + 1 == int(g["niter"]):
            _assert_weights(trainer.method.student, g, "student_ep0.")
    _assert_weights(trainer.method.student, g, "student.")
    _assert_weights(trainer.method.teacher, g, "teacher.")
    np.testing.assert_allclose(trainer.method.target.center.numpy(), g["center"][0], rtol=0, atol=1e-9)


METHODS = method_names()


# Not those whose loss couples the images of a batch: Sinkhorn-Knopp, KoLeo, me-max and contrast see one micro-batch.
@pytest.mark.parametrize("method", ["dino", "dino_vmf", "ibot", "ibot_vmf", "byol", "mean_teacher"])
def test_micro_batches_equal_one_batch(method):
    whole, parts = (
        run_steps(tiny_trainer(tiny_recipe(method, extra)))
        for extra in ("runtime.accumulate=1", "runtime.accumulate=4")
    )
    assert_equal(whole, parts, rtol=1e-8, atol=1e-8)  # the key bias has no gradient: Adam walks on its rounding noise


@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_not_stopping(method, tmp_path):
    recipe = tiny_recipe(method, "runtime.precision=fp32", "model.drop_path=0.3", "head.batch_norm=true")

    def trainer():
        return tiny_trainer(recipe)

    straight = trainer()
    run_steps(straight, range(4))
    first = trainer()
    run_steps(first, range(2))
    first.save(tmp_path / "last.pt", 2)
    second = trainer()
    torch.rand(5)  # whatever was drawn in between must not matter
    assert second.restore(tmp_path / "last.pt") == 2
    run_steps(second, range(2, 4))
    assert_equal(straight.method.state_dict(), second.method.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_trained_parameter_of_the_student_and_none_of_the_teacher(method):
    trainer = tiny_trainer(tiny_recipe(method, "head.batch_norm=true"))
    run_steps(trainer, range(1))
    student = dict(trainer.method.student.named_parameters())
    assert [name for name, p in student.items() if p.requires_grad and p.grad is None] == []
    own = {id(p) for p in student.values()}
    assert all(p.grad is None for p in trainer.method.teacher.parameters() if id(p) not in own)


def test_prototypes_stay_put_while_frozen():
    trainer = tiny_trainer(tiny_recipe("dino_vmf", "optim.freeze_last_layer_epochs=1"))
    before = trainer.method.student.head.last_layer.vectors().clone()
    run_steps(trainer, range(2))
    assert torch.equal(before, trainer.method.student.head.last_layer.vectors())
    run_steps(trainer, range(2, 4))
    assert not torch.equal(before, trainer.method.student.head.last_layer.vectors())


@pytest.mark.promise("a checkpoint of another recipe in the folder", "told by both ids; exit 3")
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    one = tiny_trainer(tiny_recipe("dino"))
    one.save(tmp_path / "last.pt", 0)
    other = tiny_trainer(tiny_recipe("dino", "optim.lr=0.5"))
    with pytest.raises(DinobenchError, match="another --output"):
        other.restore(tmp_path / "last.pt")


def test_a_batch_that_cannot_be_divided_names_a_multiple():
    with pytest.raises(UsageError, match="use a multiple of 6"):
        local_batch_size(64, world_size=2, accumulate=3)


@pytest.mark.promise("a GPU that is not there", "told with what to do; exit 3")
def test_a_missing_device_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(DinobenchError, match=r"runtime\.device=cpu"):
        Runtime.start(RuntimeConfig(device="cuda"))
