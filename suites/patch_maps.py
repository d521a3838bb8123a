"""Features of every patch of every image of a split, for heads that are trained on them.

    ViT     patch tokens of the last block after the final norm
    others  timm's last feature map (`forward_features`), where it is a map: ResNet, ConvNeXt, Swin at its own size

An image is brought to its input size with its shape kept, then filled up at the right and below with the mean colour to
whole patches. Positions are those of the image: `span` is how many patches it covers without the filling.

Computed once per network, as float16, and written to a temporary file without a name that is mapped into memory, so
that a set of any size needs the memory of a batch (ADE20k at 512 px: 23 GB of disk for a ViT-S/16). Parts of CHUNK
images go to the feature cache, unless a split would fill more than a quarter of it. Shapes: N images, B batch, h x w
patches, P = h w, D features.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import has_patch_tokens
from suites.cache import Entry, content_key
from suites.descriptors import patch_tokens
from suites.extractor import Extractor, group_by_shape
from suites.passes import default_workers
from suites.places import ImageFiles

FORMAT = 1
"""Raised when the same inputs would give other features."""
CHUNK = 64
"""Images per entry of the cache."""
CPU_BATCH = 8
"""Images at a time on a CPU, where larger batches leave its caches: measured a quarter faster than 32 at 184 x 240."""
CACHE_SHARE = 4
"""A split is cached if it takes at most one part in so many of the cache."""
Prepare = Callable[[Image.Image], Tensor]


class Ragged:
    """Arrays of one type and any shapes in a temporary file, read through a map."""

    def __init__(self, arrays: Iterable[NDArray[Any]]):
        """Writes `arrays` one by one, in the system's folder for temporary files (TMPDIR names another).

        Raises:
            DinobenchError: the folder has no room for them.
        """
        self._shapes: list[tuple[int, ...]] = []
        self._starts = [0]
        # Without a name: the space is given back when the map goes, however the process ends.
        with tempfile.TemporaryFile() as file:
            for array in arrays:
                self._type = array.dtype
                self._shapes.append(array.shape)
                self._starts.append(self._starts[-1] + array.size)
                _write(file, array)
            self._values = np.memmap(file, self._type, mode="r", shape=(self._starts[-1],))

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, number: int) -> NDArray[Any]:
        flat = self._values[self._starts[number] : self._starts[number + 1]]
        return flat.reshape(self._shapes[number])

    def shape(self, number: int) -> tuple[int, ...]:
        """Of array `number`, without a look into the file."""
        return self._shapes[number]


def _write(file: Any, array: NDArray[Any]) -> None:
    try:
        file.write(np.ascontiguousarray(array).data)
        file.flush()
    except OSError as error:
        raise DinobenchError(
            f"features and label maps do not fit in {tempfile.gettempdir()} ({error}): set TMPDIR to a folder with room"
        ) from error


@dataclass(frozen=True)
class PatchMaps:
    """Features of the patches of N images."""

    features: Ragged
    """Per image float16 [P, D], row by row."""
    grids: NDArray[np.int64]
    """[N, 2] rows and columns."""
    spans: NDArray[np.float64]
    """[N, 2] rows and columns that the image covers."""

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def dim(self) -> int:
        """D."""
        return self.features.shape(0)[1]

    def batch(self, numbers: Sequence[int], device: str) -> Tensor:
        """Features float32 [sum of P, D] of these images, one after the other."""
        return torch.from_numpy(np.concatenate([self.features[i] for i in numbers])).to(device).float()


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> [B, h, w, D].

    Raises:
        UsageError: the network gives no map.
    """
    if has_patch_tokens(backbone):
        patches = patch_tokens(backbone, images)
        return patches.tokens.unflatten(1, patches.grid)
    network: Any = backbone
    found = network.forward_features(images) if hasattr(network, "forward_features") else None
    width = getattr(network, "num_features", None)
    if isinstance(found, Tensor) and found.ndim == 4 and width in (found.shape[1], found.shape[3]):
        return found.permute(0, 2, 3, 1) if found.shape[1] == width else found
    raise UsageError(
        f"dense features need the patch tokens of a plain ViT or a network whose timm forward_features gives a map, "
        f"found {type(backbone).__name__}: this suite does not apply"
    )


def input_multiple(backbone: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels; for others the stride of their last map."""
    network: Any = backbone
    if has_patch_tokens(backbone):
        return tuple(network.patch_embed.patch_size)
    stages = getattr(network, "feature_info", None)
    stride = stages[-1]["reduction"] if stages else 32
    return stride, stride


def extract_maps(extractor: Extractor, images: ImageFiles, prepare: Prepare, **made_by: Any) -> PatchMaps:
    """Features of the patches of all images, from the cache where they are there.

    Args:
        prepare: PIL image -> normalised input [3, H, W] without filling; runs in other processes.
        made_by: plain values that say what `prepare` does; part of the cache key.

    Raises:
        DinobenchError: an image cannot be decoded, or a feature is not finite.
        UsageError: the backbone has no patches, or does not take images of this shape.
    """
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    log: list[dict[str, Any]] = []
    grids, spans = [], []
    cached = extractor.cache is not None

    def arrays() -> Iterator[NDArray[np.float16]]:
        nonlocal cached
        for chunk in chunks:
            entry = _entry(extractor, images, prepare, chunk, made_by, cached)
            log.append({"from_cache": entry.from_cache, **entry.metadata})
            grids.append(entry.tensors["grids"])
            spans.append(entry.tensors["spans"])
            features = entry.tensors["features"]
            if extractor.cache is not None:
                total = features.numel() * features.element_size() * len(chunks)
                cached = total <= extractor.cache.max_bytes // CACHE_SHARE
            sizes = entry.tensors["grids"].prod(1).tolist()
            yield from (part.numpy() for part in features.split(sizes))
            if extractor.progress is not None:
                extractor.progress(f"features of {images.benchmark} {images.role}", chunk.stop, len(images))

    features = Ragged(arrays())
    seconds = sum(float(part["seconds"]) for part in log)
    fresh = next((part for part in log if not part["from_cache"]), log[0])
    extractor.log.append({**fresh, "seconds": f"{seconds:.3f}"})
    return PatchMaps(features, torch.cat(grids).numpy(), torch.cat(spans).numpy())


def colour_maps(images: ImageFiles, prepare: Prepare, patch: int) -> PatchMaps:
    """The mean colour of every patch of `patch` pixels, D = 3, for the baseline raw_pixels."""
    grids, spans = [], []

    def arrays() -> Iterator[NDArray[np.float16]]:
        for pixels in _inputs(images, prepare, range(len(images)), None):
            # The last row and column are means of the pixels that are there.
            colours = F.avg_pool2d(pixels, patch, ceil_mode=True, count_include_pad=False)
            grids.append(colours.shape[1:])
            spans.append([side / patch for side in pixels.shape[1:]])
            yield colours.flatten(1).T.half().numpy()

    features = Ragged(arrays())
    return PatchMaps(features, np.array(grids), np.array(spans))


def _entry(
    extractor: Extractor, images: ImageFiles, prepare: Prepare, chunk: range, made_by: dict[str, Any], cached: bool
) -> Entry:
    def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
        started = time.monotonic()
        quiet = replace(extractor, log=[])  # the split is one line of the receipt, not each of its chunks
        tensors = _compute(quiet, images, prepare, chunk)
        made = {name: value for name, value in quiet.log[0].items() if name != "from_cache"}
        return tensors, {**made, "seconds": f"{time.monotonic() - started:.3f}"}

    if not cached or extractor.cache is None:
        return Entry(*compute(), from_cache=False)
    key = content_key(
        format=FORMAT,
        what="patch maps",
        weights=extractor.model.provenance["weights_sha256"],
        architecture=extractor.model.provenance.get("model"),
        images=images.fingerprint,
        chunk=[chunk.start, chunk.stop],
        made_by=made_by,
        precision=extractor.precision,
    )
    return extractor.cache.get_or_compute(key, compute)


def _compute(extractor: Extractor, images: ImageFiles, prepare: Prepare, chunk: range) -> dict[str, Tensor]:
    """Features [sum of P, D] float16, grids and spans [n, 2] of the images of a chunk."""
    multiple = input_multiple(extractor.model.backbone)
    sizes: list[tuple[int, int]] = []

    def filled() -> Iterator[Tensor]:
        for pixels in _inputs(images, prepare, chunk, extractor.workers):
            height, width = pixels.shape[1:]
            sizes.append((height, width))
            yield F.pad(pixels, (0, -width % multiple[1], 0, -height % multiple[0]))

    found: dict[int, Tensor] = {}
    spans = torch.empty(len(chunk), 2, dtype=torch.float64)
    size = min(CPU_BATCH, extractor.batch_size) if extractor.device == "cpu" else extractor.batch_size
    for numbers, batch in group_by_shape(filled(), size):
        maps = extractor.apply(feature_map, batch).half().cpu()
        for number, one in zip(numbers, maps, strict=True):
            found[number] = one
            for axis, (side, whole) in enumerate(zip(sizes[number], batch.shape[2:], strict=True)):
                spans[number, axis] = one.shape[axis] * side / whole
    ordered = [found[number] for number in range(len(chunk))]
    for number, one in zip(chunk, ordered, strict=True):
        if not torch.isfinite(one).all():
            raise DinobenchError(
                f"the features of {extractor.model.provenance.get('path', 'this network')} are not finite in float16 "
                f"for {images.source.path(number)}: the weights are broken or overflow; evaluate an earlier checkpoint "
                "or precision fp32"
            )
    grids = torch.tensor([one.shape[:2] for one in ordered])
    return {"features": torch.cat([one.flatten(0, 1) for one in ordered]).clone(), "grids": grids, "spans": spans}


def _inputs(images: ImageFiles, prepare: Prepare, chunk: range, workers: int | None) -> Iterable[Tensor]:
    number = default_workers(len(images)) if workers is None else workers
    return DataLoader(_Prepared(images, prepare, chunk), batch_size=None, num_workers=number)


class _Prepared(Dataset[Tensor]):
    def __init__(self, images: ImageFiles, prepare: Prepare, chunk: range):
        self.images, self.prepare, self.chunk = images, prepare, chunk

    def __len__(self) -> int:
        return len(self.chunk)

    def __getitem__(self, number: int) -> Tensor:
        return self.prepare(self.images.read(self.chunk[number]))
