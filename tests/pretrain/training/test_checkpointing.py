"""Activation checkpointing: the same training to the last bit, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pretrain.data.loader import Batch
from pretrain.data.masks import MaskSampler
from pretrain.errors import UsageError
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = [
    "head.hidden=16",
    "head.bottleneck=16",
    "head.num_prototypes=12",
    "optim.batch_size=4",
    "optim.freeze_last_layer_epochs=0",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 4, num_heads: 2}",
]


def _trainer(method, *overrides):
    recipe = resolve(method, preset="digits", overrides=[*TINY, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))


def _batch(recipe, step):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(4, 3, view.size, view.size, generator=generator) for view in recipe.views.views]
    masks = None
    if recipe.masks.kind != "none":
        masks = MaskSampler(recipe.masks, (4, 4), seed=0)(torch.arange(4), 0, step=step, first=0, batch_size=4)
    return Batch(views, torch.arange(4), 0, masks)


def _run(trainer):
    """What two steps leave behind, and the bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for step in range(2):
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.step(_batch(trainer.recipe, step), step)
    state = {name: value for name, value in trainer.method.state_dict().items() if isinstance(value, torch.Tensor)}
    gradients = {f"grad {n}": p.grad for n, p in trainer.method.student.named_parameters() if p.grad is not None}
    return {**state, **gradients, "random state": torch.get_rng_state()}, sum(kept.values())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dino", ["model.drop_path=0"]),
        ("dino_vmf", ["model.drop_path=0.4"]),
        ("dino", ["model.drop_path=0.4", "model.drop_path_uniform=true", "model.drop_path_subset=true"]),
        ("ibot", ["model.drop_path=0.4"]),
        ("msn", ["model.drop_path=0.4"]),
        ("dino", ["model.drop_path=0.4", "runtime.precision=bf16", "runtime.accumulate=2"]),
    ],
)
def test_recomputed_blocks_draw_the_same_samples_and_give_the_same_gradients(method, settings):
    plain, more = _run(_trainer(method, *settings))
    recomputed, less = _run(_trainer(method, *settings, "runtime.checkpoint_activations=true"))
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name
    assert less < 0.7 * more


def test_the_teacher_keeps_no_activations_anyway():
    trainer = _trainer("dino", "runtime.checkpoint_activations=true")
    assert trainer.method.student.backbone.grad_checkpointing
    assert not trainer.method.teacher.backbone.grad_checkpointing


WHOLE = ["model.kwargs={}", "model.init=timm", "views.global_size=224", "views.local=0"]


@pytest.mark.parametrize(("name", "reason"), [("resnet18", "BatchNorm"), ("convit_tiny", "does not offer")])
def test_a_backbone_that_cannot_is_refused(name, reason):
    with pytest.raises(UsageError, match=f"{reason}.*set it to false"):
        _trainer("dino", f"model.name={name}", "model.drop_path=0", *WHOLE, "runtime.checkpoint_activations=true")


def test_other_transformers_than_plain_vits_can():
    name = "model.name=swin_tiny_patch4_window7_224"
    trainer = _trainer("dino", name, "model.drop_path=0", *WHOLE, "runtime.checkpoint_activations=true")
    assert all(layer.grad_checkpointing for layer in trainer.method.student.backbone.layers)
