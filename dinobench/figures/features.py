"""Patch tokens as colours: the first three principal components over all given images (DINOv2, Figure 1).

The tokens of the last block, after the final norm, of all images together are centred and projected on their first
three principal axes; each component is brought to [0, 1] between its 1st and 99th percentile and becomes red, green and
blue. The sign of an axis has no meaning: its largest loading is made positive, so that a picture can be drawn again.

Shapes: I images, rows x columns = N patches of an image, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinobench import plots
from dinobench.figures.drawing import Drawing
from dinobench.figures.inputs import Picture, Subject, need_patches
from pretrain.errors import UsageError
from pretrain.models.backbones import last_tokens

PAIRS_PER_ROW = 4
PERCENTILES = (0.01, 0.99)


def draw_features(subject: Subject, pictures: Sequence[Picture]) -> Drawing:
    """Each image beside the colours of its patches.

    Raises:
        UsageError: the backbone has no patch tokens, or the images have fewer than four patches together.
    """
    images = [subject.pixels(picture.image) for picture in pictures]
    colours, explained = principal_colours([patch_grid(subject, x) for x in images])
    columns = min(len(pictures), PAIRS_PER_ROW)
    height = max(x.shape[1] / x.shape[2] for x in images)
    figure = plots.new_figure(-(-len(pictures) // columns), 2 * columns, (1.8, 1.8 * height + 0.35), grid=False)
    for number, (picture, x, colour) in enumerate(zip(pictures, images, colours, strict=True)):
        left, right = figure.axes[2 * number : 2 * number + 2]
        plots.show(left, subject.shown(x))
        left.set_title(picture.label, fontsize="small")
        plots.show(right, colour)
        right.set_title(f"{colour.shape[0]} x {colour.shape[1]} patches", fontsize="small")
    shares = " + ".join(f"{100 * share:.0f} %" for share in explained)
    plots.set_title(
        figure,
        f"Patch tokens of the last block, principal components 1 to 3 as red, green, blue\n{subject.title}; "
        f"{shares} of the variance over {len(pictures)} image{'s' if len(pictures) > 1 else ''}",
    )
    facts = {"images": [picture.label for picture in pictures], "explained_variance": explained}
    stem = ("features", pictures[0].name) if len(pictures) == 1 else ("features",)
    return Drawing(subject.stem(*stem), figure, facts)


@torch.inference_mode()
def patch_grid(subject: Subject, x: Tensor) -> Tensor:
    """Patch tokens of x [3, h, w] after the last block, [rows, columns, D] on the CPU.

    Raises:
        UsageError: the backbone has no patch tokens.
    """
    need_patches(subject, "colours of patches")
    vit: Any = subject.model.backbone
    patches = last_tokens(vit, x[None])[-1][1]
    assert patches is not None
    height, width = vit.patch_embed.patch_size
    return patches[0].float().cpu().reshape(x.shape[1] // height, x.shape[2] // width, -1)


def principal_colours(grids: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Tokens [rows, columns, D] of I images -> colours [rows, columns, 3] in [0, 1], and the variance shares.

    Raises:
        UsageError: fewer than four tokens have no three principal components.
    """
    tokens = torch.cat([grid.flatten(0, 1) for grid in grids]).double()
    if len(tokens) < 4:
        raise UsageError(
            f"three principal components need at least 4 patches, found {len(tokens)}: "
            "give more images or a larger --size"
        )
    centred = tokens - tokens.mean(0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    components = centred @ axes.T
    levels = torch.tensor(PERCENTILES, dtype=components.dtype)
    low, high = torch.quantile(components, levels, dim=0)
    colours = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    variance = singular**2
    shares = (variance[:3] / variance.sum().clamp_min(1e-300)).tolist()
    parts = colours.split([grid.shape[0] * grid.shape[1] for grid in grids])
    return [part.view(*grid.shape[:2], 3) for part, grid in zip(parts, grids, strict=True)], shares
