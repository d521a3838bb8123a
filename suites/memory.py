"""A network applied to a batch that may not fit in memory: in halves of it, until they do."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.errors import DinobenchError
from pretrain.faults import is_out_of_memory

log = logging.getLogger(__name__)


class InHalves:
    """Applies functions to batches; the size at which one went through is kept for the next.

    Every image is treated alone, so the parts of a batch give what the batch gives.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        """Images at once; None as long as every batch went through."""

    def __call__(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """`function` of images [B, ...] -> [B, ...].

        Raises:
            DinobenchError: not even one image fits.
        """
        while True:
            size = min(self.limit or len(batch), len(batch))
            result = _apply(function, batch, size)
            if isinstance(result, Tensor):
                return result
            if size == 1:
                shape = " x ".join(str(side) for side in batch.shape[-2:])
                raise DinobenchError(
                    f"out of memory at one image of {shape} px ({result}): use --device cpu, a device with more "
                    "memory, or a smaller backbone"
                )
            self.limit = (size + 1) // 2
            log.warning("out of memory at %d images at once, going on with %d", size, self.limit)
            # not where the error is caught: until then its traceback holds the tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _apply(function: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor | str:
    """The result, or why the memory did not suffice."""
    try:
        parts = [function(part) for part in batch.split(size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return " ".join(str(error).split())[:200] or type(error).__name__
