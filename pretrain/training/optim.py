"""Optimisers, parameter groups and gradient clipping as the official codes use them.

Source: facebookresearch/dino@7c446df `utils.get_params_groups`, `utils.clip_gradients`, `utils.LARS`;
facebookresearch/dinov2@b8931f7 `get_params_groups_with_decay`, `fuse_params_groups` and its training step. They differ:

                      DINO, iBOT                   DINOv2
    learning rate     lr * batch / 256             lr * sqrt(batch / 1024)
    per layer         one rate                     layer_decay^(depth + 1 - layer), patch_embed times patch_embed_lr
    clipping          each tensor by its norm      each sub-module by its norm
    frozen last layer gradients are dropped        rate 0: the moments of AdamW fill up

No decay, in both: biases and one-dimensional tensors (norms, LayerScale).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretrain.errors import UsageError
from pretrain.training.sharding import local_part, norms


class OptimConfig(BaseModel):
    """Optimiser, learning rate and weight decay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    batch_size: int = Field(default=1024, ge=1)
    """Images per optimiser step, summed over ranks and accumulation (DINO: 16 GPUs x 64)."""
    lr: float = Field(default=5e-4, ge=0)
    """Peak learning rate of the reference batch, see `lr_scaling` (DINO section 3.2)."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """`linear`: lr * batch_size / 256 (DINO); `sqrt`: lr * sqrt(batch_size / 1024) (DINOv2)."""
    min_lr: float = Field(default=1e-6, ge=0)
    """End of the cosine; not scaled with the batch."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor layer_decay^(depth + 1 - l) on the rate of layer l of a ViT; l = 0 is the embedding (DINOv2: 0.9)."""
    patch_embed_lr: float = Field(default=1.0, gt=0)
    """Further factor on the rate of the patch embedding (DINOv2: 0.2)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD and LARS."""
    weight_decay: float = Field(default=0.04, ge=0)
    weight_decay_end: float = Field(default=0.4, ge=0)
    clip: float = Field(default=3.0, ge=0)
    """Largest gradient norm of a tensor or sub-module; 0 disables."""
    clip_scope: Literal["tensor", "module"] = "tensor"
    """What `clip` bounds: each parameter tensor (DINO, iBOT), or backbone and each head as a whole (DINOv2)."""
    freeze_last_layer_epochs: int = Field(default=1, ge=0)
    """Epochs during which the prototypes stay as they are."""
    freeze_last_layer_by: Literal["gradient", "rate"] = "gradient"
    """Drop the prototypes' gradients (DINO, iBOT), or set their rate to 0 so that moments build up (DINOv2)."""
    decay_prototype_norms: bool = True
    """The official groups decay `weight_g` (shape [K, 1]) and free prototypes; False exempts them."""

    @property
    def peak_lr(self) -> float:
        if self.lr_scaling == "sqrt":
            return self.lr * math.sqrt(self.batch_size / 1024)
        return self.lr * self.batch_size / 256


def parameter_groups(student: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters that share their multipliers, decayed ones first; frozen parameters are left out.

    Each group holds `params`, `lr_multiplier`, `decay_multiplier` (0 or 1) and `is_last_layer`; the last is true only
    where prototypes are frozen by their rate. Two groups for DINO. Not decayed are biases and one-dimensional tensors:
    so the class and mask tokens, the position embedding and the prototypes are decayed, as in the official codes.

    Raises:
        UsageError: rates per layer for a backbone whose layers are not those of a ViT.
    """
    names = [name for name, _ in student.named_parameters()]
    depth = 1 + max((int(name.split(".")[2]) for name in names if name.startswith("backbone.blocks.")), default=-1)
    if depth == 0 and (config.layer_decay, config.patch_embed_lr) != (1.0, 1.0):
        raise UsageError(
            "optim.layer_decay and optim.patch_embed_lr need a ViT, found a backbone without blocks: set both to 1"
        )
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = config.layer_decay ** (depth + 1 - _layer(name, depth))
        rate *= config.patch_embed_lr if name.startswith("backbone.patch_embed.") else 1.0
        decay = float(_is_decayed(name, parameter, config))
        key = (rate, decay, config.freeze_last_layer_by == "rate" and "last_layer" in name)
        group = dict(zip(("lr_multiplier", "decay_multiplier", "is_last_layer"), key, strict=True))
        groups.setdefault(key, {"params": [], **group})["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: -group["decay_multiplier"])


def create_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser; `set_rates` gives it learning rates and decay before every step."""
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    return LARS(groups, momentum=config.momentum)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, *, freeze_last_layer: bool) -> None:
    """Put the scheduled values of a step into the groups; a frozen last layer stops only where it is frozen by rate."""
    for group in optimizer.param_groups:
        frozen = freeze_last_layer and group["is_last_layer"]
        group["lr"] = 0.0 if frozen else lr * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["decay_multiplier"]


def submodule_parameters(student: nn.Module) -> list[list[nn.Parameter]]:
    """Trained parameters of the backbone, of the head, ...; a token of the student itself counts with the backbone."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.split(".")[0] if "." in name else "backbone", []).append(parameter)
    return list(parts.values())


def clip(parts: list[list[nn.Parameter]], max_norm: float, scope: Literal["tensor", "module"]) -> None:
    """Scale down the gradients of each tensor, or of each part as a whole, to `max_norm`; no host sync, 0 disables."""
    if max_norm == 0:
        return
    if scope == "tensor":
        _clip_each((parameter for part in parts for parameter in part), max_norm)
        return
    for part in parts:
        _clip_together(part, max_norm)


@torch.no_grad()
def _clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each gradient whose own norm exceeds `max_norm` (not the global norm), without a host sync."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    factors = (max_norm / (norms(gradients) + 1e-6)).clamp_(max=1.0)
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], list(factors.unbind()))


@torch.no_grad()
def _clip_together(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale gradients whose norm, taken as one vector, exceeds `max_norm`, without a host sync."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    factor = (max_norm / (norms(gradients).norm() + 1e-6)).clamp_(max=1.0)
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], factor)


def _layer(name: str, depth: int) -> int:
    """0 for the embedding of a ViT and the tokens, l for its l-th block, depth + 1 for the final norm and the heads."""
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    embedding = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")
    in_embedding = name == "mask_token" or name.startswith(tuple(f"backbone.{part}" for part in embedding))
    return 0 if in_embedding else depth + 1


def _is_decayed(name: str, parameter: Tensor, config: OptimConfig) -> bool:
    carries_norm = "last_layer" in name and not name.endswith("weight_v")
    return not (name.endswith(".bias") or parameter.ndim == 1 or (carries_norm and not config.decay_prototype_norms))


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
