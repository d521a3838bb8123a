"""What is trained in a benchmark: real presets of the project, and one of them reduced to what a CPU carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from pretrain.data.loader import Batch
from pretrain.training.recipe import Recipe, resolve

NUM_BATCHES = 4
"""Batches that a timed step goes round."""
CONSTANT = ("schedule.warmup_epochs=0", "optim.freeze_last_layer_epochs=0")
"""So that the first step is a step like any other."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A network with its crops and prototypes."""

    batches: tuple[int, ...]
    """Images per step."""
    preset: str = "imagenet_vits16"
    overrides: tuple[str, ...] = ()

    def recipe(self, batch: int, device: str, precision: str, overrides: Sequence[str] = ()) -> Recipe:
        """DINO at this size."""
        runtime = (f"runtime.device={device}", f"runtime.precision={precision}", f"optim.batch_size={batch}")
        return resolve("dino", preset=self.preset, overrides=[*CONSTANT, *runtime, *self.overrides, *overrides])


def _reduced(side: int, num_local: int, width: int, depth: int, hidden: int, prototypes: int) -> tuple[str, ...]:
    kwargs = f"{{img_size: {side}, patch_size: 4, embed_dim: {width}, depth: {depth}, num_heads: {width // 32}}}"
    return (
        f"model.kwargs={kwargs}",
        f"views.global_size={side}",
        f"views.local_size={side // 2}",
        f"views.local={num_local}",
        f"head.hidden={hidden}",
        f"head.bottleneck={hidden // 4}",
        f"head.num_prototypes={prototypes}",
    )


SIZES = {
    "vits16": Size((256, 64, 512)),
    "vitb16": Size((256, 64), "imagenet_vitb16"),
    "small": Size((32,), overrides=_reduced(32, 6, 128, 4, 512, 4096)),
    "tiny": Size((4,), overrides=_reduced(16, 2, 32, 2, 64, 64)),
}
"""vits16 and vitb16: 2 x 224 + 10 x 96 pixels, 65536 prototypes."""


def random_batches(recipe: Recipe, device: str) -> list[Batch]:
    """Batches of augmented images in the device's memory: normal values, as normalised pixels have, never zeros."""
    generator = torch.Generator(device).manual_seed(0)
    batch = recipe.optim.batch_size

    def view(side: int) -> torch.Tensor:
        return torch.randn(batch, 3, side, side, generator=generator, device=device)

    index = torch.arange(batch, device=device)
    return [Batch([view(v.size) for v in recipe.views.views], index, 0) for _ in range(NUM_BATCHES)]
