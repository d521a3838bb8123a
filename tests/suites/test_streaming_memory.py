"""Features of a large set cost no memory of their own: they go to the file as they come."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

IN_A_PROCESS_OF_ITS_OWN = """
import json, sys
from pathlib import Path

import psutil, torch
from torch import nn

from pretrain.data.images import ArraySource, ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.models.checkpoint import LoadedModel, weights_sha256
from suites.cache import FeatureCache
from suites.features import extract


class Projection(nn.Module):
    num_features = 64

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x[:, 0].flatten(1) * self.scale


def own_bytes():
    # not those of files mapped into the process
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def measured(num, cache):
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(num, -1, -1, -1)  # no memory of their own
    images = ImageSet("many", "train", str(num), ArraySource(pixels))
    before, most = own_bytes(), 0

    def watch(what, done, total):
        nonlocal most
        most = max(most, own_bytes() - before)

    found = extract(model, images, EvalTransform(resize=None, crop=None), cache=cache, progress=watch)
    return found, most


backbone = Projection().eval()
known = {"path": "none", "sha256": "0" * 64, "network": "teacher", "weights_sha256": weights_sha256(backbone)}
model = LoadedModel(backbone, None, None, "none", None, known)
cache = FeatureCache(Path(sys.argv[1]))
measured(2_000, cache)  # what the first pass alone allocates
streamed, with_cache = measured(200_000, cache)
alone, without = measured(200_000, None)
equal = torch.equal(streamed.cls, alone.cls)
print(json.dumps({"with_cache": with_cache, "without": without, "stored": cache.size(), "equal": equal}))
"""


@pytest.mark.skipif(not psutil.LINUX, reason="the memory of mapped files is told apart on Linux only")
def test_features_of_a_large_set_are_streamed(tmp_path: Path) -> None:
    # What other tests have freed would hide what this one takes.
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"]
    assert found["stored"] > 200_000 * 64 * 4
    assert found["with_cache"] < 12 * 2**20
    assert found["without"] > 40 * 2**20  # what the features take in memory, so that the bound above says something
