"""What every test shares: one thread, no network, no file in the user's home, and the reference values."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

# Read once, when torch, FAISS and huggingface_hub are imported: so they are set before any of them is.
# One thread gives the same sums on every machine and lets pytest-xdist use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MPLBACKEND"] = "Agg"
# Plain help texts: no colours, and one width whatever the terminal.
os.environ["TERM"] = "dumb"
os.environ["COLUMNS"] = "120"
for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DINOBENCH_METHODS"):
    os.environ.pop(name, None)

import numpy as np
import pytest

pytest_plugins = ["reliability"]

GOLDEN = Path(__file__).parent / "golden"


def _keep_state_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(folder / 'mlflow.db').absolute()}")
    patch.setenv("DINOBENCH_CACHE", str(folder / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _session_state_in_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Comes before the fixtures of a module, which may train or evaluate once for all its tests."""
    with pytest.MonkeyPatch.context() as patch:
        _keep_state_in(tmp_path_factory.mktemp("session"), patch)
        yield


@pytest.fixture(autouse=True)
def _state_in_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a tracking store and a feature cache of its own; no test sees another's."""
    _keep_state_in(tmp_path_factory.getbasetemp() / "state" / os.urandom(8).hex(), monkeypatch)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes as forks of one that has imported what is large and none of ours: torch alone takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "pandas"])
    return context


@pytest.fixture(scope="session")
def start_ranks(processes: ForkServerContext) -> Callable[..., None]:
    """`start_ranks(function, *arguments)` is `function(rank, *arguments)` in as many processes as there are ranks."""

    def start(function: Callable[..., None], *arguments: object, ranks: int = 2) -> None:
        from torch import multiprocessing

        multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method=processes.get_start_method())

    return start


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Reader of `tests/golden/<name>.npz`: values computed with the official code."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return read


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
