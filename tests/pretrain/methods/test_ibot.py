"""iBOT: the official training steps, its masks and heads, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.data.masks import Masks
from pretrain.errors import UsageError
from pretrain.objectives import losses
from pretrain.objectives.targets import Target
from pretrain.training.recipe import Recipe, resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = [
    "head.batch_norm=false",
    "head.hidden=16",
    "head.bottleneck=16",
    "head.num_prototypes=12",
    "optim.batch_size=8",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "optim.freeze_last_layer_epochs=0",
    "runtime.precision=fp64",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}",
]


def masks_of(mask):
    """Masks in double precision, as the double-precision reference values need them."""
    masks = Masks.of(mask)
    counts = masks.counts.clamp(min=1).double()
    weight = (1 / counts).flatten().repeat_interleave(masks.counts.flatten())
    return Masks(masks.mask, masks.index, weight, masks.counts)


def _trainer(recipe, plan=None):
    return Trainer(recipe, Runtime.start(recipe.runtime), plan or Plan(2, 3))


def _batch(step=0, ratio=0.4, batch=8):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(batch, 3, s, s, generator=generator, dtype=torch.float64) for s in (16, 16, 8, 8)]
    mask = torch.rand(2, batch, 16, generator=generator) < ratio
    mask[0, 0] = False
    return Batch(views, torch.arange(batch), 0, masks_of(mask))


def _ours(name):
    """Our name of an official parameter."""
    return name.replace("backbone.masked_embed", "mask_token")


def _golden_trainer(g):
    shape = {"img_size": int(g["img_size"]), "patch_size": int(g["patch_size"]), "embed_dim": int(g["embed_dim"])}
    shape |= {"depth": int(g["depth"]), "num_heads": int(g["num_heads"])}
    steps, epochs = len(g["lr_schedule"]), 2
    recipe = Recipe.model_validate(
        {
            "method": {"name": "ibot"},
            "masks": {"kind": "block"},
            "model": {
                "name": "vit_tiny_patch16_224", "kwargs": shape, "drop_path": 0.0, "pos_interpolation": "dino",
            },
            "head": {
                "hidden": g["init.head.mlp.0.weight"].shape[0],
                "bottleneck": g["init.head.mlp.4.weight"].shape[0],
                "num_prototypes": int(g["out_dim"]),
                "train_magnitude": not bool(g["norm_last_layer"]),
            },
            "patch": {"weight": float(g["lambda2"])},
            "optim": {
                "batch_size": g["globals"].shape[2],
                "clip": float(g["clip_grad"]),
                "freeze_last_layer_epochs": int(g["freeze_last_layer"]),
            },
            "schedule": {"epochs": epochs, "warmup_epochs": 0},
            "runtime": {"precision": "fp64", "device": "cpu"},
        }
    )  # fmt: skip
    per_epoch = steps // epochs
    trainer = _trainer(recipe, Plan(epochs, per_epoch))
    trainer.learning_rates, trainer.weight_decays = g["lr_schedule"], g["wd_schedule"]
    method = trainer.method
    method._momenta = g["momentum_schedule"]
    # The file does not hold the temperatures; they are those of dino_train_steps, 0.04 -> 0.07 over two epochs.
    method._temperatures = method._patch_temperatures = np.linspace(0.04, 0.07, epochs).repeat(per_epoch)
    start = {_ours(k.removeprefix("init.")): torch.from_numpy(v) for k, v in g.items() if k.startswith("init.")}
    shared = {k: v for k, v in start.items() if "last_layer2" not in k}
    method.student.load_state_dict(shared)
    method.teacher.load_state_dict({k: v for k, v in shared.items() if k != "mask_token"})
    return trainer


def _assert_weights(network, g, prefix):
    official = {_ours(k.removeprefix(prefix)): v for k, v in g.items() if k.startswith(prefix)}
    ours = network.state_dict()
    assert official.keys() - ours.keys() == {"head.last_layer2.weight_g", "head.last_layer2.weight_v"}
    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), official[name], rtol=0, atol=1e-9, err_msg=name)


def test_golden_ibot_train_steps_end_at_the_official_weights(golden):
    g = golden("ibot_train_steps")
    trainer = _golden_trainer(g)
    for step in range(trainer.plan.total_steps):
        views = [torch.from_numpy(v).double() for v in (*g["globals"][step], *g["locals"][step])]
        mask = torch.from_numpy(g["masks"][step]).flatten(2)
        trainer.step(Batch(views, torch.arange(len(views[0])), 0, masks_of(mask)), step)
        health = trainer.method.health
        parts = dict(zip(health.metrics, health.sum_metrics.tolist(), strict=True))
        found = [parts["loss/image"], parts["loss/patch"], float(health.sum_loss)]
        np.testing.assert_allclose(found, g["losses_cls_patch_total"][step], rtol=1e-9)
        health.sum_loss.zero_()
        health.sum_metrics.zero_()
    _assert_weights(trainer.method.student, g, "student.")
    _assert_weights(trainer.method.teacher, g, "teacher.")
    np.testing.assert_allclose(trainer.method.target.center.numpy(), g["center"][0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(trainer.method.patch_target.center.numpy(), g["center2"][0, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("centring", ["logit", "prob_logmean_ema", "prob_ema_log"])
def test_the_centre_of_the_patches_is_that_of_every_patchs_logits(centring, monkeypatch):
    """Formed from the mean of z, or in parts, it must be the centre of all rows at once."""
    monkeypatch.setattr(losses, "MAX_CHUNK_LOGITS", 100)  # several parts
    method = _trainer(resolve("ibot_vmf", preset="digits", overrides=[*TINY, f"patch.centring={centring}"])).method
    batch = _batch()
    teacher = method.teacher_outputs(batch)
    plain = Target(method.recipe.patch.target_config(method.recipe.target), 12).double()
    tau = method.patch_temperature(0)
    normaliser = method.teacher.patch_log_normaliser(tau, teacher.patch_vectors)
    targets = []
    for _ in range(2):  # the second time with a centre that is not its start
        expected = plain(teacher.patch_z @ teacher.patch_vectors.T, tau, normaliser)[batch.masks.index]
        targets.append((expected, method.patch_targets(teacher, batch.masks, 0)))
        plain.update()
        method.patch_target.update()
    for expected, found in targets:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(method.patch_target.center, plain.center, rtol=1e-9, atol=1e-12)


def test_masked_patches_alone_give_the_loss_over_all_patches():
    """Equation 2 written out over every patch of every crop."""
    trainer = _trainer(resolve("ibot_vmf", preset="digits", overrides=TINY))
    method, batch = trainer.method, _batch()
    teacher = method.teacher_outputs(batch)
    student = method.student_outputs(batch)
    target = method.patch_targets(teacher, batch.masks, 0)
    every = method.student(batch.views, batch.masks, "replace", "all")
    tau = method.recipe.objective.student_temperature
    bias = method.student.patch_log_normaliser(tau, every.patch_vectors)
    log_q = (every.patch_z @ every.patch_vectors.T / tau + bias).log_softmax(-1).view(2, 8, 16, -1)
    expected, row = 0.0, 0
    for g in range(2):
        for b in range(8):
            places = batch.masks.mask[g, b].nonzero().flatten()
            terms = [-(target[row + i] * log_q[g, b, n]).sum() for i, n in enumerate(places)]
            row += len(terms)
            expected += sum(terms) / max(len(terms), 1) / 16
    torch.testing.assert_close(method.patch_loss(student, target, batch.masks), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "head", ["patch.head=shared", "patch.head=last_layer patch.num_prototypes=20",
             "patch.head=separate patch.num_prototypes=20 patch.bottleneck=24"],
)  # fmt: skip
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_kind_of_head_trains_and_every_parameter_gets_a_gradient(head, batch_norm):
    overrides = [*TINY, *head.split(), f"head.batch_norm={str(batch_norm).lower()}"]
    trainer = _trainer(resolve("ibot_vmf", preset="digits", overrides=overrides))
    trainer.step(_batch(), 0)
    missing = [n for n, p in trainer.method.student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in trainer.method.teacher.parameters())


def test_a_step_without_masks_trains_and_reaches_every_parameter():
    trainer = _trainer(resolve("ibot", preset="digits", overrides=[*TINY, "head.batch_norm=true"]))
    trainer.step(_batch(ratio=0.0), 0)
    assert all(p.grad is not None for p in trainer.method.student.parameters() if p.requires_grad)
    assert trainer.method.health.first_bad_step < 0


def test_patch_rows_leave_the_running_statistics_to_the_image_rows():
    overrides = [*TINY, "head.batch_norm=true"]
    trainer = _trainer(resolve("ibot", preset="digits", overrides=overrides))
    network, batch = trainer.method.teacher, _batch()
    network(batch.views[:2], batch.masks, patches="all")
    with_patches = network.head.mlp[1].running_mean.clone()
    again = _trainer(resolve("ibot", preset="digits", overrides=overrides)).method.teacher
    again(batch.views[:2])
    torch.testing.assert_close(with_patches, again.head.mlp[1].running_mean)


def test_the_mask_token_is_the_students_alone_and_masking_changes_the_student_only():
    trainer = _trainer(resolve("ibot", preset="digits", overrides=TINY))
    method, batch = trainer.method, _batch()
    assert method.student.mask_token is not None and method.teacher.mask_token is None
    masked, whole = method.student_outputs(batch), method.student(batch.views)
    assert not torch.allclose(masked.z[0, 1], whole.z[0, 1])
    torch.testing.assert_close(masked.z[0, 0], whole.z[0, 0])  # the image without masks
    torch.testing.assert_close(masked.z[2:], whole.z[2:])  # local views are never masked


def test_gram_anchoring_copies_the_teacher_when_told_and_pulls_on_the_student():
    overrides = [*TINY, "regularizer.gram=1.0", "regularizer.gram_start_epoch=1", "regularizer.gram_every_epochs=1"]
    trainer = _trainer(resolve("dinov2", preset="digits", overrides=[*overrides, "schedule.epochs=3"]), Plan(3, 2))
    copies = []
    for step in range(6):
        teacher = trainer.method.teacher.backbone.norm.bias.clone()
        trainer.step(_batch(step), step)
        copies.append(bool(torch.equal(trainer.method.gram_teacher.norm.bias, teacher)))
        value = float(trainer.method.health.sum_metrics[trainer.method.health.metrics.index("loss/gram")])
        assert (value > 0) == (step >= 2)
    assert copies[2] and copies[4] and not copies[3] and not copies[5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["patch.weight=0"], "the method is dino"),
        (["masks.kind=none"], "masks.kind"),
        (["teacher.kind=none"], "needs a teacher"),
        (["patch.num_prototypes=20"], "does not go with patch.head=shared"),
        (["model.name=resnet18", "model.kwargs={}", "model.init=timm"], "resnet18|ResNet"),
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(overrides, message):
    from pretrain.training.loop import train

    with pytest.raises(UsageError, match=message):
        train(resolve("ibot", preset="digits", overrides=[*TINY, *overrides]), folder=None)
