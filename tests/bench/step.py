"""The training step, augmentation included: ours against the official loop on the same images, network and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from official import OfficialTraining, Reference
from pretrain.data.datasets import DataConfig, ImageSet
from pretrain.data.loader import Batch, Loader
from pretrain.data.views import ViewsConfig
from pretrain.methods.dino import Dino
from pretrain.models.backbones import ModelConfig, patch_grid
from pretrain.models.heads import HeadConfig
from pretrain.training.optim import OptimConfig
from pretrain.training.recipe import MethodConfig, Recipe
from pretrain.training.runtime import Runtime, RuntimeConfig
from pretrain.training.schedules import Plan, ScheduleConfig
from pretrain.training.teacher import TeacherConfig
from pretrain.training.trainer import Trainer
from report import Report, Row
from timing import take_turns

TARGETS = {"fp32": 1.3, "bf16": 1.5}
"""Times faster than the official loop at the same precision."""
LARGE_TARGET = 1.5
"""The same from 65536 prototypes on, where the loss weighs more."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both sides train: a small ViT that two cores can carry, with the official recipe's constants."""

    prototypes: int = 1024
    batch: int = 32
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """fp64 only for equality checks."""
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
    learning_rate: float = 1e-4
    weight_decay: float = 0.04
    momentum: float = 0.996

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
            head=HeadConfig(hidden=self.hidden, bottleneck=self.bottleneck, num_prototypes=self.prototypes),
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


class OurTraining:
    """Our loop without logging, checkpoints and progress, which happen between steps."""

    def __init__(self, recipe: Recipe, images: ImageSet):
        runtime, batch_size = Runtime.start(recipe.runtime), recipe.optim.batch_size
        self.trainer = Trainer(recipe, runtime, Plan(100, len(images) // batch_size))
        grid = patch_grid(self.trainer.method.backbone(), recipe.views.global_size)
        loader = Loader(
            images,
            recipe.views,
            batch_size=batch_size,
            seed=0,
            workers=0,
            device=runtime.device,
            masks=recipe.masks,
            grid=grid,
        )
        self.batches: Iterator[Batch] = loader.batches(0)

    @property
    def method(self) -> Dino:
        assert isinstance(self.trainer.method, Dino)
        return self.trainer.method

    def steps(self, count: int) -> None:
        """Whole steps, augmentation included."""
        for _ in range(count):
            self.trainer.step(next(self.batches), 0)


def measure(
    report: Report, *, reference: Reference | None, images: ImageSet, setting: Setting, rounds: int, units: int
) -> None:
    """One row: seconds per step of `setting.batch` images."""
    ours = OurTraining(setting.recipe(drop_path=0.1), images)
    contestants = {"ours": lambda: ours.steps(units)}
    gate: dict[str, float] = {}
    if reference:
        pictures = [images.image(i) for i in range(min(len(images), 16 * setting.batch))]
        gate = check_equal(reference, setting, images, pictures)
        official = OfficialTraining(reference, setting, pictures, drop_path=0.1)
        contestants = {"official": lambda: official.steps(units), **contestants}
    times = take_turns(contestants, rounds=rounds, units=units)
    described = {
        "K": setting.prototypes,
        "batch": setting.batch,
        "precision": setting.precision,
        "threads": torch.get_num_threads(),
        "device": setting.device,
    }
    target = LARGE_TARGET if setting.prototypes >= 65536 else TARGETS[setting.precision]
    report.add(Row("step", described, "step", times, gate, {"ours": target}))


def check_equal(
    reference: Reference, setting: Setting, images: ImageSet, pictures: list[Image.Image]
) -> dict[str, float]:
    """One step from the same weights on the same crops, no stochastic depth: loss, gradients and teacher agree.

    Raises:
        SystemExit: they do not; then no time is worth printing.
    """
    ours = OurTraining(setting.recipe(drop_path=0.0), images)
    official = OfficialTraining(reference, setting, pictures, drop_path=0.0)
    names = _copy_weights(official.student, ours.method.student)
    _copy_weights(official.teacher, ours.method.teacher)
    batch = next(ours.batches)
    loss = official.update(list(batch.views))
    ours.trainer.step(batch, 0)
    found = {
        "loss_difference": abs(loss - ours.method.health.sum_loss.item()) / abs(loss),
        "gradient_cosine": min(_gradient_cosines(official.student, ours.method.student, names)),
        "teacher_difference": max(_differences(official.teacher, ours.method.teacher, names)),
    }
    limit = LOSS_TOLERANCE[setting.precision]
    if found["loss_difference"] > limit or found["gradient_cosine"] < 0.999 or found["teacher_difference"] > 1e-6:
        raise SystemExit(f"our step is not the official step, nothing was timed: {found}")
    return found


def _copy_weights(source: nn.Module, target: nn.Module) -> list[str]:
    """Copy official weights into ours; returns the common names (they are the same: backbone.*, head.*)."""
    result = target.load_state_dict(source.state_dict(), strict=False)
    missing = [name for name in result.missing_keys if "weight_g" not in name]
    if missing or result.unexpected_keys:
        raise SystemExit(f"weights do not map: missing {missing}, unexpected {result.unexpected_keys}")
    return [name for name, _ in target.named_parameters()]


def _pairs(a: nn.Module, b: nn.Module, names: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    yield from ((first[name], second[name]) for name in names)


def _gradient_cosines(a: nn.Module, b: nn.Module, names: list[str]) -> list[float]:
    """Cosine between the gradients of each tensor, in float64 (clipping scales them alike)."""
    gradients = [(p.grad, q.grad) for p, q in _pairs(a, b, names) if p.grad is not None and q.grad is not None]
    return [nn.functional.cosine_similarity(p.double().flatten(), q.double().flatten(), 0).item() for p, q in gradients]


def _differences(a: nn.Module, b: nn.Module, names: list[str]) -> list[float]:
    return [(p - q).abs().max().item() for p, q in _pairs(a, b, names)]
