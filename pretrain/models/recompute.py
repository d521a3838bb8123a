"""Activation checkpointing: blocks that keep their input alone and are computed again in the backward pass.

The random state of the forward pass is restored for the second one, so stochastic depth drops the same samples.
"""

from __future__ import annotations

from torch import nn

from pretrain.errors import UsageError


def recompute_activations(backbone: nn.Module) -> None:
    """Keep each block's input alone in training and compute the rest again in the backward pass .

    Raises:
        UsageError: the backbone cannot, or has BatchNorm, whose running statistics would count every batch twice.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise UsageError(
            f"runtime.checkpoint_activations computes activations twice, and {type(backbone).__name__} has BatchNorm, "
            "which counts them: set it to false, or raise runtime.accumulate to save memory"
        )
    try:
        getattr(backbone, "set_grad_checkpointing")(True)  # noqa: B009
    except (AttributeError, AssertionError) as error:
        raise UsageError(
            f"runtime.checkpoint_activations needs blocks that can be computed again, which timm does not offer for "
            f"{type(backbone).__name__}: set it to false, or raise runtime.accumulate to save memory"
        ) from error
