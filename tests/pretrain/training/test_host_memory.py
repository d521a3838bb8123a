"""Freed memory stays with the process: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pretrain.training.host_memory import CHOICES

PAGES_OF_A_TENSOR = 10_000
"""40 MB in pages of 4 KiB."""
PROGRAM = """
import resource, torch
from pretrain.training.runtime import Runtime, RuntimeConfig

def use():
    a, b = torch.ones(10_000_000), torch.ones(100_000)
    return (a + 1).sum() + b.sum()

if {start}:
    Runtime.start(RuntimeConfig(device="cpu"))
faults = []
for _ in range(10):  # the heap needs some rounds to find its form
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")


def page_faults(*, start: bool, **environment: str) -> int:
    """Of one round, at least."""
    clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(start=start)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_freed_memory_serves_the_next_tensors() -> None:
    assert page_faults(start=False) > PAGES_OF_A_TENSOR / 2, "the allocator already keeps it: remove host_memory.py"
    assert page_faults(start=True) < PAGES_OF_A_TENSOR / 10


def test_what_the_user_chose_stays() -> None:
    assert page_faults(start=True, MALLOC_MMAP_MAX_="65536") > PAGES_OF_A_TENSOR / 2
