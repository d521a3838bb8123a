"""The machine a training runs on: device, precision, threads, seeds and ranks.

The only file that reads RANK, WORLD_SIZE and LOCAL_RANK (set by torchrun). Without them there is one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import random
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.training.distributed import lost_ranks_told
from pretrain.training.host_memory import keep_freed_memory

T = TypeVar("T")


class RuntimeConfig(BaseModel):
    """What changes speed and comfort, not the science."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "auto"
    """auto = cuda when there is one, else cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """auto = bf16 autocast on a GPU that has it, fp32 elsewhere. fp64 is for tests of exactness."""
    compile: bool = False
    """torch.compile of the transformer blocks."""
    checkpoint_activations: bool = False
    """Keep the input of each of the student's blocks alone and compute its activations again in the backward pass: less
    memory for about a third more work of the student."""
    max_logits_bytes: int | None = Field(default=None, ge=1)
    """Memory of the logits between K prototypes and the rows of a batch: the loss forms them for as many images (or
    masked patches) at a time as fit, one at least. None forms the targets of a batch at once. What couples the rows of
    a batch keeps every logit whatever is set here: target.centring=sinkhorn or softmax_batch (the targets) and
    regularizer.mean_entropy (the student's logits)."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per optimiser step; the science (batch_size) stays."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: gradients travel between ranks in half the bytes, rounded to 8 bits of precision. Nothing on one rank."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: each rank keeps a part of the backbones, for those that do not fit. Experimental. Nothing on one rank."""
    rank_timeout_seconds: float = Field(default=600, gt=0)
    """How long a rank waits for the others before it stops with an error."""
    workers: int = Field(default=4, ge=0)
    """Processes that decode images; data sets held in memory need none."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 leaves torch's choice."""
    log_every: int = Field(default=50, ge=1)
    """Steps between two reads of the metrics: the only moments at which the host waits for the device."""
    max_minutes: float | None = Field(default=None, gt=0)
    """End the training after this time as SIGTERM does: with a checkpoint, to be resumed. Counted from its first step;
    the step in progress is finished, with several ranks the logging interval."""
    stop_on_collapse: bool = False


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The resolved machine: where tensors live and which rank this process is."""

    device: torch.device
    precision: str
    rank: int
    world_size: int

    @classmethod
    def start(cls, config: RuntimeConfig) -> Runtime:
        """Pick device and precision; join the process group when torchrun started us.

        Raises:
            DinobenchError: the device asked for is not there, or another rank does not come.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = _device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
        if config.threads:
            torch.set_num_threads(config.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        elif device.type == "cpu":
            keep_freed_memory()
        if size > 1 and not dist.is_initialized():
            patience = datetime.timedelta(seconds=config.rank_timeout_seconds)
            with lost_ranks_told(rank, size):
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        return cls(device, _precision(config.precision, device), rank, size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the master weights."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def is_main_process() -> bool:
    """Whether this process may print and write (rank 0, or the only one)."""
    return int(os.environ.get("RANK", 0)) == 0


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch, numpy and random. Weights are drawn with rank 0's seed on every rank; see `loop`."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def world_size() -> int:
    """Processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over ranks (the tensor itself when there is one rank)."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The maximum of `tensor` over ranks, element by element (the tensor itself when there is one rank)."""
    if world_size() == 1:
        return tensor
    top = tensor.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return top


def begin_sum(tensor: Tensor) -> Callable[[], Tensor]:
    """Start summing `tensor` over ranks and give the function that waits for the sum.

    Meanwhile every rank may start other collectives, all of them in the same order.
    """
    if world_size() == 1:
        return lambda: tensor
    total = tensor.clone()
    work = dist.all_reduce(total, async_op=True)
    return lambda: _arrived(work, total)


def begin_logsumexp(tensor: Tensor) -> Callable[[], Tensor]:
    """Like `begin_sum` for log sum over ranks of exp(tensor), element by element.

    The ranks' tensors are gathered: a maximum followed by a sum would be two messages, the second after the first.
    """
    if world_size() == 1:
        return lambda: tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    work = dist.all_gather(parts, tensor.contiguous(), async_op=True)
    return lambda: torch.stack(_arrived(work, parts)).logsumexp(0)


def _arrived(work: dist.Work | None, result: T) -> T:
    assert work is not None  # only ranks outside of the group get none
    work.wait()
    return result


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DinobenchError(
            f"runtime.device={name} was asked for, but torch {torch.__version__} sees no CUDA device here: "
            "run `dinobench doctor`, or set runtime.device=cpu"
        )
    try:
        return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    except RuntimeError as error:
        raise DinobenchError(f"runtime.device={name!r} is no device: use auto, cpu, cuda or cuda:N") from error


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
