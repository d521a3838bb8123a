"""Clipping, LARS and parameter groups against the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.errors import UsageError
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.heads import HeadConfig
from pretrain.models.network import Network
from pretrain.training.optim import (
    LARS,
    OptimConfig,
    clip,
    create_optimizer,
    parameter_groups,
    set_rates,
    submodule_parameters,
)


def _parameters(golden, prefix):
    keys = sorted((k for k in golden if k.startswith(prefix)), key=lambda k: int(k[len(prefix) :]))
    parameters = [nn.Parameter(torch.zeros(golden[k].shape)) for k in keys]
    for parameter, key in zip(parameters, keys, strict=True):
        parameter.grad = torch.from_numpy(golden[key].copy())
    return parameters


def test_golden_dino_clip_lars_acc_clips_each_tensor_by_its_own_norm(golden):
    g = golden("dino_clip_lars_acc")
    parameters = _parameters(g, "clip.before")
    clip([parameters[:1], parameters[1:]], float(g["clip.value"]), "tensor")
    for i, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter.grad, torch.from_numpy(g[f"clip.after{i}"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["tensor", "module"])
def test_clip_of_zero_leaves_gradients_alone(scope):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 100.0)
    clip([[parameter]], 0.0, scope)
    assert parameter.grad.tolist() == [100.0] * 3


def test_clip_of_a_module_bounds_its_whole_norm_and_spares_the_others():
    student = nn.ModuleDict({"backbone": nn.Linear(4, 3), "head": nn.Linear(3, 2), "patch_head": nn.Linear(3, 2)})
    student.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 4)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        size = 0.01 if name.startswith("head") else 5.0
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    student["patch_head"].bias.grad = None
    before = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    clip(submodule_parameters(student), 3.0, "module")
    for parts in (("mask_token", "backbone"), ("head",), ("patch_head",)):
        names = [name for name in before if name.split(".")[0] in parts]
        norm = torch.cat([before[name].flatten() for name in names]).norm()
        factor = min(1.0, 3.0 / (float(norm) + 1e-6))
        assert (factor < 1) == (parts != ("head",))
        for name in names:
            torch.testing.assert_close(student.get_parameter(name).grad, factor * before[name])


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


def _network(names=(), kwargs=None, **head):
    """As deep as the names say; widths are irrelevant, groups depend on names and numbers of dimensions."""
    depth = 1 + max((int(name.split("blocks.")[1].split(".")[0]) for name in names if "blocks." in name), default=1)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": depth, "num_heads": 3}
    model = ModelConfig(name="vit_tiny_patch16_224", kwargs={**sizes, **(kwargs or {})})
    return Network(model, HeadConfig(hidden=32, bottleneck=16, num_prototypes=64, **head))


@pytest.mark.parametrize(
    ("head", "prefix"),
    [({}, ""), ({"train_magnitude": True, "batch_norm": True}, "normlastFalse_bn_")],
)
def test_golden_dino_params_groups_hold_the_official_names(golden, head, prefix):
    g = golden("dino_params")
    network = _network(g[f"{prefix}regularized"].tolist(), **head)
    decayed, plain = _names(network, OptimConfig())
    assert decayed == set(g[f"{prefix}regularized"].tolist())
    assert plain == set(g[f"{prefix}not_regularized"].tolist())


def _names(network, config):
    """The names in each group."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return [{names[p] for p in group["params"]} for group in parameter_groups(network, config)]


def _student(names, **head):
    """A network as deep as the official names say, with the token that replaces masked patches."""
    network = _network(names, **head)
    network.mask_token = nn.Parameter(torch.zeros(1, 24))
    return network


def test_golden_ibot_params_groups_hold_the_official_names(golden):
    g = golden("ibot_params")
    decayed, plain = _names(_student(g["param_names"].tolist()), OptimConfig())
    ours = [{name.replace("backbone.masked_embed", "mask_token") for name in g[key].tolist()} for key in _OFFICIAL]
    assert [decayed, plain] == ours


_OFFICIAL = ("regularized", "not_regularized")


def _dinov2_name(name):
    """The official name of a parameter of the student."""
    return name.removeprefix("backbone.").removeprefix("head.").replace("reg_token", "register_tokens")


def test_golden_dinov2_params_multipliers_are_the_official_ones(golden):
    """Backbone and head share groups here, so there are fewer of them than in both together."""
    g = golden("dinov2_params")
    expected = {}
    for part in ("backbone", "head"):
        columns = (g[f"{part}.{key}"].tolist() for key in ("names", "lr_multiplier", "wd_multiplier", "is_last_layer"))
        expected |= {name: values for name, *values in zip(*columns, strict=True)}
    kwargs = {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-5}
    network = _student([f"backbone.{name}" for name in expected], train_magnitude=True, kwargs=kwargs)
    config = OptimConfig(
        layer_decay=float(g["lr_decay_rate"]),
        patch_embed_lr=float(g["patch_embed_lr_mult"]),
        freeze_last_layer_by="rate",
    )
    groups = parameter_groups(network, config)
    names = {parameter: _dinov2_name(name) for name, parameter in network.named_parameters()}
    keys = ("lr_multiplier", "decay_multiplier", "is_last_layer")
    found = {names[p]: [group[key] for key in keys] for group in groups for p in group["params"]}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-12), name
    assert len(groups) <= int(g["backbone.n_fused_groups"]) + int(g["head.n_fused_groups"])


def test_rates_per_layer_need_a_vit():
    student = nn.ModuleDict({"backbone": create_backbone(ModelConfig(name="resnet18"))})
    with pytest.raises(UsageError, match="need a ViT"):
        parameter_groups(student, OptimConfig(layer_decay=0.9))


def test_scheduled_values_are_multiplied_in_each_group():
    network = _student(["backbone.blocks.1.x"])
    config = OptimConfig(layer_decay=0.5, freeze_last_layer_by="rate")
    optimizer = create_optimizer(config, parameter_groups(network, config))
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}

    def rates(parameter):
        return group_of[parameter]["lr"], group_of[parameter]["weight_decay"]

    for frozen, last in ((True, 0.0), (False, 0.1)):
        set_rates(optimizer, 0.1, 0.04, freeze_last_layer=frozen)
        assert rates(network.backbone.pos_embed) == pytest.approx((0.1 / 8, 0.04))
        assert rates(network.backbone.get_parameter("blocks.1.norm1.bias")) == pytest.approx((0.1 / 2, 0.0))
        assert rates(network.head.get_parameter("mlp.0.weight")) == pytest.approx((0.1, 0.04))
        assert rates(network.head.last_layer.weight_v) == pytest.approx((last, 0.04))


def test_moments_build_up_while_the_last_layer_is_frozen_by_its_rate():
    network = _student([])
    config = OptimConfig(freeze_last_layer_by="rate")
    optimizer = create_optimizer(config, parameter_groups(network, config))
    prototypes = network.head.last_layer.weight_v
    before = prototypes.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_rates(optimizer, 0.1, 0.04, freeze_last_layer=True)
    optimizer.step()
    assert torch.equal(prototypes, before)
    assert bool((optimizer.state[prototypes]["exp_avg"] > 0).all())


def test_golden_dino_params_state_dict_keys_are_the_official_ones(golden):
    g = golden("dino_params")
    network = _network(g["wrapper_state_dict_keys"].tolist())
    assert set(network.state_dict()) == set(g["wrapper_state_dict_keys"].tolist())
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == set(g["skipped_no_grad"].tolist())


def test_decay_of_prototype_norms_can_be_switched_off():
    network = _network(prototypes="free")
    weight = network.head.last_layer.weight
    with_decay, without = (parameter_groups(network, OptimConfig(decay_prototype_norms=flag)) for flag in (True, False))
    assert any(p is weight for p in with_decay[0]["params"])
    assert any(p is weight for p in without[1]["params"])
    assert without[1]["decay_multiplier"] == 0.0


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimizer_moves_the_weights(name):
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    config = OptimConfig(name=name)
    optimizer = create_optimizer(config, parameter_groups(layer, config))
    set_rates(optimizer, 0.1, 0.0, freeze_last_layer=False)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)


def test_peak_learning_rate_scales_with_the_batch():
    np.testing.assert_allclose(OptimConfig(lr=5e-4, batch_size=1024).peak_lr, 2e-3)
    np.testing.assert_allclose(OptimConfig(lr=4e-3, batch_size=4096, lr_scaling="sqrt").peak_lr, 8e-3)


def test_betas_and_momentum_reach_the_optimizer():
    for config, key, value in (
        (OptimConfig(betas=(0.9, 0.95)), "betas", (0.9, 0.95)),
        (OptimConfig(name="sgd", momentum=0.8), "momentum", 0.8),
        (OptimConfig(name="lars", momentum=0.8), "momentum", 0.8),
    ):
        (group,) = create_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1, 1))]}]).param_groups
        assert group[key] == value
