"""Backbone and projection head as one network, fed with crops of several sizes (MultiCropWrapper in DINO).

Shapes: V views, the first G of them masked, B images, N patches, D features, P bottleneck, K prototypes, M masked
patches of all G x B crops; for patch tokens P', K' where their head has sizes of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.masks import Masks
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim, kept_features, masked_tokens
from pretrain.models.heads import (
    HeadConfig,
    ProjectionHead,
    create_predictor,
    create_prototypes,
    keep_running_statistics,
    log_normaliser,
    unit_length,
)
from pretrain.models.patch_head import PatchConfig
from pretrain.models.prototypes import Prototypes

Corruption = Literal["none", "replace", "drop"]


class Outputs(NamedTuple):
    """What a network says about V views of B images. Prototypes are formed once per step, so they are given back."""

    features: Tensor
    """[V, B, D] CLS token or pooled features."""
    z: Tensor
    """[V, B, P] bottleneck outputs of unit length."""
    vectors: Tensor | None
    """[K, P] prototypes; None for a head without."""
    patches: Tensor | None = None
    """[G, B, N, D] patch tokens of the masked views."""
    patch_z: Tensor | None = None
    """[M, P'] (or [G B N, P'] for all patches) of unit length."""
    patch_vectors: Tensor | None = None
    """[K', P']"""


class Network(nn.Module):
    """Student or teacher: `backbone` and `head`; the student may have a `predictor` and a `mask_token`.

    Args:
        model: the backbone.
        head: the projection head of the image tokens.
        patch: the patch objective; its head is made when the weight is positive.
        predictor: give the student BYOL's predictor between projection and normalisation.
        mask_token: give the student the learned embedding that replaces masked patches (iBOT; zeros at first).
        drop_path: stochastic depth.
    """

    backbone: nn.Module
    head: ProjectionHead

    def __init__(
        self,
        model: ModelConfig,
        head: HeadConfig,
        patch: PatchConfig | None = None,
        *,
        predictor: bool = False,
        mask_token: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.backbone = create_backbone(model, drop_path=drop_path)
        dim = feature_dim(self.backbone)
        self.head = ProjectionHead(dim, head)
        self.patch_config = patch.head_config(head) if patch is not None and patch.weight else None
        own = patch.head if self.patch_config is not None and patch is not None else "shared"
        self.patch_head = ProjectionHead(dim, self.patch_config) if own == "separate" and self.patch_config else None
        self.patch_last_layer = (
            create_prototypes(self.patch_config) if own == "last_layer" and self.patch_config else None
        )
        self.predictor = create_predictor(head) if predictor else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim)) if mask_token else None

    def forward(
        self,
        views: list[Tensor],
        masks: Masks | None = None,
        corrupt: Corruption = "none",
        patches: Literal["masked", "all"] = "masked",
    ) -> Outputs:
        """V views [B, 3, s, s] -> what the network says about them.

        Args:
            views: crops; neighbouring views of one size share a pass of the backbone.
            masks: of the first G views.
            corrupt: what happens to masked patches before the backbone: nothing, the mask token, or they are dropped.
            patches: which patch tokens go through the head.

        The head sees the rows of all views in one pass, which matters for BatchNorm in the head. Patch rows are a
        second pass that leaves the running statistics alone: at evaluation only image rows are read.
        """
        num_masked = 0 if masks is None else len(masks.mask)
        features, tokens = [], None
        if masks is not None:
            images = torch.cat(views[:num_masked])
            if corrupt == "drop":
                features.append(kept_features(self.backbone, images, masks.kept()))
            else:
                mask = masks.mask.flatten(0, 1) if corrupt == "replace" else None
                every = masked_tokens(self.backbone, images, mask, self.mask_token)
                features.append(every[:, 0])
                tokens = every[:, -masks.mask.shape[-1] :]
        groups = [list(group) for _, group in groupby(views[num_masked:], key=lambda view: view.shape[-1])]
        features += [self.backbone(torch.cat(group) if len(group) > 1 else group[0]) for group in groups]
        rows = torch.cat(features)
        shape = (len(views), views[0].shape[0])
        z = unit_length(self.predict(self.head.mlp(rows)))
        vectors = self.head.last_layer.vectors() if self.head.config.num_prototypes else None
        outputs = Outputs(rows.unflatten(0, shape), z.unflatten(0, shape), vectors)
        if tokens is None or masks is None or self.patch_config is None:
            return outputs
        flat = tokens.flatten(0, 1)
        patch_rows = flat if patches == "all" else flat.index_select(0, masks.index)
        return outputs._replace(
            patches=tokens.unflatten(0, (num_masked, shape[1])),
            patch_z=self._project_patches(patch_rows),
            patch_vectors=self.patch_prototypes.vectors() if self._own_prototypes else vectors,
        )

    def predict(self, m: Tensor) -> Tensor:
        """m [R, P] -> [R, P]: the predictor, where there is one."""
        return m if self.predictor is None else self.predictor(m)

    @property
    def patch_prototypes(self) -> Prototypes:
        """The prototypes of the patch tokens: those of the head unless the patches have their own."""
        if self.patch_head is not None:
            return self.patch_head.last_layer
        return self.head.last_layer if self.patch_last_layer is None else self.patch_last_layer

    def patch_log_normaliser(self, temperature: float, vectors: Tensor) -> Tensor | None:
        """log C_p of the patch prototypes [K'], or None without normaliser."""
        assert self.patch_config is not None
        return log_normaliser(self.patch_config, vectors, temperature)

    @property
    def _own_prototypes(self) -> bool:
        return self.patch_head is not None or self.patch_last_layer is not None

    def _project_patches(self, rows: Tensor) -> Tensor:
        """Patch tokens [M, D] -> [M, P'] of unit length."""
        head = self.head if self.patch_head is None else self.patch_head
        count = len(rows)
        if count < 2:  # BatchNorm refuses fewer rows; without any, the graph must still reach every parameter
            rows = F.pad(rows, (0, 0, 0, 2 - count))
        with keep_running_statistics(head.mlp) if head is self.head else nullcontext():
            return head.project(rows)[:count]
