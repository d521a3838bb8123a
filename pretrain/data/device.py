"""The way to the training device: copies that the host does not wait for, and batches made beside the step."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device.

    To a GPU it is copied from pinned memory: of any other, CUDA first makes a pinned copy and may wait for all work of
    the stream before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


class Side(Protocol):
    """Where batches are made beside the steps."""

    def making(self) -> contextlib.AbstractContextManager[object]:
        """What is launched inside is done beside the next step, and after all that was launched before."""
        ...

    def hand_over(self) -> None:
        """What is launched from now on sees what was made."""
        ...


class SideStream:
    """A CUDA stream beside the current one.

    It waits for the current one before each batch, and the current one for it before each step. So what is made is
    never more than one batch ahead; and what the host has given back since then was last used before that wait, so its
    memory may be taken for the next batch at once. `Tensor.record_stream` would hold it until the host asks again: the
    further the host runs ahead, the more batches of memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def hand_over(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def one_ahead(batches: Iterator[T], side: Side) -> Iterator[T]:
    """The same batches, each made when the one before it is handed over: while its step runs on the device."""
    ahead = _make(batches, side)
    while ahead:
        side.hand_over()
        # Nothing here holds the batch during its step, nor while the one after the next is made.
        yield _pop_and_make(ahead, batches, side)


def _make(batches: Iterator[T], side: Side) -> list[T]:
    """The next batch in a list, which is empty where there is none."""
    with side.making():
        return list(itertools.islice(batches, 1))


def _pop_and_make(ahead: list[T], batches: Iterator[T], side: Side) -> T:
    """The batch in the list, in whose place comes the next."""
    batch = ahead.pop()
    ahead += _make(batches, side)
    return batch
