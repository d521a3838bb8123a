"""Several processes of one command, started by torchrun: rank 0 runs the program, the others take part in its passes.

    with led() as leads:
        if leads:
            ...                 # on rank 0; `share` runs a function on all ranks
                                # the other ranks serve `share` inside `led` until rank 0 leaves the block

So what is decided, printed and written is decided, printed and written once, and no rank waits for a decision that
another does not make. Without torchrun, or outside of `led`, a shared function runs here alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.errors import DinobenchError
from pretrain.training.runtime import Runtime, RuntimeConfig

PATIENCE = timedelta(days=30)
"""Ranks wait while rank 0 measures; one that dies takes the others with it through torchrun."""
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Which part of a shared job is meant."""

    rank: int = 0
    size: int = 1
    device: str | None = None
    """Device of a rank that takes part; None on rank 0, which has its own."""

    def rows(self, total: int, block: int) -> range:
        """A run of the numbers below `total`, cut at multiples of `block`, so that the blocks are those of one rank."""
        blocks = -(-total // block)
        first, last = (blocks * rank // self.size * block for rank in (self.rank, self.rank + 1))
        return range(min(first, total), min(last, total))


@dataclass
class _Team:
    group: Any
    size: int


_team: _Team | None = None


@contextmanager
def led(device: str = "auto") -> Iterator[bool]:
    """True on the rank that runs the program, at once; False on the others, when it has ended.

    Args:
        device: as in `pretrain.training.runtime`; with several GPUs each rank takes its own. Looked at only when
            there are ranks.
    """
    global _team
    if not (dist.is_torchelastic_launched() or dist.is_initialized()):
        yield True
        return
    runtime = Runtime.start(RuntimeConfig(device=device))
    if runtime.world_size == 1:
        yield True
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    if runtime.rank != 0:
        _serve(group, Part(runtime.rank, runtime.world_size, str(runtime.device)))
        yield False
        return
    _team = _Team(group, runtime.world_size)
    try:
        yield True
        _send(group, None)
    except Exception:
        _send(group, None)
        raise
    # Not after an interrupt, which may come in the middle of a job: torchrun ends the others.
    finally:
        _team = None


def share(function: Callable[..., T], job: Any, **own: Any) -> list[T]:
    """`function(job, part, **own)` on this rank and `function(job, part)` on all others; the answers by rank.

    Args:
        function: of a module, so that the others find it by name.
        job: can be pickled.
        own: only for this rank.

    Raises:
        DinobenchError: as raised by the function on any rank, when all have ended.
        RuntimeError: another error on another rank.
    """
    if _team is None:
        return [function(job, Part(), **own)]
    _send(_team.group, (function, job))
    mine = _attempt(lambda: function(job, Part(0, _team.size if _team else 1), **own))
    answers: list[Any] = [None] * _team.size
    dist.gather_object(mine, answers, dst=0, group=_team.group)
    for rank, answer in enumerate(answers):
        if isinstance(answer, DinobenchError) or (isinstance(answer, Exception) and rank == 0):
            raise answer
        if isinstance(answer, Exception):
            raise RuntimeError(f"rank {rank}: {answer}") from answer
    return answers


def _serve(group: Any, part: Part) -> None:
    while (message := _receive(group)) is not None:
        function, job = message
        dist.gather_object(_attempt(lambda f=function, j=job: f(j, part)), None, dst=0, group=group)


def _attempt(call: Callable[[], T]) -> T | Exception:
    """What the call gives, or its error: a rank that left would let the others wait."""
    try:
        return call()
    except Exception as error:
        return error


def _send(group: Any, message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    dist.broadcast_object_list([buffer.getvalue()], src=0, group=group)


def _receive(group: Any) -> Any:
    received: list[Any] = [None]
    dist.broadcast_object_list(received, src=0, group=group)
    # From our own rank 0, so nothing in it is foreign; tensors may come from its GPU.
    return torch.load(io.BytesIO(received[0]), map_location="cpu", weights_only=False)
