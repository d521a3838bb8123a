"""Features of a data set from a frozen backbone: extracted once, cached under everything they depend on.

What a suite can ask for:

    cls          the backbone's pooled features [D]: CLS after the final norm for ViTs
    cls+avg      CLS and the mean patch token of the last block [2 D]
    dino         DINO's choice for linear classification (appendix F.2): CLS of the last 4 blocks for ViTs narrower than
                 768, else CLS and mean patch token of the last block; pooled features for other backbones
    last, avgpool  CLS of the last n blocks, oldest first, then the mean patch token of the last block (iBOT, DINOv2;
                 equal to DINO's order for n = 1, the only n for which its avgpool works)

Shapes: N images, B batch, D features.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pretrain.data.datasets import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import feature_dim, has_patch_tokens, last_tokens
from pretrain.models.checkpoint import LoadedModel
from suites.cache import Entry, FeatureCache, content_key
from suites.protocols.protocol import Split
from suites.suite import Feature, LastBlocks

Precision = Literal["fp32", "bf16"]
Progress = Callable[[str, int, int], None]
"""Called with (what, images done, images in all)."""
FORMAT = 1
"""Raised when the same inputs would give other features."""


@dataclass
class Features:
    """Features of one split."""

    cls: Tensor
    """[N, D] float32."""
    labels: Tensor | None
    index: Tensor
    """[N]: number of the image in its data set."""
    from_cache: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    """Where and how they were computed: device, torch, seconds."""

    def split(self) -> Split:
        """As the protocols take it; without labels, an empty tensor."""
        labels = torch.empty(0, dtype=torch.long) if self.labels is None else self.labels
        return Split(self.cls, labels, self.index)


def extract(
    model: LoadedModel,
    images: ImageSet,
    transform: EvalTransform,
    feature: Feature = "cls",
    *,
    cache: FeatureCache | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features [N, D] of all images, from the cache when they are there.

    Args:
        workers: Processes that decode image files; None = one per core for large sets, none for small ones.

    Raises:
        DinobenchError: a feature is not finite; the message names the checkpoint and the image.
        UsageError: a feature the backbone does not have.
    """
    wanted = resolve_feature(feature, model.backbone)

    def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
        started = time.monotonic()
        number = default_workers(len(images)) if workers is None else workers
        batches = image_batches(images, transform, batch_size, number)
        values = _forward(model.backbone, batches, wanted, device, precision, progress, images)
        _check_finite(values, model, images)
        seconds = f"{time.monotonic() - started:.3f}"
        return {"features": values}, {"device": device, "torch": torch.__version__, "seconds": seconds}

    if cache is None:
        entry = Entry(*compute(), from_cache=False)
    else:
        entry = cache.get_or_compute(feature_key(model, images, transform, wanted, precision), compute)
    labels = None if images.labels is None else images.labels.cpu()
    return Features(entry.tensors["features"], labels, torch.arange(len(images)), entry.from_cache, entry.metadata)


def feature_key(
    model: LoadedModel,
    images: ImageSet,
    transform: EvalTransform,
    wanted: LastBlocks | None,
    precision: Precision,
) -> str:
    """Key over backbone weights, architecture, data set content, transform, layers and precision."""
    return content_key(
        format=FORMAT,
        weights=model.provenance["weights_sha256"],
        architecture=model.provenance.get("model"),
        dataset=images.fingerprint,
        transform=transform.fingerprint(),
        layers=None if wanted is None else wanted.model_dump(),
        precision=precision,
    )


def resolve_feature(feature: Feature, backbone: nn.Module) -> LastBlocks | None:
    """The layers that a feature means for this backbone; None stands for its pooled output."""
    if feature == "cls":
        return None
    if feature == "dino":
        if not has_patch_tokens(backbone):
            return None
        return LastBlocks(last=4) if feature_dim(backbone) < 768 else LastBlocks(last=1, avgpool=True)
    blocks = LastBlocks(last=1, avgpool=True) if isinstance(feature, str) else feature
    if blocks.avgpool and not has_patch_tokens(backbone):
        raise UsageError(f"feature {feature!r} needs patch tokens, {type(backbone).__name__} has none: use cls")
    return blocks


def describe_feature(wanted: LastBlocks | None) -> str:
    """For receipts: `pooled`, `cls of last 4 blocks`, ..."""
    if wanted is None:
        return "pooled"
    blocks = "block" if wanted.last == 1 else f"{wanted.last} blocks"
    return f"cls of last {blocks}" + (" + mean patch of last block" if wanted.avgpool else "")


def image_batches(images: ImageSet, transform: EvalTransform, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Transformed images [B, 3, h, w]: sets in memory in whole batches, files one by one through PIL (in `workers`)."""
    if images.source.pixels is not None and images.array is not None:
        for block in images.array.split(batch_size):
            yield transform.batch(block)
        return
    yield from DataLoader(_Decoded(images, transform), batch_size, num_workers=workers)


def default_workers(num_images: int) -> int:
    """One process per usable core; starting them is not worth it below some thousand images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if num_images >= 5000 and cores > 1 else 0


class _Decoded(Dataset[Tensor]):
    def __init__(self, images: ImageSet, transform: EvalTransform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.images.image(i))


def _forward(
    backbone: nn.Module,
    batches: Iterator[Tensor],
    wanted: LastBlocks | None,
    device: str,
    precision: Precision,
    progress: Progress | None,
    images: ImageSet,
) -> Tensor:
    backbone = backbone.to(device).eval()
    autocast: Any = nullcontext()
    if precision == "bf16":
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    parts: list[Tensor] = []
    done = 0
    with torch.inference_mode(), autocast:
        for batch in batches:
            x = batch.to(device, non_blocking=True)
            parts.append((backbone(x) if wanted is None else _tokens(backbone, x, wanted)).float().cpu())
            done += len(batch)
            if progress is not None:
                progress(f"features of {images.name} {images.split}", done, len(images))
    return torch.cat(parts).clone()  # a plain tensor: inference tensors cannot be used everywhere


def _tokens(backbone: nn.Module, x: Tensor, wanted: LastBlocks) -> Tensor:
    """Images [B, 3, h, w] -> [B, (n + avgpool) * D]."""
    layers = last_tokens(backbone, x, wanted.last)
    parts = [cls for cls, _ in layers]
    patches = layers[-1][1]
    if wanted.avgpool and patches is not None:
        parts.append(patches.mean(1))
    return torch.cat(parts, dim=1)


def _check_finite(values: Tensor, model: LoadedModel, images: ImageSet) -> None:
    bad = ~torch.isfinite(values).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise DinobenchError(
            f"the features of {model.provenance.get('path', 'this network')} are not finite for {int(bad.sum())} of "
            f"{len(values)} images of {images.name} {images.split} (first: image {first}): the weights of this "
            "checkpoint are broken or overflow; evaluate an earlier checkpoint or precision fp32"
        )
