"""One pass of a frozen network over the images of a data set, whole or the part of one rank.

Sets in memory go through in whole batches, files one by one through PIL. An image that cannot be decoded has no row in
the features; the pass ends when more of them are found than a data set may have.

Shapes: N images, B batch, D features of the backbone, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pretrain.data.datasets import MAX_BAD_IMAGES
from pretrain.data.images import ImageSet, UnreadableImage
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError
from pretrain.faults import workers_told
from pretrain.models.backbones import feature_dim, has_patch_tokens, last_tokens
from suites.memory import InHalves
from suites.ranks import Part
from suites.rows import RowFile
from suites.suite import LastBlocks

Precision = Literal["fp32", "bf16"]
Progress = Callable[[str, int, int], None]
"""Called with (what, images done, images in all)."""
WORKER_ADVICE = "give the job more memory or fewer cores, and start it again; what was measured is kept"
_REASON = 300
"""Letters of the reason why an image cannot be read."""


@dataclass(frozen=True)
class Pass:
    """What every rank must know. It can be pickled."""

    backbone: nn.Module
    images: ImageSet
    transform: EvalTransform
    blocks: LastBlocks | None
    """None for the pooled features."""
    dtype: torch.dtype
    """In which the features are kept; they are computed in float32."""
    device: str
    precision: Precision
    batch_size: int
    workers: int | None
    path: Path | None = None
    """Row file to write to; None keeps the features in memory."""

    @property
    def width(self) -> int:
        """W."""
        number = 1 if self.blocks is None else self.blocks.last + self.blocks.avgpool
        return number * feature_dim(self.backbone)


@dataclass
class Report:
    """What a rank found in its part."""

    values: Tensor | None = None
    """[rows of the part, W] when they are kept in memory."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Number of an image -> path and reason."""
    not_finite: list[int] = field(default_factory=list)
    """Images that have a feature that is no number."""
    overflow: bool = False
    """Whether a feature is too large for `dtype`."""


class Batch(NamedTuple):
    """Some images that lie next to each other."""

    start: int
    size: int
    pixels: Tensor | None
    """[b, 3, h, w] of those that can be read; None when none can."""
    places: Tensor
    """[b]: their places among the `size`."""
    unreadable: dict[int, str]


def run(job: Pass, part: Part, progress: Progress | None = None) -> Report:
    """Do this part of the pass.

    Raises:
        DinobenchError: too many images cannot be read, a process that decodes them was killed, one image alone does not
            fit in memory, or the file to write to is not on this machine.
    """
    images, report = job.images, Report()
    rows = part.rows(len(images), job.batch_size)
    device = part.device or job.device
    backbone = job.backbone.to(device).eval()
    autocast: Any = nullcontext()
    if job.precision == "bf16":
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    if job.path is None:
        report.values = torch.empty(len(rows), job.width, dtype=job.dtype)

    def features(pixels: Tensor) -> Tensor:
        return describe(backbone, pixels.to(device, non_blocking=True), job.blocks).float().cpu()

    apply = InHalves()
    with _open(job) as file, workers_told(WORKER_ADVICE), torch.inference_mode(), autocast:
        for batch in batches(job, rows, part):
            values = torch.zeros(batch.size, job.width)
            if batch.pixels is not None:
                values[batch.places] = apply(features, batch.pixels)
            stored = values.to(job.dtype)
            _check(values, stored, batch, report)
            if len(report.unreadable) > allowed_unreadable(images):
                raise too_many_unreadable(images, report.unreadable)
            if file is not None:
                file.write(batch.start, stored)
            elif report.values is not None:
                report.values[batch.start - rows.start : batch.start - rows.start + batch.size] = stored
            if progress is not None:
                done = batch.start + batch.size - rows.start
                progress(f"features of {images.name} {images.split}", done * len(images) // len(rows), len(images))
    return report


def describe(backbone: nn.Module, x: Tensor, blocks: LastBlocks | None) -> Tensor:
    """Images [B, 3, H, W] -> pooled features [B, D], or CLS of the last blocks and mean patch token [B, W].

    Where CLS of the last block is what the backbone gives, it is taken from there, to the last bit.
    """
    if blocks is None:
        return backbone(x)
    if not pools_cls(backbone):
        layers = last_tokens(backbone, x, blocks.last)
        parts = [cls for cls, _ in layers]
        patches = layers[-1][1]
        return torch.cat([*parts, patches.mean(1)] if blocks.avgpool and patches is not None else parts, dim=1)
    vit: Any = backbone
    *before, last = vit.blocks
    needed = max(blocks.last - 1, int(blocks.avgpool))
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *call: outputs.append(call[2])) for b in before[len(before) - needed :]]
    try:
        pooled = backbone(x)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = outputs[len(outputs) - (blocks.last - 1) :]
    parts = [*(vit.norm(t[:, :1])[:, 0] for t in tokens), pooled]
    if blocks.avgpool:
        # The backbone forms the last block for CLS only, see pretrain.models.last_block.
        final = vit.norm(last(outputs[-1])) if outputs else None
        patches = last_tokens(backbone, x)[0][1] if final is None else final[:, vit.num_prefix_tokens :]
        assert patches is not None
        parts.append(patches.mean(1))
    return torch.cat(parts, dim=1)


def pools_cls(backbone: nn.Module) -> bool:
    """Whether the backbone's pooled features are CLS of the last block after the final norm."""
    vit: Any = backbone
    return (
        has_patch_tokens(backbone)
        and vit.has_class_token
        and vit.global_pool == "token"
        and vit.attn_pool is None
        and isinstance(vit.fc_norm, nn.Identity)
        and isinstance(vit.head, nn.Identity)
    )


def batches(job: Pass, rows: range, part: Part) -> Iterator[Batch]:
    """The images of these numbers, transformed."""
    images, size = job.images, job.batch_size
    if images.source.pixels is not None and images.array is not None:
        for start in range(rows.start, rows.stop, size):
            pixels = job.transform.batch(images.array[start : min(start + size, rows.stop)])
            yield Batch(start, len(pixels), pixels, torch.arange(len(pixels)), {})
        return
    # Ranks of one machine share its cores.
    workers = default_workers(len(images)) // part.size if job.workers is None else job.workers
    dataset = _Decoded(images, job.transform)
    yield from DataLoader(dataset, size, sampler=rows, num_workers=workers, collate_fn=_collate)


def default_workers(num_images: int) -> int:
    """One process per usable core; starting them is not worth it below some thousand images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if num_images >= 5000 and cores > 1 else 0


def allowed_unreadable(images: ImageSet) -> int:
    """How many more images may turn out to be unreadable, beside those left out when the set was opened."""
    return int(MAX_BAD_IMAGES * (len(images) + len(images.skipped))) - len(images.skipped)


def too_many_unreadable(images: ImageSet, found: dict[int, str]) -> DinobenchError:
    """Lists the first ones."""
    shown = "\n  ".join([*images.skipped, *(found[number] for number in sorted(found))][:5])
    return DinobenchError(
        f"{images.name} {images.split}: at least {len(images.skipped) + len(found)} of "
        f"{len(images) + len(images.skipped)} images cannot be read, more than {MAX_BAD_IMAGES:.0%} of them. "
        f"Mend or remove them:\n  {shown}"
    )


class _Decoded(Dataset[tuple[int, "Tensor | str"]]):
    def __init__(self, images: ImageSet, transform: EvalTransform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        # Not images.image, which puts another image in the place of one that cannot be read.
        try:
            return number, self.transform(self.images.read(number))
        except UnreadableImage as error:
            return number, str(error)[:_REASON]


def _collate(items: Sequence[tuple[int, Tensor | str]]) -> Batch:
    start = items[0][0]
    readable = [(number - start, found) for number, found in items if isinstance(found, Tensor)]
    pixels = torch.stack([found for _, found in readable]) if readable else None
    reasons = {number: found for number, found in items if isinstance(found, str)}
    return Batch(start, len(items), pixels, torch.tensor([place for place, _ in readable], dtype=torch.long), reasons)


def _check(values: Tensor, stored: Tensor, batch: Batch, report: Report) -> None:
    """Note what is wrong with features [B, W] and with what is kept of them."""
    report.unreadable |= batch.unreadable
    finite = torch.isfinite(values).all(1)
    report.not_finite += (batch.start + (~finite).nonzero().flatten()).tolist()
    report.overflow |= bool((torch.isfinite(values) & ~torch.isfinite(stored)).any())


def _open(job: Pass) -> AbstractContextManager[RowFile | None]:
    if job.path is None:
        return nullcontext()
    try:
        return RowFile(job.path, len(job.images), job.width, job.dtype)
    except OSError as error:
        raise DinobenchError(
            f"a rank cannot write to the feature cache of rank 0 ({error}): set DINOBENCH_CACHE to a folder that all "
            "machines share"
        ) from error
