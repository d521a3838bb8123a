"""Multi-crop: the batched views against one image at a time with PIL, per image and the same crops."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from noise import noise_images
from official import Reference
from pretrain.data.views import ViewsConfig
from pretrain.data.views_batched import BatchedViews
from pretrain.data.views_pil import PilViews
from report import Report, Row
from session import Session
from timing import take_turns

TARGET = 8.0
GATE_IMAGES = 256
"""Images behind the comparison of means: the jitter moves those of single images by a third of a deviation."""


def run(session: Session) -> None:
    """DINO's views of 32-pixel images; on a GPU those of a training on ImageNet."""
    if session.on_gpu:
        pixels, config = noise_images(64, 256, 256), session.sizes()[0][1].recipe(64, "cpu", "fp32").views
    else:
        count = 8 if session.tiny else 64
        pixels = torch.stack([session.images.pixels(i) for i in range(count)])
        config = ViewsConfig(global_size=32, local=6, local_size=16)
    measure(
        session.report,
        reference=session.reference,
        pixels=pixels,
        config=config,
        rounds=session.rounds,
        device=session.device,
    )


def measure(
    report: Report, *, reference: Reference | None, pixels: Tensor, config: ViewsConfig, rounds: int, device: str
) -> None:
    """One row for pixels uint8 [B, 3, H, W]: PIL against the batch."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    batched, index = BatchedViews(config, 0), torch.arange(len(pixels), device=device)
    on_device, epochs = pixels.to(device), itertools.count()
    random.seed(0)
    torch.manual_seed(0)
    single: Callable[[Image.Image], list[Tensor]] = (
        reference.augmentation(config.global_size, config.local_size, config.local)
        if reference
        else PilViews(config, 0).draw
    )

    def opponent() -> list[Tensor]:
        return [torch.stack(views) for views in zip(*map(single, images), strict=True)]

    def ours() -> list[Tensor]:
        return batched(on_device, None, index, next(epochs))

    gate = _gate(_draws(opponent, len(pixels)), _draws(ours, len(pixels)))
    contestants = {"official, PIL" if reference else "PIL": opponent, "batched": ours}
    times = take_turns(contestants, rounds=rounds, units=len(pixels))
    setting = {
        "images": len(pixels),
        "source": f"{pixels.shape[-1]}px",
        "crops": f"2x{config.global_size}+{config.local}x{config.local_size}",
        "threads": torch.get_num_threads(),
        "device": device,
    }
    report.add(Row("augmentation", setting, "image", times, gate, {"batched": TARGET}))


def _draws(draw: Callable[[], list[Tensor]], images: int) -> list[Tensor]:
    """Views of at least GATE_IMAGES images, the set drawn again as often as that takes."""
    draws = [draw() for _ in range(math.ceil(GATE_IMAGES / images))]
    return [torch.cat(view) for view in zip(*draws, strict=True)]


def _gate(expected: list[Tensor], found: list[Tensor]) -> dict[str, float]:
    """Same shapes, and per view the same mean and spread: the draws differ, their distributions do not."""
    shapes = [tuple(view.shape) for view in expected], [tuple(view.shape) for view in found]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"the views differ in shape, nothing was timed: {shapes}")
    means = [(a.mean() - b.mean().cpu()).abs().item() for a, b in zip(expected, found, strict=True)]
    stds = [(a.std() - b.std().cpu()).abs().item() for a, b in zip(expected, found, strict=True)]
    if max(means) > 0.25 or max(stds) > 0.25:
        raise SystemExit(
            f"the views differ in mean by {max(means):.2f}, in spread by {max(stds):.2f}: nothing was timed"
        )
    return {"largest_difference_of_means": max(means), "largest_difference_of_stds": max(stds)}
