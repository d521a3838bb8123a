"""The projection head of DINO: MLP, L2 normalisation, prototypes (Caron et al. 2021, section 3.1; official DINOHead).

    x [R, D] -> MLP -> z = m / ||m|| [R, P] -> <w_k, z> [R, K]

With `normaliser=vmf` the logits are log-densities of a von Mises-Fisher mixture (DINO-vMF, section 3.1):

    logits = <w_k, z> / tau + log C_p(||w_k|| / tau)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    final_batch_norm: bool = False
    """BatchNorm without scale and shift after the last layer of the MLP (MoCo v3)."""
    activation: Literal["gelu", "relu"] = "gelu"
    num_prototypes: int = Field(default=65536, ge=0)
    """K; 0 for methods without prototypes (BYOL, MoCo v3, SimCLR)."""
    prototypes: PrototypeKind = "weight_norm"
    train_magnitude: bool = False
    """Train the magnitudes of weight_norm prototypes: `norm_last_layer=False` in the official code."""
    normaliser: Literal["none", "vmf", "vmf_leading"] = "none"
    """Put log C_p(kappa) into the logits: `vmf` to full accuracy, `vmf_leading` as approximated in the paper."""
    init: Literal["dino", "xavier"] = "dino"

    @model_validator(mode="after")
    def _consistent(self) -> HeadConfig:
        if self.num_prototypes == 1:
            raise ValueError("num_prototypes=1 leaves nothing to choose: use at least 2, or 0 for no prototypes")
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

    last_layer: Prototypes
    """Absent (None) when `num_prototypes` is 0; methods that use it check that first."""

    def __init__(self, in_dim: int, config: HeadConfig):
        super().__init__()
        self.config = config
        self.mlp = _mlp(in_dim, config)
        self.mlp.apply(initialiser(config))
        self.register_module("last_layer", create_prototypes(config))

    def project(self, x: Tensor) -> Tensor:
        """x [R, D] -> z [R, P] of unit length, float32 also under autocast."""
        return unit_length(self.mlp(x))

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
        return log_normaliser(self.config, vectors, temperature)

    def logits(self, z: Tensor, temperature: float) -> Tensor:
        """z [..., P] -> <w_k, z> / tau (+ log C_p(||w_k|| / tau)) [..., K], the argument of the softmax."""
        vectors = self.last_layer.vectors()
        logits = F.linear(z, vectors) / temperature
        bias = self.log_normaliser(temperature, vectors)
        return logits if bias is None else logits + bias


def create_prototypes(config: HeadConfig) -> Prototypes | None:
    """The last layer, or None for a head without prototypes."""
    if config.num_prototypes == 0:
        return None
    return Prototypes(config.bottleneck, config.num_prototypes, config.prototypes, config.train_magnitude)


def create_predictor(config: HeadConfig) -> nn.Module:
    """The student's predictor (BYOL): P -> hidden -> P, with the head's BatchNorm and activation."""
    predictor = _mlp(config.bottleneck, config.model_copy(update={"layers": 2}))
    return predictor.apply(initialiser(config))


def unit_length(m: Tensor) -> Tensor:
    """m [..., P] / ||m||, float32 also under autocast."""
    return F.normalize(m if m.dtype == torch.float64 else m.float(), dim=-1, eps=1e-12)


def log_normaliser(config: HeadConfig, vectors: Tensor, temperature: float) -> Tensor | None:
    """log C_p(||w_k||/tau) - log C_p(0) [K] of prototypes W [K, P], or None without normaliser."""
    if config.normaliser == "none":
        return None
    return vmf_bias(vectors, temperature, "exact" if config.normaliser == "vmf" else "leading")


@contextmanager
def keep_running_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises by its batch as usual but leaves its running statistics alone."""
    norms = [(m, m.momentum) for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    try:
        for norm, _ in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def _mlp(in_dim: int, config: HeadConfig) -> nn.Module:
    if config.layers == 1:
        return nn.Linear(in_dim, config.bottleneck)  # not in a Sequential: the official key is `mlp.weight`
    layers: list[nn.Module] = []
    for width in [in_dim] + [config.hidden] * (config.layers - 2):
        layers.append(nn.Linear(width, config.hidden))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(config.hidden))
        layers.append(nn.GELU() if config.activation == "gelu" else nn.ReLU())
    layers.append(nn.Linear(config.hidden, config.bottleneck))
    if config.final_batch_norm:
        layers.append(nn.BatchNorm1d(config.bottleneck, affine=False))
    return nn.Sequential(*layers)


def initialiser(config: HeadConfig) -> Callable[[nn.Module], None]:
    """What `head.init` does to each module."""
    return _init_dino if config.init == "dino" else _init_xavier


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
