"""Backbone and projection head as one network, fed with crops of several sizes (MultiCropWrapper in DINO)."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor, nn

from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim
from pretrain.models.heads import HeadConfig, ProjectionHead


class Network(nn.Module):
    """Student or teacher: `backbone` and `head` (V views, B images, D features, P bottleneck, K prototypes)."""

    backbone: nn.Module
    head: ProjectionHead

    def __init__(self, model: ModelConfig, head: HeadConfig, *, drop_path: float = 0.0):
        super().__init__()
        self.backbone = create_backbone(model, drop_path=drop_path)
        self.head = ProjectionHead(feature_dim(self.backbone), head)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """V views [B, 3, s, s] -> features [V, B, D], bottleneck outputs [V, B, P], prototypes [K, P].

        Neighbouring views of one size share a pass of the backbone; the head sees all rows in one pass, which
        matters for BatchNorm in the head. The prototypes are returned so that they are formed once per step.
        """
        groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-1])]
        features = torch.cat([self.backbone(torch.cat(group) if len(group) > 1 else group[0]) for group in groups])
        z = self.head.project(features)
        shape = (len(views), views[0].shape[0])
        return features.unflatten(0, shape), z.unflatten(0, shape), self.head.last_layer.vectors()
