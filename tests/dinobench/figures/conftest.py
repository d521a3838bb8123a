"""A tiny ViT with prototypes in a checkpoint file, opened as the figures open it; and a look into a written picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from dinobench.figures.inputs import Subject, open_subject
from pretrain.models import checkpoint_file
from pretrain.models.backbones import ModelConfig, create_backbone, feature_dim
from pretrain.models.heads import HeadConfig, ProjectionHead

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
HEAD = {"hidden": 16, "bottleneck": 16, "num_prototypes": 12, "prototypes": "free"}


def write_checkpoint(
    path: Path,
    *,
    name: str = "vit_tiny_patch16_224",
    kwargs: dict[str, Any] = VIT,
    head: dict[str, Any] | None = HEAD,
    recipe: dict[str, Any] | None = None,
    **payload: Any,
) -> Path:
    """Student and teacher of different random weights; `recipe` adds sections, `payload` changes the rest."""
    model = ModelConfig(name=name, kwargs=kwargs, init="xavier" if kwargs else "timm")
    sections: dict[str, Any] = {
        "method": {"name": "dino"},
        "data": {"name": "digits"},
        "views": {},
        "model": model.model_dump(mode="json"),
        "head": None,
        "objective": {"student_temperature": 0.1},
    }
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = torch.nn.ModuleDict({"backbone": create_backbone(model)})
        if head is not None:
            config = HeadConfig.model_validate(head)
            sections["head"] = config.model_dump(mode="json")
            network["head"] = ProjectionHead(feature_dim(network["backbone"]), config)
        states.append(network.state_dict())
    content = {
        "format": checkpoint_file.FORMAT,
        "recipe": {**sections, **(recipe or {})},
        "step": 7,
        "images_seen": 448,
        "epoch": 1,
        "seed": 0,
        "teacher_temperature": 0.04,
        "student": states[0],
        "teacher": states[1],
    }
    checkpoint_file.save(path, {**content, **payload})
    return path


@pytest.fixture
def make_subject(tmp_path: Path) -> Callable[..., Subject]:
    def make(*, network: Any = "teacher", size: int | None = None, **changes: Any) -> Subject:
        path = write_checkpoint(tmp_path / "tiny.pt", **changes)
        return open_subject(path, network=network, size=size, device="cpu")

    return make


@pytest.fixture
def look() -> Callable[[list[Path]], np.ndarray]:
    """Checks the two files of a drawing and gives the pixels [h, w, 3] of the PNG."""

    def read(files: list[Path]) -> np.ndarray:
        png, svg = files
        assert (png.suffix, svg.suffix, png.stem) == (".png", ".svg", svg.stem)
        pixels = np.asarray(Image.open(png).convert("RGB"))
        assert (pixels[0, 0] == 255).all()  # a white page
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        root = ElementTree.parse(svg).getroot()
        assert root.tag.endswith("svg")
        assert sum(element.tag.endswith("}path") for element in root.iter()) > 20
        return pixels

    return read
