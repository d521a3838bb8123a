"""What the CLS token attends to in the last block, per head (DINO, Figures 3 and 4; official visualize_attention.py).

The row of CLS in the softmaxed attention, over the patches only, drawn over the image without interpolation; below
it the smallest set of patches that holds a given share of the head's attention on patches (60 % in the paper):

    per head, weights sorted ascending and normalised to sum 1; kept where their cumulative sum exceeds 1 - mass

Shapes: H heads, rows x columns = N patches, h x w pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinobench import plots
from dinobench.figures.drawing import Drawing
from dinobench.figures.inputs import Picture, Subject, need_patches
from pretrain.errors import UsageError
from pretrain.models.backbones import last_self_attention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS_PER_ROW = 6


def draw_attention(subject: Subject, picture: Picture, mass: float = 0.6) -> Drawing:
    """One image: its attention maps above the masks that hold `mass` of each.

    Raises:
        UsageError: the backbone has no CLS token or no patches.
    """
    x = subject.pixels(picture.image)
    attention = cls_attention(subject, x)
    mask = mass_mask(attention, mass)
    wide = min(len(attention), HEADS_PER_ROW)
    size = (1.8, 1.8 * x.shape[1] / x.shape[2] + 0.35)
    figure = plots.new_figure(2 * math.ceil(len(attention) / wide), 1 + wide, size, grid=False)
    plots.show(figure.axes[0], subject.shown(x))
    figure.axes[0].set_title(f"{x.shape[2]} x {x.shape[1]} px", fontsize="small")
    _show_heads(figure, subject.shown(x).mean(2), attention, mask, wide)
    plots.set_title(
        figure,
        f"Attention of CLS in the last block: {picture.label}\n{subject.title}\n"
        f"above: bright = more attention, orange = fewest patches with {100 * mass:g} % of it",
    )
    share = attention.double() / attention.double().sum((1, 2), keepdim=True)
    heads = [
        {"head": number, "patches": int(kept.sum()), "mass": weights[kept].sum().item()}
        for number, (weights, kept) in enumerate(zip(share, mask, strict=True), start=1)
    ]
    facts = {"image": picture.label, "grid": list(attention.shape[1:]), "mass": mass, "heads": heads}
    return Drawing(subject.stem("attention", picture.name), figure, facts)


@torch.inference_mode()
def cls_attention(subject: Subject, x: Tensor) -> Tensor:
    """Attention of CLS to the patches of x [3, h, w] in the last block, [H, rows, columns] on the CPU.

    Raises:
        UsageError: the backbone has no CLS token or no patches.
    """
    need_patches(subject, "attention maps")
    vit: Any = subject.model.backbone
    if not vit.has_class_token:
        raise UsageError("attention maps need a CLS token; this ViT pools its patches")
    patch = vit.patch_embed.patch_size
    attention = last_self_attention(vit, x[None])[0, :, 0, vit.num_prefix_tokens :]
    return attention.float().cpu().reshape(len(attention), x.shape[1] // patch[0], x.shape[2] // patch[1])


def mass_mask(attention: Tensor, mass: float) -> Tensor:
    """The smallest set of patches holding at least the share `mass`: attention [H, rows, columns] -> bool, same shape.

    Raises:
        UsageError: `mass` is not in (0, 1).
    """
    if not 0 < mass < 1:
        raise UsageError(f"--mass is a share of the attention: expected a number between 0 and 1, found {mass:g}")
    weights = attention.double().flatten(1)
    ascending, order = weights.sort(dim=1)
    held = ascending.cumsum(1) / ascending.sum(1, keepdim=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter(1, order, held > 1 - mass).view_as(attention)


def _show_heads(figure: Figure, gray: Tensor, attention: Tensor, mask: Tensor, wide: int) -> None:
    """Map above mask of each head, `wide` heads beside each other; the first panel of each row stays free."""
    for head, (weights, kept) in enumerate(zip(attention, mask, strict=True)):
        block, place = divmod(head, wide)
        first = 2 * block * (1 + wide) + 1 + place
        above, below = figure.axes[first], figure.axes[first + 1 + wide]
        _show_map(above, gray, weights)
        above.set_title(f"head {head + 1}", fontsize="small")
        _show_mask(below, gray, kept)
        below.set_title(f"{int(kept.sum())} of {kept.numel()} patches", fontsize="small")


def _show_map(axes: Axes, gray: Tensor, weights: Tensor) -> None:
    """Weights [rows, columns] in colour over the image [h, w] in gray: all colour is attention."""
    plots.show(axes, gray, cmap="gray", vmin=0, vmax=1, extent=_box(gray))
    plots.show(axes, weights, cmap="viridis", vmin=0, extent=_box(gray), alpha=0.7)


def _show_mask(axes: Axes, gray: Tensor, mask: Tensor) -> None:
    """The patches of the mask [rows, columns] in one colour over the image [h, w] in gray."""
    from matplotlib.colors import to_rgb

    plots.show(axes, gray, cmap="gray", vmin=0, vmax=1, extent=_box(gray))
    colour = torch.tensor(to_rgb(plots.COLOURS[4])).expand(*mask.shape, 3)
    layer = torch.cat([colour, 0.65 * mask[..., None].float()], dim=2)
    plots.show(axes, layer, extent=_box(gray))


def _box(image: Tensor) -> tuple[float, float, float, float]:
    """Where an image [h, w] lies on its axes, so that a coarser one can be laid over it."""
    height, width = image.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)
