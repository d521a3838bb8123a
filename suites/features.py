"""Features of a data set from a frozen backbone: extracted once, cached under everything they depend on.

What a suite can ask for:

    cls          the backbone's pooled features [D]: CLS after the final norm for ViTs
    cls+avg      CLS and the mean patch token of the last block [2 D]
    dino         DINO's choice for linear classification (appendix F.2): CLS of the last 4 blocks for ViTs narrower than
                 768, else CLS and mean patch token of the last block; pooled features for other backbones
    last, avgpool  CLS of the last n blocks, oldest first, then the mean patch token of the last block (iBOT, DINOv2;
                 equal to DINO's order for n = 1, the only n for which its avgpool works)

One pass serves all of them. The cache has one entry per network, data set and transform, [CLS of n blocks, oldest
first; mean patch token], in which each of these is a run of neighbouring columns. It holds 4 blocks and the mean patch
token as long as that takes no more than a quarter of the cache; beyond, what the suites of the call ask for. An entry
that lacks something is replaced by one that has both. A ViT whose pooled features are not CLS, and a backbone without
tokens, have an entry for the pooled features.

Kept in float32; in float16, which moves a value by at most 1/2048 of itself, where D values of float32 per image would
take more than HALF_BYTES. That depends on network and data set only, not on what else is asked for.

Shapes: N images, K of them readable, B batch, D features, W columns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.data.datasets import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import feature_dim, has_patch_tokens
from pretrain.models.checkpoint import LoadedModel
from suites import passes
from suites.cache import Entry, FeatureCache, content_key
from suites.extractor import Extractor
from suites.passes import Pass, Precision, Progress, Report
from suites.protocols.protocol import Split
from suites.ranks import Part, share
from suites.rows import RowFile
from suites.suite import Feature, LastBlocks

FORMAT = 2
"""Raised when the same inputs would give other features."""
HALF_BYTES = 3 * 2**28
"""768 MiB: ImageNet's train with any ViT lies above; sets of the size of CIFAR with any network, and ImageNet's val,
below, so that scores measured on them before there was a limit stay.
"""
COMMON = LastBlocks(last=4, avgpool=True)
"""What the suites of DINO, iBOT and DINOv2 read between them."""
LISTED = 10
"""Unreadable images of which the reason is kept."""


@dataclass
class Features:
    """Features of one split."""

    cls: Tensor
    """[K, W] float32; of a large set float16, mapped into memory."""
    labels: Tensor | None
    """[K]."""
    index: Tensor
    """[K]: number of the image in its data set, ascending."""
    from_cache: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    """Where and how they were computed and kept: device, torch, seconds, stored."""
    path: Callable[[int], str] | None = None
    """Path of the image of a row, where the set has files."""
    unreadable: tuple[str, ...] = ()
    """Path and reason of the first images that have no row."""

    def split(self, *, stored: bool = False) -> Split:
        """As the protocols take it; without labels, an empty tensor.

        Args:
            stored: Features as they are kept; else in float32, in memory.
        """
        labels = torch.empty(0, dtype=torch.long) if self.labels is None else self.labels
        return Split(self.cls if stored else self.cls.float(), labels, self.index, self.path)

    def list_unreadable(self, images: ImageSet) -> list[str]:
        """Paths of the images without a row, those left out when the set was opened first; with reasons where kept."""
        left_out = sorted(set(range(len(images))) - set(self.index.tolist())) if len(self.index) < len(images) else []
        rest = [images.path(number) for number in left_out[len(self.unreadable) :]]
        return [*images.skipped, *self.unreadable, *rest]


def extract(
    model: LoadedModel,
    images: ImageSet,
    transform: EvalTransform,
    feature: Feature = "cls",
    *,
    beside: Sequence[Feature] = (),
    cache: FeatureCache | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features [K, W] of all images that can be read, from the cache when they are there.

    Args:
        beside: What will be asked for of the same images next.
        workers: Processes that decode image files; None = one per core for large sets, none for small ones.

    On rank 0 inside `suites.ranks.led`, all ranks do their part of the pass.

    Raises:
        DinobenchError: a feature is not finite (the message names the checkpoint and the image), or more images cannot
            be read than a data set may have.
        UsageError: a feature the backbone does not have.
    """
    needed = _blocks(resolve_feature(feature, model.backbone), model.backbone)
    dim = feature_dim(model.backbone)
    dtype = torch.float16 if 4 * dim * len(images) > HALF_BYTES else torch.float32
    job = Pass(model.backbone, images, transform, needed, dtype, device, precision, batch_size, workers)
    entry = None
    if cache is not None:
        limit = cache.max_bytes // (4 * len(images) * dim * dtype.itemsize)

        def write(path: Path, known: dict[str, str]) -> None:
            others = [_stored_blocks(known), *_next_blocks(beside, model.backbone)]
            blocks = None if needed is None else _choose([needed, *filter(None, others)], limit, job)
            _write(replace(job, blocks=blocks, path=path), model, progress)

        key = feature_key(model, images, transform, precision, tokens=needed is not None)
        entry = cache.get_or_write(key, write, accept=lambda known: _covers(_stored_blocks(known), needed))
    entry = entry or _in_memory(job, model, progress)
    values = _columns(entry.tensors["features"], _stored_blocks(entry.metadata), needed, dim)
    index = entry.tensors["index"].clone()
    labels = None if images.labels is None else images.labels.cpu()[index]
    return Features(
        values,
        labels,
        index,
        entry.from_cache,
        {key: value for key, value in entry.metadata.items() if key not in ("blocks", "unreadable")},
        path=row_paths(images, index),
        unreadable=tuple(json.loads(entry.metadata["unreadable"])),
    )


def extract_with(extractor: Extractor, images: ImageSet, transform: EvalTransform, feature: Feature) -> Features:
    """`extract` with the network and settings of an extractor, by the same cache entry; told in its log."""
    found = extract(
        extractor.model,
        images,
        transform,
        feature,
        cache=extractor.cache,
        device=extractor.device,
        precision=extractor.precision,
        batch_size=extractor.batch_size,
        workers=extractor.workers,
        progress=extractor.progress,
    )
    extractor.log.append({"from_cache": found.from_cache, **found.metadata})
    return found


def feature_key(
    model: LoadedModel, images: ImageSet, transform: EvalTransform, precision: Precision, *, tokens: bool
) -> str:
    """Key over backbone weights, architecture, data set content, transform and precision; pooled features or tokens."""
    return content_key(
        format=FORMAT,
        weights=model.provenance["weights_sha256"],
        architecture=model.provenance.get("model"),
        dataset=images.fingerprint,
        transform=transform.fingerprint(),
        layers="tokens" if tokens else "pooled",
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
    if blocks.last > 1 and not has_patch_tokens(backbone):
        raise UsageError(
            f"features of the last {blocks.last} blocks need a ViT, found {type(backbone).__name__}: use 1"
        )
    return blocks


def describe_feature(wanted: LastBlocks | None) -> str:
    """For receipts: `pooled`, `cls of last 4 blocks`, ..."""
    if wanted is None:
        return "pooled"
    blocks = "block" if wanted.last == 1 else f"{wanted.last} blocks"
    return f"cls of last {blocks}" + (" + mean patch of last block" if wanted.avgpool else "")


def row_paths(images: ImageSet, index: Tensor) -> Callable[[int], str] | None:
    """Path of the image of a row of features, where the set has files; index [K] are the numbers of the images."""
    if images.source.pixels is not None:
        return None
    return lambda row: images.path(int(index[row]))


def _blocks(wanted: LastBlocks | None, backbone: nn.Module) -> LastBlocks | None:
    """What a pass gives for it: CLS of the last block where that is the pooled output, None for other outputs."""
    if not has_patch_tokens(backbone):
        return None
    if wanted is None:
        return LastBlocks() if passes.pools_cls(backbone) else None
    depth = len(backbone.blocks)  # type: ignore[arg-type]
    return wanted.model_copy(update={"last": min(wanted.last, depth)})


def _next_blocks(features: Sequence[Feature], backbone: nn.Module) -> Iterator[LastBlocks | None]:
    """What is asked for next, without what the backbone does not have: that is told when it is asked for."""
    for feature in features:
        try:
            yield _blocks(resolve_feature(feature, backbone), backbone)
        except UsageError:
            continue


def _choose(parts: Sequence[LastBlocks], limit: int, job: Pass) -> LastBlocks:
    """The blocks of an entry that has room for `limit` times D columns, or for all parts where that is more."""
    common = _blocks(COMMON, job.backbone)
    assert common is not None
    every = _union([*parts, common])
    return every if every.last + every.avgpool <= limit else _union(parts)


def _union(parts: Sequence[LastBlocks]) -> LastBlocks:
    return LastBlocks(last=max(part.last for part in parts), avgpool=any(part.avgpool for part in parts))


def _covers(stored: LastBlocks | None, needed: LastBlocks | None) -> bool:
    return needed is None or (stored is not None and _union([stored, needed]) == stored)


def _stored_blocks(metadata: dict[str, str]) -> LastBlocks | None:
    return LastBlocks.model_validate_json(metadata["blocks"]) if metadata.get("blocks") else None


def _columns(values: Tensor, stored: LastBlocks | None, needed: LastBlocks | None, dim: int) -> Tensor:
    """The columns of an entry [K, W] that are the blocks needed; of a large one without copying."""
    if stored is None or needed is None or stored == needed:
        return values
    part = values[:, (stored.last - needed.last) * dim : (stored.last + needed.avgpool) * dim]
    return part.contiguous() if part.dtype == torch.float32 else part


def _write(job: Pass, model: LoadedModel, progress: Progress | None) -> None:
    """Fill the row file `job.path`, on all ranks."""
    assert job.path is not None
    started = time.monotonic()
    with RowFile.create(job.path, len(job.images), job.width, job.dtype) as file:
        reports = share(passes.run, job, progress=progress)
        if not any(report.overflow for report in reports):
            unreadable = _check(reports, job, model)
            return file.finish(sorted(unreadable), _metadata(job, unreadable, started))
    return _write(replace(job, dtype=torch.float32), model, progress)


def _in_memory(job: Pass, model: LoadedModel, progress: Progress | None) -> Entry:
    started = time.monotonic()
    report = passes.run(job, Part(), progress=progress)
    if report.overflow:
        return _in_memory(replace(job, dtype=torch.float32), model, progress)
    unreadable = _check([report], job, model)
    assert report.values is not None
    index = torch.tensor([i for i in range(len(job.images)) if i not in unreadable], dtype=torch.long)
    values = report.values[index] if unreadable else report.values
    return Entry({"features": values, "index": index}, _metadata(job, unreadable, started), from_cache=False)


def _metadata(job: Pass, unreadable: dict[int, str], started: float) -> dict[str, str]:
    return {
        "device": job.device,
        "torch": torch.__version__,
        "seconds": f"{time.monotonic() - started:.3f}",
        "stored": str(job.dtype).removeprefix("torch."),
        "blocks": "" if job.blocks is None else job.blocks.model_dump_json(),
        "unreadable": json.dumps([unreadable[number] for number in sorted(unreadable)[:LISTED]]),
    }


def _check(reports: Sequence[Report], job: Pass, model: LoadedModel) -> dict[int, str]:
    """The unreadable images of all ranks."""
    images = job.images
    unreadable = {number: reason for report in reports for number, reason in report.unreadable.items()}
    if len(unreadable) > passes.allowed_unreadable(images):
        raise passes.too_many_unreadable(images, unreadable)
    bad = [number for report in reports for number in report.not_finite]
    if bad:
        raise DinobenchError(
            f"the features of {model.provenance.get('path', 'this network')} are not finite for {len(bad)} of "
            f"{len(images)} images of {images.name} {images.split} (first: image {min(bad)}): the weights of this "
            "checkpoint are broken or overflow; evaluate an earlier checkpoint or precision fp32"
        )
    return unreadable
