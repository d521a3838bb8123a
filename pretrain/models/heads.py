"""The projection head of DINO: MLP, L2 normalisation, prototypes (Caron et al. 2021, section 3.1; official DINOHead).

    x [R, D] -> MLP -> z = m / ||m|| [R, P] -> <w_k, z> [R, K]

With `normaliser=vmf` the logits are log-densities of a von Mises-Fisher mixture (DINO-vMF, section 3.1):

    logits = <w_k, z> / tau + log C_p(||w_k|| / tau)
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.prototypes import PrototypeKind, Prototypes
from pretrain.models.vmf import check_dim, vmf_bias


class HeadConfig(BaseModel):
    """Size of the head and the kind of its prototypes; defaults of the official main_dino.py."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(default=3, ge=1)
    hidden: int = Field(default=2048, ge=1)
    bottleneck: int = Field(default=256, ge=1)
    """P, the dimension in which the prototypes live."""
    batch_norm: bool = False
    num_prototypes: int = Field(default=65536, ge=2)
    """K."""
    prototypes: PrototypeKind = "weight_norm"
    train_magnitude: bool = False
    """Train the magnitudes of weight_norm prototypes: `norm_last_layer=False` in the official code."""
    normaliser: Literal["none", "vmf", "vmf_leading"] = "none"
    """Put log C_p(kappa) into the logits: `vmf` to full accuracy, `vmf_leading` as approximated in the paper."""
    init: Literal["dino", "xavier"] = "dino"

    @model_validator(mode="after")
    def _consistent(self) -> HeadConfig:
        if self.train_magnitude and self.prototypes != "weight_norm":
            raise ValueError(
                f"train_magnitude belongs to prototypes=weight_norm, found prototypes={self.prototypes}: "
                "free prototypes always train their magnitude, cosine ones have none"
            )
        if self.normaliser != "none":
            check_dim(self.bottleneck)
        return self


class ProjectionHead(nn.Module):
    """`mlp` and `last_layer`, with the parameter names of the official head.

    Args:
        in_dim: D, size of the backbone's features.
        config: sizes and switches.
    """

    def __init__(self, in_dim: int, config: HeadConfig):
        super().__init__()
        self.config = config
        self.mlp = _mlp(in_dim, config)
        self.mlp.apply(_init_dino if config.init == "dino" else _init_xavier)
        self.last_layer = Prototypes(
            config.bottleneck, config.num_prototypes, config.prototypes, config.train_magnitude
        )

    def project(self, x: Tensor) -> Tensor:
        """x [R, D] -> z [R, P] of unit length, float32 also under autocast."""
        m = self.mlp(x)
        return F.normalize(m if m.dtype == torch.float64 else m.float(), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """x [R, D] -> <w_k, z> [R, K]: no temperature, no normaliser."""
        return self.last_layer(self.project(x))

    def log_normaliser(self, temperature: float, vectors: Tensor | None = None) -> Tensor | None:
        """log C_p(||w_k||/tau) - log C_p(0) [K], or None for a head without normaliser.

        Args:
            temperature: tau of the network that uses the logits; student and teacher have their own.
            vectors: W [K, P] where `last_layer.vectors()` was formed already.
        """
        if self.config.normaliser == "none":
            return None
        vectors = self.last_layer.vectors() if vectors is None else vectors
        return vmf_bias(vectors, temperature, "exact" if self.config.normaliser == "vmf" else "leading")

    def logits(self, z: Tensor, temperature: float) -> Tensor:
        """z [..., P] -> <w_k, z> / tau (+ log C_p(||w_k|| / tau)) [..., K], the argument of the softmax."""
        vectors = self.last_layer.vectors()
        logits = F.linear(z, vectors) / temperature
        bias = self.log_normaliser(temperature, vectors)
        return logits if bias is None else logits + bias


def _mlp(in_dim: int, config: HeadConfig) -> nn.Module:
    if config.layers == 1:
        return nn.Linear(in_dim, config.bottleneck)  # not in a Sequential: the official key is `mlp.weight`
    layers: list[nn.Module] = []
    for width in [in_dim] + [config.hidden] * (config.layers - 2):
        layers.append(nn.Linear(width, config.hidden))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(config.hidden))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(config.hidden, config.bottleneck))


def _init_dino(module: nn.Module) -> None:
    """Truncated normal of std .02, biases 0, as in the official head."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _init_xavier(module: nn.Module) -> None:
    """Xavier uniform, biases 0: a larger start than `dino`, which keeps small heads from collapsing to uniform."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
