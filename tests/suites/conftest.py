"""A tiny randomly initialised network and small made-up image sets, shared by the tests of the suites."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.data.images import ArraySource, ImageSet, array_fingerprint
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim
from pretrain.models.checkpoint import LoadedModel, weights_sha256
from pretrain.models.heads import HeadConfig, ProjectionHead
from suites.protocols.protocol import Split

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def build_model(seed: int = 0, *, kind: str = "free", **model: object) -> LoadedModel:
    config = ModelConfig.model_validate({"name": "vit_tiny_patch16_224", "kwargs": TINY, "init": "xavier", **model})
    head_config = HeadConfig.model_validate({"hidden": 32, "bottleneck": 16, "num_prototypes": 24, "prototypes": kind})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone(config).eval()
        head = ProjectionHead(feature_dim(backbone), head_config).eval()
        if kind == "free":
            with torch.no_grad():
                head.last_layer.weight.mul_(torch.rand(24, 1) + 0.5)
    provenance = {
        "path": "runs/tiny/checkpoints/last.pt",
        "sha256": "0" * 64,
        "network": "teacher",
        "weights_sha256": weights_sha256(backbone),
        "model": config.model_dump(mode="json"),
    }
    return LoadedModel(backbone, head, head.last_layer, "none", 0.04, provenance)


def build_images(
    num: int = 60, num_classes: int = 3, *, split: str = "train", seed: int = 0, labelled: bool = True
) -> ImageSet:
    """Noisy gray images [num, 1, 16, 16] whose brightness pattern tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    pattern = torch.randint(0, 200, (num_classes, 1, 16, 16), generator=torch.Generator().manual_seed(7))
    noise = torch.randint(0, 56, (num, 1, 16, 16), generator=generator)
    pixels = (pattern[labels] + noise).to(torch.uint8)
    given = labels if labelled else None
    classes = tuple(f"class{i}" for i in range(num_classes)) if labelled else ()
    fingerprint = array_fingerprint(pixels, given)
    return ImageSet("patterns", split, fingerprint, ArraySource(pixels), labels=given, classes=classes)


@pytest.fixture
def official_vit() -> Callable[[dict[str, np.ndarray]], nn.Module]:
    """A network with the weights `sd.*` of a golden file, by the official rule for positions."""

    def build(reference: dict[str, np.ndarray]) -> nn.Module:
        state = {key.removeprefix("sd."): torch.from_numpy(a) for key, a in reference.items() if key.startswith("sd.")}
        width, depth = state["norm.weight"].numel(), 1 + max(int(k.split(".")[1]) for k in state if "blocks." in k)
        patch = state["patch_embed.proj.weight"].shape[-1]
        side = patch * round((state["pos_embed"].shape[1] - 1) ** 0.5)
        # 3 heads: the file of dino_vit says so, and no other number gives the features of the other files.
        kwargs = {"img_size": side, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": 3}
        backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=kwargs, pos_interpolation="dino"))
        backbone.load_state_dict(state)
        return backbone.eval()

    return build


@pytest.fixture
def model() -> LoadedModel:
    return build_model()


@pytest.fixture
def make_model() -> Callable[..., LoadedModel]:
    return build_model


@pytest.fixture
def make_images() -> Callable[..., ImageSet]:
    return build_images


@pytest.fixture
def make_split() -> Callable[..., Split]:
    """Gaussian classes [num, 8], `spread` apart; the same classes for every seed."""

    def make(num: int = 90, num_classes: int = 3, *, seed: int = 0, spread: float = 3.0) -> Split:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(num) % num_classes
        means = spread * torch.randn(num_classes, 8, generator=torch.Generator().manual_seed(99))
        return Split(means[labels] + torch.randn(num, 8, generator=generator), labels, torch.arange(num))

    return make
