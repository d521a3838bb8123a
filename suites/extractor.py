"""A frozen network applied to single images of any shape, with the cache of suites.cache.

For protocols that need other features than one vector per image of a fixed transform. Images are decoded one by one;
images of one shape are then taken together, in batches bounded by their pixels.

Shapes: N images, B batch, D features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pretrain.errors import DinobenchError, UsageError
from pretrain.faults import workers_told
from pretrain.models.checkpoint import LoadedModel
from suites.cache import Entry, FeatureCache, content_key
from suites.memory import InHalves
from suites.passes import WORKER_ADVICE, Precision, Progress, default_workers
from suites.places import ImageFiles

FORMAT = 1
"""Raised when the same inputs would give other features."""
BATCH_PIXELS = 2**23
"""Pixels of a batch: 167 images of 224 x 224."""
PENDING_PIXELS = 2**26
"""Pixels kept while waiting for images of the same shape: 768 MiB."""


@dataclass(frozen=True)
class Extractor:
    """One network, for all images of a measurement."""

    model: LoadedModel
    device: str = "cpu"
    precision: Precision = "fp32"
    cache: FeatureCache | None = None
    batch_size: int = 256
    workers: int | None = None
    """Processes that decode images; None = one per core for large sets, none for small ones."""
    progress: Progress | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    """One entry per set of features, for the receipt: from_cache, device, torch, seconds."""

    def describe(
        self,
        images: ImageFiles,
        prepare: Callable[[Image.Image], Tensor],
        describe: Callable[[nn.Module, Tensor], Tensor],
        **made_by: Any,
    ) -> Tensor:
        """Descriptors [N, D] float32 of all images, from the cache when they are there.

        Args:
            prepare: PIL image -> input of the network [3, H, W]; runs in other processes.
            describe: backbone and inputs of one shape [B, 3, H, W] -> [B, D].
            made_by: plain values that say what these two do; part of the cache key.

        Raises:
            DinobenchError: an image cannot be decoded or does not fit in memory, a process that decodes was killed, or
                a descriptor is not finite.
            UsageError: the backbone does not take images of this shape.
        """

        def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
            started = time.monotonic()
            values = self._compute(images, prepare, describe)
            return {"features": values}, {**self._made_here(), "seconds": f"{time.monotonic() - started:.3f}"}

        key = content_key(
            format=FORMAT,
            weights=self.model.provenance["weights_sha256"],
            architecture=self.model.provenance.get("model"),
            images=images.fingerprint,
            made_by=made_by,
            precision=self.precision,
        )
        if self.cache is None:
            entry = Entry(*compute(), from_cache=False)
        else:
            entry = self.cache.get_or_compute(key, compute)
        self.log.append({"from_cache": entry.from_cache, **entry.metadata})
        return entry.tensors["features"]

    def apply(self, function: Callable[[nn.Module, Tensor], Any], inputs: Tensor) -> Any:
        """`function` of the backbone and inputs [B, 3, H, W], in this precision on this device; not cached.

        Raises:
            UsageError: the backbone does not take images of this shape.
        """
        if not self.log:
            self.log.append({"from_cache": False, **self._made_here()})
        return self._apply(self.model.backbone.to(self.device).eval(), function, inputs)

    def _made_here(self) -> dict[str, str]:
        return {"device": self.device, "torch": torch.__version__}

    def _apply(self, backbone: nn.Module, function: Callable[[nn.Module, Tensor], Any], inputs: Tensor) -> Any:
        autocast: Any = nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(torch.device(self.device).type, torch.bfloat16)
        try:
            with torch.inference_mode(), autocast:
                return function(backbone, inputs.to(self.device, non_blocking=True))
        except AssertionError as error:  # how timm's networks of fixed size refuse others
            height, width = inputs.shape[-2:]
            name = type(backbone).__name__
            raise UsageError(f"{name} does not take images of {height} x {width} px: {error}") from error

    def _compute(
        self,
        images: ImageFiles,
        prepare: Callable[[Image.Image], Tensor],
        describe: Callable[[nn.Module, Tensor], Tensor],
    ) -> Tensor:
        backbone = self.model.backbone.to(self.device).eval()
        found: dict[int, Tensor] = {}
        number = default_workers(len(images)) if self.workers is None else self.workers
        inputs = DataLoader(_Prepared(images, prepare), batch_size=None, num_workers=number)
        apply = InHalves()
        with workers_told(WORKER_ADVICE):
            for numbers, batch in group_by_shape(inputs, self.batch_size):
                values = apply(lambda part: self._apply(backbone, describe, part).float().cpu(), batch)
                found.update(zip(numbers, values, strict=True))
                if self.progress is not None:
                    self.progress(f"features of {images.benchmark} {images.role}", len(found), len(images))
        descriptors = torch.stack([found[i] for i in range(len(images))]).clone()
        bad = (~torch.isfinite(descriptors).all(1)).nonzero().flatten()
        if len(bad):
            raise DinobenchError(
                f"the features of {self.model.provenance.get('path', 'this network')} are not finite for {len(bad)} "
                f"of {len(images)} images of {images.benchmark} (first: {images.source.path(int(bad[0]))}): the "
                "weights are broken or overflow; evaluate an earlier checkpoint or precision fp32"
            )
        return descriptors


def group_by_shape(inputs: Any, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and stacked tensors [B, 3, H, W] of the tensors [3, H, W] that have one shape.

    A shape is given out when it fills a batch; the fullest one when too many pixels wait; the rest at the end.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    pixels = 0

    def take(shape: tuple[int, ...]) -> tuple[list[int], Tensor]:
        numbers, tensors = zip(*waiting.pop(shape), strict=True)
        return list(numbers), torch.stack(tensors)

    for number, tensor in enumerate(inputs):
        shape, area = tuple(tensor.shape), tensor.shape[-2] * tensor.shape[-1]
        waiting.setdefault(shape, []).append((number, tensor))
        pixels += area
        if len(waiting[shape]) == max(1, min(batch_size, BATCH_PIXELS // area)):
            full = shape
        elif pixels > PENDING_PIXELS:
            full = max(waiting, key=lambda s: len(waiting[s]) * s[-2] * s[-1])
        else:
            continue
        pixels -= len(waiting[full]) * full[-2] * full[-1]
        yield take(full)
    for shape in list(waiting):
        yield take(shape)


class _Prepared(Dataset[Tensor]):
    def __init__(self, images: ImageFiles, prepare: Callable[[Image.Image], Tensor]):
        self.images, self.prepare = images, prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return self.prepare(self.images.read(number))
