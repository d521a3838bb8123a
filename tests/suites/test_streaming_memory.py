"""Features of a large set cost no memory of their own: they go to the file as they come."""

from __future__ import annotations

import json
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from pretrain.data.images import ArraySource, ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.models.checkpoint import LoadedModel, weights_sha256
from suites.cache import FeatureCache
from suites.features import Features, extract


class Projection(nn.Module):
    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0].flatten(1) * self.scale


def own_bytes() -> int:
    # not those of files mapped into the process
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def measured(model: LoadedModel, num: int, cache: FeatureCache | None) -> tuple[Features, int]:
    """The features of `num` images, and the most memory that their extraction took."""
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(num, -1, -1, -1)  # no memory of their own
    images = ImageSet("many", "train", str(num), ArraySource(pixels))
    before, most = own_bytes(), 0

    def watch(what: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, own_bytes() - before)

    return extract(model, images, EvalTransform(resize=None, crop=None), cache=cache, progress=watch), most


def measure(folder: Path) -> None:
    backbone = Projection().eval()
    known = {"path": "none", "sha256": "0" * 64, "network": "teacher", "weights_sha256": weights_sha256(backbone)}
    model = LoadedModel(backbone, None, None, "none", None, known)
    cache = FeatureCache(folder / "cache")
    measured(model, 2_000, cache)  # what the first pass alone allocates
    streamed, with_cache = measured(model, 200_000, cache)
    alone, without = measured(model, 200_000, None)
    found = {"with_cache": with_cache, "without": without, "stored": cache.size()}
    (folder / "found.json").write_text(json.dumps({**found, "equal": torch.equal(streamed.cls, alone.cls)}))


@pytest.mark.skipif(not psutil.LINUX, reason="the memory of mapped files is told apart on Linux only")
def test_features_of_a_large_set_are_streamed(tmp_path: Path, processes: ForkServerContext) -> None:
    # In a process of its own: what other tests have freed would hide what this one takes.
    process = processes.Process(target=measure, args=(tmp_path,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["equal"]
    assert found["stored"] > 200_000 * 64 * 4
    assert found["with_cache"] < 12 * 2**20
    assert found["without"] > 40 * 2**20  # what the features take in memory, so that the bound above says something
