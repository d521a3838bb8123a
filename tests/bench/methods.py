"""iBOT, iBOT-vMF and DINOv2 against DINO: one network, the same images, crops and number of prototypes.

Each method brings from its recipe what makes it that method: masks, patch objective, kind of prototypes, centring,
regularisers and the scope of clipping. Sizes, learning rate and drop path are those of the setting.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from cost import compare, differences
from pretrain.data.datasets import ImageSet
from pretrain.data.masks import MaskConfig, Masks
from pretrain.models.patch_head import PatchConfig
from pretrain.training.recipe import MethodConfig, Recipe, resolve
from report import Report
from session import Session
from step import OurTraining, Setting, settings

PROTOTYPES = (1024, 8192)
"""8192: K of iBOT's recipes."""
METHODS = ("dino", "ibot", "ibot_vmf", "dinov2")
HEAD = ("prototypes", "train_magnitude", "normaliser")
"""Keys of the head that belong to a method; the others are sizes."""


def method_recipe(name: str, setting: Setting, drop_path: float) -> Recipe:
    """The recipe of a method at the sizes of the setting."""
    own, sizes = resolve(name, preset="imagenet_vits16"), setting.recipe(drop_path)
    sections = {key: getattr(own, key) for key in ("method", "masks", "patch", "target", "objective", "regularizer")}
    head = sizes.head.model_copy(update={key: getattr(own.head, key) for key in HEAD})
    optim = sizes.optim.model_copy(update={"clip_scope": own.optim.clip_scope})
    return sizes.model_copy(update={**sections, "head": head, "optim": optim})


def run(session: Session) -> None:
    """iBOT, iBOT-vMF and DINOv2 against DINO."""
    for setting in settings(session, PROTOTYPES):
        measure(session.report, images=session.images, setting=setting, rounds=session.rounds, units=session.steps)


def measure(report: Report, *, images: ImageSet, setting: Setting, rounds: int, units: int) -> None:
    """One row: a step of each method, the first of which is DINO."""
    gate = {
        f"{name}_{key}": value for name in METHODS[1:] for key, value in check_image_part(name, images, setting).items()
    }
    builders = {name: partial(OurTraining, method_recipe(name, setting, 0.1), images) for name in METHODS}
    compare(report, "methods", builders, setting=setting, described={}, gate=gate, rounds=rounds, units=units)


def check_image_part(name: str, images: ImageSet, setting: Setting) -> dict[str, float]:
    """With no patch masked the step is that of the same recipe without patch objective: for iBOT, DINO's.

    Raises:
        SystemExit: loss or gradients differ.
    """
    exact = dataclasses.replace(setting, precision="fp64")
    recipe = method_recipe(name, exact, drop_path=0.0)
    without = {"method": MethodConfig(name="dino"), "patch": PatchConfig(), "masks": MaskConfig()}
    plain, masked = OurTraining(recipe.model_copy(update=without), images), OurTraining(recipe, images)
    batch, other = next(plain.batches), next(masked.batches)
    assert other.masks is not None
    nothing = Masks.of(torch.zeros_like(other.masks.mask, device="cpu"))
    on_device = Masks(
        *(t.to(other.masks.mask.device) for t in (nothing.mask, nothing.index, nothing.weight)), nothing.counts
    )
    return differences(plain, masked, (batch, dataclasses.replace(other, masks=on_device)))
