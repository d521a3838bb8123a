"""The training step, augmentation included: ours against the official loop on the same images, network and batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import nn

from apart import Apart
from gate import Expected
from official import OfficialTraining, Reference
from pretrain.data.datasets import DataConfig, ImageSet
from pretrain.data.loader import Batch, Loader
from pretrain.data.views import ViewsConfig
from pretrain.methods.dino import Dino
from pretrain.models.backbones import ModelConfig, create_backbone, patch_grid
from pretrain.models.heads import HeadConfig
from pretrain.models.positions import PositionalViT
from pretrain.training.optim import OptimConfig
from pretrain.training.recipe import MethodConfig, Recipe
from pretrain.training.runtime import Runtime, RuntimeConfig
from pretrain.training.schedules import Plan, ScheduleConfig
from pretrain.training.teacher import TeacherConfig
from pretrain.training.trainer import Trainer
from report import Row
from session import Session
from timing import take_turns

PROTOTYPES = (1024, 4096, 65536)
TARGETS = {("fp32", "fp32"): 1.3, ("bf16", "bf16"): 1.5, ("bf16", "fp32"): 2.4}
"""(Our precision, the official loop's) -> times faster."""
LARGE_TARGET = 1.5
"""The same from 65536 prototypes on, where the loss weighs more."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both sides train: a small ViT that two cores can carry, with the official recipe's constants."""

    prototypes: int = 1024
    batch: int = 32
    precision: Literal["fp32", "bf16", "fp64", "fp16"] = "fp32"
    """fp64 only for equality checks, fp16 only for the official code."""
    device: str = "cpu"
    global_size: int = 32
    local_size: int = 16
    num_local: int = 6
    patch: int = 4
    dim: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int = 512
    bottleneck: int = 128
    train_magnitude: bool = False
    learning_rate: float = 1e-4
    weight_decay: float = 0.04
    momentum: float = 0.996

    @classmethod
    def of(cls, recipe: Recipe, precision: str) -> Setting:
        """What the official code needs to do the first step of a recipe, a ViT's."""
        with torch.device("meta"):
            vit = create_backbone(recipe.model)
        assert isinstance(vit, PositionalViT)
        return cls(
            prototypes=recipe.head.num_prototypes,
            batch=recipe.optim.batch_size,
            precision=precision,
            device=recipe.runtime.device,
            global_size=recipe.views.global_size,
            local_size=recipe.views.local_size,
            num_local=recipe.views.local,
            patch=vit.patch_embed.patch_size[0],
            dim=vit.embed_dim,
            depth=len(vit.blocks),
            heads=vit.blocks[0].attn.num_heads,
            hidden=recipe.head.hidden,
            bottleneck=recipe.head.bottleneck,
            train_magnitude=recipe.head.train_magnitude,
            learning_rate=recipe.optim.peak_lr,
            weight_decay=recipe.optim.weight_decay,
            momentum=recipe.teacher.momentum,
        )

    def views(self) -> ViewsConfig:
        return ViewsConfig(global_size=self.global_size, local=self.num_local, local_size=self.local_size)

    def recipe(self, drop_path: float) -> Recipe:
        """DINO at these sizes."""
        kwargs = {
            "img_size": self.global_size,
            "patch_size": self.patch,
            "embed_dim": self.dim,
            "depth": self.depth,
            "num_heads": self.heads,
        }
        return Recipe(
            method=MethodConfig(name="dino"),
            data=DataConfig(),
            views=self.views(),
            model=ModelConfig(
                name="vit_tiny_patch16_224", kwargs=kwargs, drop_path=drop_path, pos_interpolation="dino"
            ),
            head=HeadConfig(
                hidden=self.hidden,
                bottleneck=self.bottleneck,
                num_prototypes=self.prototypes,
                train_magnitude=self.train_magnitude,
            ),
            # Schedules held constant and prototypes not frozen, as on the other side.
            optim=OptimConfig(
                batch_size=self.batch,
                lr=self.learning_rate * 256 / self.batch,
                min_lr=self.learning_rate,
                weight_decay=self.weight_decay,
                weight_decay_end=self.weight_decay,
                freeze_last_layer_epochs=0,
            ),
            teacher=TeacherConfig(momentum=self.momentum, momentum_end=self.momentum),
            schedule=ScheduleConfig(epochs=100, warmup_epochs=0),
            runtime=RuntimeConfig(device=self.device, precision=self.precision),
        )


class OurStep:
    """Our trainer without data, logging, checkpoints and progress: the step and nothing else."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int = 1000):
        self.trainer = Trainer(recipe, Runtime.start(recipe.runtime), Plan(100, steps_per_epoch))

    @property
    def method(self) -> Dino:
        assert isinstance(self.trainer.method, Dino)
        return self.trainer.method

    @property
    def student(self) -> nn.Module:
        return self.method.student

    @property
    def teacher(self) -> nn.Module:
        return self.method.teacher

    def step(self, batch: Batch) -> None:
        self.trainer.step(batch, 0)

    def first_loss(self) -> float:
        return self.method.health.sum_loss.item()


class OurTraining(OurStep):
    """Our step with the views of a set of images."""

    def __init__(self, recipe: Recipe, images: ImageSet):
        super().__init__(recipe, len(images) // recipe.optim.batch_size)
        grid = patch_grid(self.method.backbone(), recipe.views.global_size)
        loader = Loader(
            images,
            recipe.views,
            batch_size=recipe.optim.batch_size,
            seed=0,
            workers=0,
            device=self.trainer.runtime.device,
            masks=recipe.masks,
            grid=grid,
        )
        self.batches: Iterator[Batch] = loader.batches(0)

    def steps(self, count: int) -> None:
        """Whole steps, augmentation included."""
        for _ in range(count):
            self.step(next(self.batches))


def settings(session: Session, prototypes: Sequence[int]) -> Iterator[Setting]:
    """Every combination of batch, number of prototypes and precision."""
    batches = session.options.batch or [8 if session.tiny else 32]
    numbers = session.options.prototypes or prototypes
    for batch, number, precision in itertools.product(batches, numbers, session.precisions):
        yield Setting(prototypes=number, batch=batch, precision=precision, device=session.device)


def run(session: Session) -> None:
    """Our training step, views included, against the official one at the same precision; and our bf16 against fp32."""
    for setting in settings(session, PROTOTYPES):
        measure(session, setting)
        if setting.precision == "bf16" and "fp32" in session.precisions:
            measure(session, setting, against="fp32")


def measure(session: Session, setting: Setting, against: Literal["fp32"] | None = None) -> None:
    """One row: seconds per step of `setting.batch` images.

    Args:
        against: precision of the official step where it is another.
    """
    reference, images, units = session.reference, session.images, session.steps
    opposite = dataclasses.replace(setting, precision=against or setting.precision)
    gate = check_equal(reference, setting, images) if reference else {}
    contestants = {"ours": _contestant(our_steps, setting, images, units=units)}
    if reference:
        official = _contestant(official_steps, opposite, images, reference.folder, units=units)
        contestants = {"official": official, **contestants}
    times = take_turns(contestants, rounds=session.rounds, units=units)
    for contestant in contestants.values():
        if isinstance(contestant, Apart):
            contestant.close()
    described = {
        "K": setting.prototypes,
        "batch": setting.batch,
        "precision": f"{setting.precision} (official {against})" if against else setting.precision,
        "threads": torch.get_num_threads(),
        "device": setting.device,
    }
    target = LARGE_TARGET if setting.prototypes >= 65536 else TARGETS[setting.precision, opposite.precision]
    session.report.add(Row("step", described, "step", times, gate, {"ours": target}))


def our_steps(setting: Setting, images: ImageSet) -> Callable[[int], None]:
    """Does steps of ours."""
    return OurTraining(setting.recipe(drop_path=0.1), images).steps


def official_steps(setting: Setting, images: ImageSet, folder: Path) -> Callable[[int], None]:
    """Does steps of the official code."""
    return OfficialTraining(Reference(folder), setting, pictures(setting, images), drop_path=0.1).steps


def pictures(setting: Setting, images: ImageSet) -> list[Image.Image]:
    """Images for some batches, as the official code takes them."""
    return [images.image(i) for i in range(min(len(images), 16 * setting.batch))]


def _contestant(
    build: Callable[..., Callable[[int], None]], setting: Setting, *arguments: object, units: int
) -> Callable[[], object]:
    """On a CPU apart, where the allocator of a process is part of what is measured; a GPU's memory is shared anyway."""
    if setting.device == "cpu":
        return Apart(build, setting, *arguments, units=units)
    return partial(build(setting, *arguments), units)


def check_equal(reference: Reference, setting: Setting, images: ImageSet) -> dict[str, float]:
    """One step of both from the same weights on the same crops: see gate.py.

    Raises:
        Unequal: they are not the same step.
    """
    ours = OurTraining(setting.recipe(drop_path=0.0), images)
    official = OfficialTraining(reference, setting, pictures(setting, images), drop_path=0.0)
    return Expected.of(official, next(ours.batches)).check(ours, setting.precision)
