"""How the gradients of several ranks become one: DistributedDataParallel.

Every rank has the whole network and its share of the images; the gradients are averaged in buckets while the backward
pass is still running. Bit for bit the ranks hold the same weights after every step.
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

GradientCompression = Literal["none", "bf16"]


def replicate(student: nn.Module, compression: GradientCompression = "none") -> DistributedDataParallel:
    """The student, wrapped so that every rank gets the mean gradient of all.

    Args:
        student: with the same weights on every rank, its parameters on one device.
        compression: `bf16` sends half the bytes: each rank's gradient is divided by the number of ranks and rounded to
            bfloat16 (8 bits of precision) before it is summed. Master weights and optimiser keep theirs.
    """
    # The gradients are views into the buckets that travel, not copies of them. No static graph: it would skip a look
    # for unused parameters that is not made here, and it fails when a step begins with a micro-batch of `no_sync`.
    wrapped = DistributedDataParallel(student, gradient_as_bucket_view=True)
    if compression == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped
