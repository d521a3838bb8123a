"""What a step costs beside arithmetic: operator calls, kernel launches, and moments at which the host waits."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity, profile

LAUNCHES = re.compile(r"(cu|cuda)(LaunchKernel|GraphLaunch)")
SYNC_TEST = Path(__file__).parents[1] / "pretrain" / "training" / "test_host_syncs.py"

Work = Callable[[], object]


def calls(work: Work, device: str) -> dict[str, int]:
    """Calls of operators from Python or autograd (not those that operators make), and on a GPU kernel launches.

    Compiled code is not in the calls: its generated kernels are none of torch's operators.
    """
    events = profiled(work, device)
    counted = {"operator_calls": sum(_is_operator(event) and not _within_operator(event) for event in events)}
    if on_gpu(device):
        counted["kernel_launches"] = sum(bool(LAUNCHES.match(event.name)) for event in events)
    return counted


def profiled(work: Work, device: str) -> EventList:
    """Everything the profiler saw of one call."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu(device) else [])]
    with profile(activities=activities) as recorded:
        work()
        if on_gpu(device):
            torch.cuda.synchronize()
    events = recorded.events()
    assert events is not None
    return events


def host_syncs(work: Work, device: str) -> int:
    """How often `work` waits for the device: seen by CUDA itself, on a CPU counted as reads of tensors.

    A plain `torch.cuda.synchronize()` is not among them.
    """
    if on_gpu(device):
        return _cuda_syncs(work)
    with torch.compiler.set_stance("force_eager"), _host_syncs_of_the_tests().HostSyncs() as syncs:
        work()
    return len(syncs.found)


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _cuda_syncs(work: Work) -> int:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _host_syncs_of_the_tests() -> ModuleType:
    """The module whose counter the tests of the training use; tests/ is no package."""
    spec = importlib.util.spec_from_file_location("test_host_syncs", SYNC_TEST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_operator(event: FunctionEvent) -> bool:
    return event.name.startswith("aten::")


def _within_operator(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent):
            return True
        parent = parent.cpu_parent
    return False
