"""Optimisers, parameter groups and gradient clipping as DINO uses them.

Source: facebookresearch/dino@7c446df `utils.get_params_groups`, `utils.clip_gradients`, `utils.LARS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class OptimConfig(BaseModel):
    """Optimiser, learning rate and weight decay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    batch_size: int = Field(default=1024, ge=1)
    """Images per optimiser step, summed over ranks and accumulation (DINO: 16 GPUs x 64)."""
    lr: float = Field(default=5e-4, ge=0)
    """Peak learning rate for 256 images; the used one is lr * batch_size / 256 (DINO section 3.2)."""
    min_lr: float = Field(default=1e-6, ge=0)
    """End of the cosine; not scaled with the batch."""
    weight_decay: float = Field(default=0.04, ge=0)
    weight_decay_end: float = Field(default=0.4, ge=0)
    clip: float = Field(default=3.0, ge=0)
    """Largest gradient norm of each parameter tensor; 0 disables."""
    freeze_last_layer_epochs: int = Field(default=1, ge=0)
    """Epochs during which the prototypes stay as they are."""
    decay_prototype_norms: bool = True
    """The official groups decay `weight_g` (shape [K, 1]) and free prototypes; False exempts them."""

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256


def parameter_groups(module: nn.Module, *, decay_prototypes: bool = True) -> list[dict]:
    """Two groups: decayed, and not decayed (biases and one-dimensional tensors); frozen parameters are left out.

    So the class token, the position embedding and the prototypes are decayed, as in the official code.
    With `decay_prototypes=False` the tensors that carry a prototype norm (`weight_g`, free `weight`) are not.
    """
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        carries_norm = "last_layer" in name and not name.endswith("weight_v")
        exempt = name.endswith(".bias") or parameter.ndim == 1 or (carries_norm and not decay_prototypes)
        (plain if exempt else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def create_optimizer(config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimiser; learning rate and decay are set by the schedules before every step."""
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return LARS(groups)


@torch.no_grad()
def clip_per_tensor(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each gradient whose own norm exceeds `max_norm` (not the global norm), without a host sync."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or max_norm == 0:
        return
    norms = torch._foreach_norm(gradients)
    factors = (max_norm / (torch.stack(norms) + 1e-6)).clamp_(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()))


class LARS(torch.optim.Optimizer):
    """SGD with a trust ratio per tensor; no ratio and no decay for one-dimensional tensors."""

    def __init__(
        self, params: Iterable, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        """One update; `closure` is accepted for the interface and never called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        update = parameter.grad
        assert update is not None
        if parameter.ndim != 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            norm, update_norm = parameter.norm(), update.norm()
            ratio = torch.where((norm > 0) & (update_norm > 0), group["eta"] * norm / update_norm, 1.0)
            update = update * ratio
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["momentum"], alpha=-group["lr"])
