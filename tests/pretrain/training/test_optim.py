"""Clipping, LARS and parameter groups against the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.models.backbones import ModelConfig
from pretrain.models.heads import HeadConfig
from pretrain.models.network import Network
from pretrain.training.optim import LARS, OptimConfig, clip_per_tensor, create_optimizer, parameter_groups


def _parameters(golden, prefix):
    keys = sorted((k for k in golden if k.startswith(prefix)), key=lambda k: int(k[len(prefix) :]))
    parameters = [nn.Parameter(torch.zeros(golden[k].shape)) for k in keys]
    for parameter, key in zip(parameters, keys, strict=True):
        parameter.grad = torch.from_numpy(golden[key].copy())
    return parameters


def test_golden_dino_clip_lars_acc_clips_each_tensor_by_its_own_norm(golden):
    g = golden("dino_clip_lars_acc")
    parameters = _parameters(g, "clip.before")
    clip_per_tensor(parameters, float(g["clip.value"]))
    for i, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter.grad, torch.from_numpy(g[f"clip.after{i}"]), rtol=1e-5, atol=1e-7)


def test_clip_of_zero_leaves_gradients_alone():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 100.0)
    clip_per_tensor([parameter], 0.0)
    assert parameter.grad.tolist() == [100.0] * 3


def test_golden_dino_clip_lars_acc_lars_follows_the_official_steps(golden):
    g = golden("dino_clip_lars_acc")
    weight, bias = (nn.Parameter(torch.from_numpy(g[f"lars.{k}0"].copy())) for k in "wb")
    optimizer = LARS([weight, bias], lr=float(g["lars.lr"]), weight_decay=float(g["lars.wd"]))
    steps = sum(k.startswith("lars.gw") for k in g)
    for i in range(steps):
        weight.grad, bias.grad = torch.from_numpy(g[f"lars.gw{i}"]), torch.from_numpy(g[f"lars.gb{i}"])
        optimizer.step()
        torch.testing.assert_close(weight.data, torch.from_numpy(g[f"lars.w{i + 1}"]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias.data, torch.from_numpy(g[f"lars.b{i + 1}"]), rtol=1e-5, atol=1e-6)


def _network(names=(), **head):
    """As deep as the names say; widths are irrelevant, groups depend on names and numbers of dimensions."""
    depth = 1 + max((int(name.split("blocks.")[1].split(".")[0]) for name in names if "blocks." in name), default=1)
    kwargs = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": depth, "num_heads": 3}
    model = ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs)
    return Network(model, HeadConfig(hidden=32, bottleneck=16, num_prototypes=64, **head))


@pytest.mark.parametrize(
    ("head", "prefix"),
    [({}, ""), ({"train_magnitude": True, "batch_norm": True}, "normlastFalse_bn_")],
)
def test_golden_dino_params_groups_hold_the_official_names(golden, head, prefix):
    g = golden("dino_params")
    network = _network(g[f"{prefix}regularized"].tolist(), **head)
    names = {parameter: name for name, parameter in network.named_parameters()}
    decayed, plain = ({names[p] for p in group["params"]} for group in parameter_groups(network))
    assert decayed == set(g[f"{prefix}regularized"].tolist())
    assert plain == set(g[f"{prefix}not_regularized"].tolist())


def test_golden_dino_params_state_dict_keys_are_the_official_ones(golden):
    g = golden("dino_params")
    network = _network(g["wrapper_state_dict_keys"].tolist())
    assert set(network.state_dict()) == set(g["wrapper_state_dict_keys"].tolist())
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == set(g["skipped_no_grad"].tolist())


def test_decay_of_prototype_norms_can_be_switched_off():
    network = _network(prototypes="free")
    weight = network.head.last_layer.weight
    with_decay, without = (parameter_groups(network, decay_prototypes=flag) for flag in (True, False))
    assert any(p is weight for p in with_decay[0]["params"])
    assert any(p is weight for p in without[1]["params"])
    assert without[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimizer_moves_the_weights(name):
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = create_optimizer(OptimConfig(name=name), parameter_groups(layer))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)


def test_peak_learning_rate_scales_with_the_batch():
    np.testing.assert_allclose(OptimConfig(lr=5e-4, batch_size=1024).peak_lr, 2e-3)
