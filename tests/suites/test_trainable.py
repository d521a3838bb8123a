from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import DropPath

from pretrain.errors import UsageError
from pretrain.models.checkpoint import LoadedModel, weights_sha256
from suites.trainable import Classifier, copy_backbone, rate_groups

MakeModel = Callable[..., LoadedModel]
CNN = {"name": "resnet10t", "kwargs": {}, "init": "timm"}


def by_name(classifier: Classifier, layer_decay: float) -> dict[str, tuple[float, float]]:
    """Name -> (rate multiplier, decay multiplier)."""
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    groups = rate_groups(classifier, layer_decay)
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values())  # each parameter once
    return {
        names[id(parameter)]: (group["lr_multiplier"], group["decay_multiplier"])
        for group in groups
        for parameter in group["params"]
    }


def test_copy_gives_the_same_features_and_shares_no_weight(model: LoadedModel) -> None:
    copy = copy_backbone(model, drop_path=0.2)
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(copy.eval()(images), model.backbone(images))
    before = weights_sha256(model.backbone)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    assert weights_sha256(model.backbone) == before
    assert all(parameter.requires_grad for parameter in copy.parameters())


def test_stochastic_depth_rises_linearly_over_the_blocks(model: LoadedModel) -> None:
    blocks = copy_backbone(model, drop_path=0.2).blocks
    rates = [block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0 for block in blocks]
    assert rates == pytest.approx([0, 0.2])
    assert not any(isinstance(module, DropPath) for module in model.backbone.modules())


def test_pixels_cannot_be_trained(model: LoadedModel) -> None:
    model.provenance["model"] = None
    with pytest.raises(UsageError, match="no network that could be trained"):
        copy_backbone(model, drop_path=0.1)


def test_rates_of_a_vit_decay_by_layer_as_in_beit(model: LoadedModel) -> None:
    found = by_name(Classifier(copy_backbone(model, 0.1), 3, 1.0), layer_decay=0.5)
    depth = 2
    expected = {
        "backbone.cls_token": depth + 1,
        "backbone.pos_embed": depth + 1,
        "backbone.patch_embed.proj.weight": depth + 1,
        "backbone.blocks.0.attn.qkv.weight": depth,
        "backbone.blocks.1.mlp.fc2.bias": depth - 1,
        "backbone.norm.weight": 0,
        "head.weight": 0,
        "head.bias": 0,
    }
    for name, power in expected.items():
        assert found[name][0] == 0.5**power, name


def test_biases_norms_and_tokens_are_not_decayed(model: LoadedModel) -> None:
    found = by_name(Classifier(copy_backbone(model, 0.1), 3, 1.0), layer_decay=0.5)
    for name, (_, decay) in found.items():
        spared = name.endswith(("bias", "cls_token", "pos_embed")) or ".norm" in name
        assert decay == (0.0 if spared else 1.0), name


def test_rates_of_a_cnn_decay_by_its_groups_of_layers(make_model: MakeModel) -> None:
    found = by_name(Classifier(copy_backbone(make_model(**CNN), 0.0), 3, 1.0), layer_decay=0.5)
    rates = [found[f"backbone.{name}.weight"][0] for name in ("conv1.0", "layer1.0.conv1", "layer4.0.conv1")]
    assert rates[0] < rates[1] < rates[2] < found["head.weight"][0] == 1.0
    assert found["backbone.layer4.0.conv1.weight"] == (0.5, 1.0)
    assert found["backbone.layer4.0.bn1.weight"][1] == 0.0 and found["head.bias"] == (1.0, 0.0)
    assert {rate for rate, _ in by_name(Classifier(copy_backbone(make_model(**CNN), 0.0), 3, 1.0), 1.0).values()} == {1}


def test_classifier_starts_near_guessing(model: LoadedModel) -> None:
    classifier = Classifier(copy_backbone(model, 0.0), 5, init_scale=0.001)
    assert classifier.head.weight.abs().max() < 1e-4 and not classifier.head.bias.any()
    assert classifier(torch.rand(2, 3, 16, 16)).shape == (2, 5)
