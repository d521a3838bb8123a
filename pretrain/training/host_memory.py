"""Memory of large tensors on a CPU: kept by the process once it has it, as CUDA's allocator keeps the GPU's.

glibc gives every block of 32 MiB and more back to the system when it is freed, and smaller ones at the end of its heap.
Where a training step frees and takes the same blocks again, the system has to find and clear every page of them anew:
200 MB a step with 65536 prototypes in fp32, 500 MB in bf16, 1 GB for 32 images of 224 px through a ViT-S.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h)."""
CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Environment variables by which a user has chosen (mallopt(3)); any of them turns the rule off."""


def keep_freed_memory() -> bool:
    """From now on what is freed serves later tensors; whether that could be arranged (it needs glibc).

    The process stays as large as it once was until it ends; its peak does not change.
    """
    if sys.platform != "linux" or any(name in os.environ for name in CHOICES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # No blocks apart from the heap, which can be given back singly; and a heap that does not shrink.
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
