"""What the machine does to a process, told apart by what torch raises for it: no memory left, a worker killed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.errors import DinobenchError

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""torch has a class of its own for a GPU's memory only."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a GPU."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY)


@contextmanager
def out_of_memory_told(what: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to do.

    Raises:
        DinobenchError: in place of it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DinobenchError(f"out of memory {what} ({reason}): {advice}") from error


@contextmanager
def workers_told(advice: str) -> Iterator[None]:
    """Turn the errors of the processes that decode images into what they mean. torch raises the one about a killed
    worker from a signal handler, so anywhere in the block.

    Raises:
        DinobenchError: a worker was killed, or it raised one itself.
    """
    try:
        yield
    except DinobenchError as error:
        # as torch passes it on, with the worker's traceback before it
        _, passed_on, text = str(error).rpartition(f"{__name__.rpartition('.')[0]}.errors.{type(error).__name__}: ")
        if not passed_on:
            raise
        raise type(error)(text.strip()) from error
    except RuntimeError as error:
        found = re.search(r"DataLoader worker.*?(is killed by signal: [^.]*|exited unexpectedly)", str(error), re.S)
        if found is None:
            raise
        raise DinobenchError(
            f"a process that decodes images {found[1].strip()}. Mostly it was the system, which had no memory left: "
            f"{advice}"
        ) from error
