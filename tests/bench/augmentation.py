"""Multi-crop: the batched views against one image at a time with PIL, per image and the same crops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from official import Reference
from pretrain.data.views import ViewsConfig
from pretrain.data.views_batched import BatchedViews
from pretrain.data.views_pil import PilViews
from report import Report, Row
from timing import take_turns

TARGET = 8.0


def measure(
    report: Report, *, reference: Reference | None, pixels: Tensor, config: ViewsConfig, rounds: int, device: str
) -> None:
    """One row for pixels uint8 [B, 3, H, W]: PIL against the batch."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    batched, index = BatchedViews(config, 0), torch.arange(len(pixels), device=device)
    on_device = pixels.to(device)
    single: Callable[[Image.Image], list[Tensor]] = (
        reference.augmentation(config.global_size, config.local_size, config.local)
        if reference
        else PilViews(config, 0).draw
    )

    def opponent() -> list[Tensor]:
        return [torch.stack(views) for views in zip(*map(single, images), strict=True)]

    def ours() -> list[Tensor]:
        return batched(on_device, None, index, 0)

    gate = _gate(opponent(), ours())
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


def _gate(expected: list[Tensor], found: list[Tensor]) -> dict[str, float]:
    """Same shapes, and per view the same mean and spread: the draws differ, their distributions do not."""
    shapes = [tuple(view.shape) for view in expected], [tuple(view.shape) for view in found]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"the views differ in shape, nothing was timed: {shapes}")
    means = [(a.mean() - b.mean().cpu()).abs().item() for a, b in zip(expected, found, strict=True)]
    stds = [(a.std() - b.std().cpu()).abs().item() for a, b in zip(expected, found, strict=True)]
    if max(means) > 0.5 or max(stds) > 0.5:
        raise SystemExit(
            f"the views differ in mean by {max(means):.2f}, in spread by {max(stds):.2f}: nothing was timed"
        )
    return {"largest_difference_of_means": max(means), "largest_difference_of_stds": max(stds)}
