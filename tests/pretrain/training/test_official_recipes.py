"""The paper-scale presets against the official configurations, figure by figure (PROTOCOLS sections 1 to 3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.models.backbones import create_backbone
from pretrain.training.recipe import resolve

# Code defaults of main_dino.py, and what the released ViTs changed (README and section 3 of the paper).
DINO = {
    "views.global_size": 224, "views.local": 10, "views.local_size": 96, "views.global_scale": (0.25, 1.0),
    "views.local_scale": (0.05, 0.25), "views.flip": 0.5, "views.jitter": 0.8, "views.brightness": 0.4,
    "views.contrast": 0.4, "views.saturation": 0.2, "views.hue": 0.1, "views.gray": 0.2,
    "views.blur": (1.0, 0.1, 0.5), "views.blur_radius": (0.1, 2.0), "views.solarize": (0.0, 0.2, 0.0),
    "model.drop_path": 0.1, "model.init": "dino", "model.pos_interpolation": "dino",
    "head.layers": 3, "head.hidden": 2048, "head.bottleneck": 256, "head.batch_norm": False,
    "head.activation": "gelu", "head.num_prototypes": 65536, "head.prototypes": "weight_norm",
    "target.centring": "logit", "target.momentum": 0.9, "target.temperature": 0.07,
    "target.warmup_temperature": 0.04, "target.warmup_epochs": 30, "target.warmup_unit": "epoch",
    "objective.loss": "cross_entropy", "objective.student_temperature": 0.1, "objective.predictor": False,
    "teacher.kind": "ema", "teacher.momentum": 0.996, "teacher.momentum_end": 1.0,
    "optim.name": "adamw", "optim.batch_size": 1024, "optim.lr": 5e-4, "optim.lr_scaling": "linear",
    "optim.min_lr": 1e-6, "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4,
    "optim.clip": 3.0, "optim.clip_scope": "tensor", "optim.freeze_last_layer_epochs": 1,
    "optim.freeze_last_layer_by": "gradient", "optim.layer_decay": 1.0, "optim.patch_embed_lr": 1.0,
    "schedule.warmup_epochs": 10, "schedule.steps_per_epoch": 0, "patch.weight": 0.0, "masks.kind": "none",
}  # fmt: skip
IBOT = {
    **DINO,
    "head.num_prototypes": 8192, "patch.weight": 1.0, "patch.head": "shared", "patch.center_tokens": "all",
    "patch.centring": None, "patch.temperature": None, "objective.image_weight": 1.0,
    "masks.kind": "block", "masks.ratio": (0.0, 0.3), "masks.variance": (0.0, 0.2), "masks.start_epoch": 0,
    "masks.aspect": (0.3, 1 / 0.3), "masks.views": (0, 1),
}  # fmt: skip
DINOV2 = {
    **DINO,
    "views.local": 8, "views.global_scale": (0.32, 1.0), "views.local_scale": (0.05, 0.32),
    "views.blur": (0.0, 0.9, 0.5), "views.blur_kind": "gaussian",
    "model.name": "vit_large_patch16_224", "model.kwargs": {"init_values": 1e-5}, "model.init": "timm",
    "model.drop_path": 0.3, "model.drop_path_uniform": True, "model.drop_path_subset": True, "model.mlp": "timm",
    "head.train_magnitude": True, "target.warmup_unit": "step", "regularizer.koleo": 0.1,
    "patch.weight": 1.0, "patch.head": "shared", "patch.center_tokens": "masked",
    "masks.kind": "dinov2", "masks.probability": 0.5, "masks.ratio": (0.1, 0.5),
    "teacher.momentum": 0.992,
    "optim.batch_size": 2048, "optim.lr": 4e-3, "optim.lr_scaling": "sqrt", "optim.layer_decay": 0.9,
    "optim.patch_embed_lr": 0.2, "optim.clip_scope": "module", "optim.freeze_last_layer_by": "rate",
    "schedule.epochs": 100, "schedule.steps_per_epoch": 1250, "schedule.warmup_epochs": 10,
}  # fmt: skip
DINOV2_LARGE = {
    **DINOV2,
    "views.local_size": 98, "model.drop_path": 0.4, "model.mlp": "swiglu", "target.centring": "sinkhorn",
    "target.iterations": 3, "head.num_prototypes": 131072, "head.bottleneck": 384, "patch.head": "separate",
    "patch.bottleneck": 256, "teacher.momentum": 0.994, "optim.lr": 2e-4, "optim.batch_size": 3072,
    "optim.weight_decay_end": 0.2, "optim.layer_decay": 1.0, "schedule.epochs": 500, "schedule.warmup_epochs": 80,
    "model.name": "vit_large_patch14_224",
}  # fmt: skip
OFFICIAL = {
    ("dino", "imagenet_vits16"): {
        **DINO, "model.name": "vit_small_patch16_224", "head.train_magnitude": True, "schedule.epochs": 800,
    },
    ("dino", "imagenet_vitb16"): {
        **DINO, "model.name": "vit_base_patch16_224", "head.train_magnitude": False, "schedule.epochs": 400,
    },
    ("ibot", "imagenet_vits16"): {
        **IBOT, "model.name": "vit_small_patch16_224", "head.train_magnitude": True, "schedule.epochs": 800,
    },
    ("dinov2", "imagenet_vitl16"): DINOV2,
    ("dinov2", "imagenet22k_vitl14"): DINOV2_LARGE,
    ("dinov2", "imagenet22k_vitg14"): {
        **DINOV2_LARGE, "model.name": "vit_giant_patch14_dinov2", "model.kwargs": {"img_size": 224},
    },
}  # fmt: skip


@pytest.mark.parametrize(("method", "preset"), OFFICIAL)
def test_a_paper_scale_recipe_equals_the_official_configuration(method, preset):
    recipe = resolve(method, preset=preset)
    found = {}
    for key in OFFICIAL[method, preset]:
        section, name = key.split(".")
        found[key] = getattr(getattr(recipe, section), name)
    assert found == OFFICIAL[method, preset]


def test_the_official_peak_learning_rates():
    assert resolve("dino", preset="imagenet_vits16").optim.peak_lr == pytest.approx(5e-4 * 1024 / 256)
    assert resolve("dinov2", preset="imagenet_vitl16").optim.peak_lr == pytest.approx(4e-3 * 2**0.5)


def test_the_giant_of_dinov2_has_the_official_shape():
    with torch.device("meta"):
        backbone: Any = create_backbone(resolve("dinov2", preset="imagenet22k_vitg14").model)
    assert (backbone.embed_dim, len(backbone.blocks), backbone.blocks[0].attn.num_heads) == (1536, 40, 24)
    assert backbone.blocks[0].mlp.fc1.weight.shape == (8192, 1536) and backbone.patch_embed.grid_size == (16, 16)
    assert backbone.blocks[0].ls1.gamma.shape == (1536,)
