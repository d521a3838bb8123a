"""How the gradients of several ranks become one, and what happens when a rank is lost.

Every rank has the whole network and its share of the images; the gradients are averaged in buckets while the backward
pass is still running. Bit for bit the ranks hold the same weights after every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pretrain.errors import DinobenchError

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


class LostRank(DinobenchError):
    """Another rank died or did not answer in time."""


@contextmanager
def lost_ranks_told(rank: int, world_size: int) -> Iterator[None]:
    """Turn the errors of gloo and NCCL into one that says what happened. They come at once when the other process died,
    after runtime.rank_timeout_seconds when it hangs.

    Raises:
        LostRank: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size == 1 or not _is_of_communication(error):
            raise
        raise LostRank(
            f"rank {rank} of {world_size} lost another rank: it died, or did not answer within "
            "runtime.rank_timeout_seconds. What it said itself is the cause; --resume goes on from the last checkpoint "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    # gloo raises a plain RuntimeError; the last text is all it says when an earlier wait has closed the connection
    signs = ("gloo", "NCCL", "Application timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
