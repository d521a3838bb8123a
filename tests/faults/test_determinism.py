"""What gives the same weights bit by bit, and what only close ones: see results/determinism.md, which names the tests.

Here are those of whole trainings on a CPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.models import checkpoint
from pretrain.training.loop import train
from pretrain.training.recipe import resolve

ROOT = Path(__file__).parent.parent.parent
LIST = ROOT / "results" / "determinism.md"
SHORT = [
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "optim.batch_size=256",
    "head.hidden=32",
    "head.num_prototypes=24",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "model.drop_path=0.2",
    "runtime.log_every=3",
    "runtime.device=cpu",
    "checkpoint.every_epochs=1",
    "checkpoint.every_steps=0",
]
"""1297 images / 256 = 5 steps an epoch."""
EVERYTHING = """
import sys
from pathlib import Path
sys.path.append({tests!r})
from test_determinism import digest, trained
print(digest(trained(Path(sys.argv[1]), "dino_vmf")))
"""


def trained(folder: Path, method: str, *overrides: str) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint: networks, centres, moments of the optimiser, random state."""
    train(resolve(method, preset="digits", overrides=[*SHORT, *overrides]), folder=folder)
    payload = checkpoint.read(folder / "checkpoints" / "last.pt")
    return dict(tensors_in({key: payload[key] for key in ("student", "teacher", "target", "optimizer", "rng")}))


def tensors_in(value: object, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in tensors_in(item, f"{name}.{key}")]


def digest(tensors: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name, value in a.items() if not torch.equal(value, b[name])]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of the student's weights, relative to their size."""
    names = [name for name in a if name.startswith(".student")]
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in names)
    return (apart / sum(float(a[name].double().square().sum()) for name in names)) ** 0.5


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(tmp_path_factory.mktemp("reference"), "dino_vmf")


@pytest.mark.promise("the same command on the same machine", "the same weights, moments and random state, bit by bit")
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    reference: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.rand(7)  # whatever was drawn before must not matter
    assert differing(reference, trained(tmp_path / "again", "dino_vmf")) == []
    assert differing(reference, trained(tmp_path / "other", "dino_vmf", "seed=1"))


@pytest.mark.promise("plumbing of the recipe changes", "it changes no bit of the weights")
def test_plumbing_changes_no_bit(reference: dict[str, Tensor], tmp_path: Path) -> None:
    plumbing = [
        "runtime.log_every=1",
        "checkpoint.every_steps=2",
        "checkpoint.keep=1",
        "runtime.rank_timeout_seconds=9",
    ]
    found = trained(tmp_path, "dino_vmf", *plumbing, "data.cache=none", "runtime.stop_on_collapse=false")
    # what was gathered since the last log is of the log, not of the training
    health = [name for name in found if "health" in name]
    assert set(differing(reference, found)) <= set(health)


@pytest.mark.slow
@pytest.mark.promise("the same command in another process", "the same bits, whatever the seed of Python's hashes")
def test_another_process_gives_the_same_bits(reference: dict[str, Tensor], tmp_path: Path) -> None:
    for number in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": number, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        code = EVERYTHING.format(tests=str(Path(__file__).parent))
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / number)], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == digest(reference), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.promise("another number of loader workers", "the same bits with 0, 1 and 2")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_loader_workers_changes_no_bit(workers: int, tmp_path: Path) -> None:
    small = ["views.backend=pil", "schedule.epochs=1", "schedule.steps_per_epoch=3", "optim.batch_size=64"]
    alone = trained(tmp_path / "alone", "dino_vmf", *small, "runtime.workers=0")
    assert differing(alone, trained(tmp_path / "more", "dino_vmf", *small, f"runtime.workers={workers}")) == []


@pytest.mark.promise("another number of threads", "weights that differ by rounding only")
def test_another_number_of_threads_differs_by_rounding(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        one, two = (
            trained(tmp_path / str(n), "dino", "runtime.precision=fp64", f"runtime.threads={n}") for n in (1, 2)
        )
    finally:
        torch.set_num_threads(threads)
    assert distance(one, two) < 1e-6


@pytest.mark.promise("another precision", "a first loss close to that of fp32; the steps then go apart")
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.01), ("fp64", 1e-5)])
def test_another_precision_begins_close(precision: str, limit: float, tmp_path: Path) -> None:
    losses = []
    for name in ("fp32", precision):
        short = ["schedule.epochs=1", "schedule.steps_per_epoch=1", f"runtime.precision={name}"]
        recipe = resolve("dino", preset="digits", overrides=[*SHORT, *short])
        train(recipe, folder=tmp_path / name, log=lambda metrics, step: losses.append(metrics.get("loss/total")))
    first, other = [loss for loss in losses if loss is not None]
    assert 0 < abs(other / first - 1) < limit


def test_every_test_that_the_list_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", LIST.read_text())
    assert len(named) >= 20
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []
