"""What the prototypes of a checkpoint look like: their norms and precisions, how often each is used, and their images.

Each image goes to the prototype of highest logit, as in the suites of protocol `prototypes` (no centring, temperature
of the checkpoint). The images shown beside a prototype are the nearest ones in the head's space, by cos(z, w_k).

Shapes: N images, D features, P bottleneck, K prototypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dinobench import plots
from dinobench.figures.drawing import Drawing
from dinobench.figures.inputs import Subject, spread
from pretrain.data.images import ImageSet
from pretrain.errors import DinobenchError
from pretrain.models.heads import ProjectionHead
from pretrain.objectives import prototype_usage as usage
from suites.cache import FeatureCache
from suites.features import extract
from suites.protocols.prototypes import assign

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 8
"""Most used prototypes in the grid, and nearest images of each."""


def draw_prototypes(subject: Subject, images: ImageSet, limit: int = 10_000) -> list[Drawing]:
    """Norms and usage over at most `limit` images, and the nearest images of the most used prototypes.

    Raises:
        DinobenchError: the checkpoint has no prototypes, or a vMF head but no temperature.
    """
    head, temperature = need_prototypes(subject)
    images = spread(images, limit)
    head.to(subject.device)
    found = extract(subject.model, images, subject.transform, cache=FeatureCache(), device=subject.device)
    images, features = images.subset(found.index), found.cls.float()
    assigned, _ = assign(head, features, temperature, subject.device)
    counts = usage.usage_counts(assigned, head.last_layer.num)
    return [_draw_usage(subject, head, counts, images), _draw_nearest(subject, head, features, counts, images)]


def need_prototypes(subject: Subject) -> tuple[ProjectionHead, float]:
    """The head of a checkpoint and the temperature at which images are assigned.

    Raises:
        DinobenchError: the checkpoint has no prototypes, or a vMF head but no temperature.
    """
    model = subject.model
    path = model.provenance["path"]
    if model.head is None or model.prototypes is None:
        raise DinobenchError(f"{path} holds a backbone without prototypes: take a checkpoint that has its head")
    if model.temperature is None and model.normaliser != "none":
        raise DinobenchError(f"{path} does not state its temperature, on which the logits of its vMF head depend")
    # without normaliser the order of the logits is the same at every temperature
    return model.head, model.temperature or 1.0


@torch.inference_mode()
def nearest_images(head: ProjectionHead, features: Tensor, chosen: Tensor, number: int, device: str) -> Tensor:
    """The `number` images of highest cos(z, w_k) for the prototypes `chosen` [C], from features [N, D]: [C, number]."""
    directions = F.normalize(head.last_layer.vectors()[chosen.to(device)].float(), dim=1)
    blocks = [(head.project(block.to(device)).float() @ directions.T).cpu() for block in features.split(512)]
    return torch.cat(blocks).topk(min(number, len(features)), dim=0).indices.T


def _draw_usage(subject: Subject, head: ProjectionHead, counts: Tensor, images: ImageSet) -> Drawing:
    norms = head.last_layer.norms().detach().float().cpu()
    temperature = subject.model.temperature
    figure = plots.new_figure(1, 3 if temperature else 2)
    plots.histogram(figure.axes[0], norms.tolist())
    figure.axes[0].set(title="norm of the prototypes", xlabel=r"$\|w_k\|$", ylabel="prototypes")
    if temperature:
        plots.histogram(figure.axes[1], usage.kappa(norms, temperature).tolist())
        title = rf"precision at $\tau$ = {temperature:.3g}"
        figure.axes[1].set(title=title, xlabel=r"$\kappa_k = \|w_k\| / \tau$", ylabel="prototypes")
    used = int(usage.num_used(counts))
    _show_usage(figure.axes[-1], counts, used)
    plots.set_title(
        figure,
        f"{used} of {len(counts)} prototypes are used by {len(images)} images of {images.name} {images.split}\n"
        f"{subject.title}",
    )
    facts = {
        "images": len(images),
        "prototypes": len(counts),
        "used": used,
        "perplexity": usage.perplexity(counts).item(),
        "counts": counts.sort(descending=True).values[:used].tolist(),
    }
    return Drawing(subject.stem("prototypes_usage"), figure, facts)


def _show_usage(axes: Axes, counts: Tensor, used: int) -> None:
    """Counts [K], largest first, beside their mean; dead prototypes have no place on the log axis."""
    falling = counts.sort(descending=True).values[:used].tolist()
    axes.step(range(1, used + 1), falling, where="mid", color=plots.COLOURS[0], linewidth=1.8)
    even = counts.sum().item() / len(counts)
    axes.axhline(even, color=plots.COLOURS[1], linestyle="--", linewidth=1.2, label=f"even use: {even:.3g} images")
    if used < len(counts):
        axes.axvline(
            used, color=plots.COLOURS[6], linestyle=":", linewidth=1.2, label=f"without image: {len(counts) - used}"
        )
    axes.set(title="usage", xlabel="prototypes, most used first", ylabel="images", yscale="log")
    axes.set_xlim(0, len(counts) + 1)
    axes.legend(fontsize="small")


def _draw_nearest(
    subject: Subject, head: ProjectionHead, features: Tensor, counts: Tensor, images: ImageSet
) -> Drawing:
    order = counts.argsort(descending=True, stable=True)
    chosen = order[: min(SHOWN, int(usage.num_used(counts)))]
    nearest = nearest_images(head, features, chosen, SHOWN, subject.device)
    figure = plots.new_figure(len(chosen), nearest.shape[1], (1.1, 1.1), grid=False)
    norms = head.last_layer.norms().detach().float().cpu()
    rows = []
    for row, (prototype, neighbours) in enumerate(zip(chosen.tolist(), nearest.tolist(), strict=True)):
        panels = figure.axes[row * len(neighbours) : (row + 1) * len(neighbours)]
        for axes, number in zip(panels, neighbours, strict=True):
            plots.show(axes, subject.shown(subject.transform(images.image(number))))
        text = f"prototype {prototype}\n{int(counts[prototype])} images\nnorm {norms[prototype]:.2f}"
        panels[0].text(-0.15, 0.5, text, transform=panels[0].transAxes, ha="right", va="center", fontsize="small")
        rows.append({"prototype": prototype, "images": int(counts[prototype]), "nearest": neighbours})
    plots.set_title(
        figure,
        f"Nearest images of the {len(chosen)} most used prototypes\n{subject.title}; {images.name} {images.split}",
    )
    return Drawing(subject.stem("prototypes_nearest"), figure, {"rows": rows})
