"""A checkpoint's network made ready to be trained as a classifier, and the learning rates of its layers.

    ViT       layer_decay^(depth + 1 - l): l = 0 the embedding, l-th block, depth + 1 the final norm and the classifier
    others    the same over timm's groups of layers, the classifier one above the last of them

Source: BEiT's `optim_factory.py`, as iBOT uses it. Not decayed: biases, one-dimensional tensors, and what timm's model
names (class token, positions).

Shapes: B images, s side of an image, D features, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import UsageError
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim, has_patch_tokens
from pretrain.models.checkpoint import LoadedModel
from pretrain.training.optim import OptimConfig, parameter_groups


class Classifier(nn.Module):
    """A backbone and a linear layer on its pooled features."""

    def __init__(self, backbone: nn.Module, num_classes: int, init_scale: float):
        """Weight of the layer N(0, 0.02), truncated, times `init_scale`; bias 0."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(feature_dim(backbone), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, s, s] -> logits [B, C]."""
        return self.head(self.backbone(images))


def copy_backbone(model: LoadedModel, drop_path: float) -> nn.Module:
    """A copy of the network in float32 that can be trained, with stochastic depth; the network itself is left alone.

    Args:
        model: what was loaded.
        drop_path: rate of the last block, rising linearly from 0 over the blocks.

    Raises:
        UsageError: there is no network (pixels), or it has no stochastic depth and `drop_path` is not 0.
    """
    if model.provenance.get("model") is None:
        raise UsageError(
            f"{model.provenance.get('path')} is no network that could be trained: this suite does not apply"
        )
    config = ModelConfig.model_validate(model.provenance["model"])
    config = config.model_copy(update={"drop_path_uniform": False, "drop_path_subset": False})
    backbone = create_backbone(config, drop_path=drop_path)
    backbone.load_state_dict(model.backbone.state_dict())
    return backbone.float()


def rate_groups(classifier: Classifier, layer_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters with `lr_multiplier` and `decay_multiplier`, as pretrain.training.optim takes them."""
    backbone = classifier.backbone
    names = set(backbone.no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()  # pyright: ignore[reportCallIssue]
    if has_patch_tokens(backbone):
        spared = {id(parameter) for name, parameter in backbone.named_parameters() if name in names}
        return _spare(parameter_groups(classifier, OptimConfig(layer_decay=layer_decay)), spared)
    # Imported here: timm takes seconds to import and reading a suite does not need it.
    from timm.optim._param_groups import param_groups_layer_decay

    layers = param_groups_layer_decay(backbone, weight_decay=1.0, no_weight_decay_list=names, layer_decay=layer_decay)
    return [
        *(_group(g["params"], g["lr_scale"] * layer_decay, g["weight_decay"]) for g in layers),
        _group([classifier.head.weight], 1.0, 1.0),
        _group([classifier.head.bias], 1.0, 0.0),
    ]


def _group(parameters: list[Tensor], rate: float, decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr_multiplier": rate, "decay_multiplier": decay, "is_last_layer": False}


def _spare(groups: list[dict[str, Any]], spared: set[int]) -> list[dict[str, Any]]:
    """The groups, with the parameters of these ids in groups of their own without decay."""
    found = []
    for group in groups:
        for is_spared in (False, True):
            members = [parameter for parameter in group["params"] if (id(parameter) in spared) == is_spared]
            if members:
                decay = 0.0 if is_spared else group["decay_multiplier"]
                found.append(_group(members, group["lr_multiplier"], decay))
    return found
