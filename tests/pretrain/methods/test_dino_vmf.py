"""DINO-vMF against DINO: the same loss where the precisions are equal, another one where they are not."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.errors import UsageError
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = [
    "head.batch_norm=false",
    "head.hidden=16",
    "head.bottleneck=16",
    "head.num_prototypes=12",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.precision=fp64",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
]


def _method(name, *overrides):
    recipe = resolve(name, preset="digits", overrides=[*TINY, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3)).method


def _batch():
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64) for size in (16, 16, 8, 8)]
    return Batch(views, torch.arange(4), 0)


def _same_weights(source, *others):
    """Copy the unit prototypes and everything else of `source` into the other methods."""
    for other in others:
        for network in ("student", "teacher"):
            state = getattr(source, network).state_dict()
            getattr(other, network).load_state_dict(state)  # prototypes are converted to the layout of the receiver


def _loss_and_gradient(method):
    loss, _ = method.loss(_batch(), 0)
    loss.backward()
    return loss.detach(), method.student.backbone.patch_embed.proj.weight.grad


@pytest.mark.parametrize("centring", ["none", "prob_logmean_ema", "prob_ema_log", "logit"])
def test_equal_norms_give_the_loss_of_dino_up_to_the_centring(centring):
    switch = f"target.centring={centring}"
    dino, vmf = _method("dino", switch), _method("dino_vmf", switch)
    _same_weights(dino, vmf)
    (loss, gradient), (vmf_loss, vmf_gradient) = _loss_and_gradient(dino), _loss_and_gradient(vmf)
    torch.testing.assert_close(vmf_loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vmf_gradient, gradient, rtol=1e-8, atol=1e-12)


def test_different_norms_give_different_posteriors_with_and_without_the_normaliser():
    vmf, free = _method("dino_vmf", "target.centring=none"), _method("dino_free", "target.centring=none")
    scale = torch.linspace(0.5, 3.0, 12, dtype=torch.float64)[:, None]
    with torch.no_grad():
        for network in (vmf.student, vmf.teacher):
            network.head.last_layer.weight.mul_(scale)
    _same_weights(vmf, free)
    assert abs(_loss_and_gradient(vmf)[0] - _loss_and_gradient(free)[0]) > 1e-3


def test_without_a_normaliser_it_says_which_method_is_meant():
    with pytest.raises(UsageError, match="use dino_free"):
        _method("dino_vmf", "head.normaliser=none")
