"""Prototypes: the K vectors of the last layer of a DINO head, one per cluster (DINO section 3.1; DINO-vMF section 3).

One switch says what a row of the effective matrix W [K, P] is:

    cosine       w_k = v_k / ||v_k||           one precision for all, no magnitude stored
    weight_norm  w_k = g_k v_k / ||v_k||       DINO's own layer: g = 1 fixed, or trained (`norm_last_layer`)
    free         w_k = v_k                     magnitudes are part of the vectors; DINO-vMF reads them as precision

weight_norm uses the parameter names of the official checkpoints (`weight_g`, `weight_v`), the others `weight`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import unknown_name

PrototypeKind = Literal["cosine", "weight_norm", "free"]
KINDS: tuple[PrototypeKind, ...] = ("cosine", "weight_norm", "free")


class Prototypes(nn.Module):
    """K prototypes of P dimensions.

    Args:
        dim: P, size of the bottleneck.
        num: K, number of prototypes.
        kind: what the effective vectors are, see above.
        train_magnitude: train the magnitudes g of `weight_norm` (DINO's `norm_last_layer=False`).
    """

    kind: PrototypeKind

    def __init__(self, dim: int, num: int, kind: PrototypeKind = "weight_norm", train_magnitude: bool = False):
        super().__init__()
        if kind not in KINDS:
            raise unknown_name("kind of prototypes", kind, KINDS)
        self.dim, self.num, self.kind = dim, num, kind
        # nn.Linear's default: the official head draws its last layer after the trunc-normal init, so it keeps this one.
        directions = nn.init.kaiming_uniform_(torch.empty(num, dim), a=math.sqrt(5))
        if kind == "weight_norm":
            self.weight_g = nn.Parameter(torch.ones(num, 1), requires_grad=train_magnitude)
            self.weight_v = nn.Parameter(directions)
        else:
            # Unit length, so that all kinds start from the same function.
            self.weight = nn.Parameter(F.normalize(directions, dim=1))
        self.register_load_state_dict_pre_hook(_accept_layouts)

    def vectors(self) -> Tensor:
        """The effective matrix W [K, P]. Form it once per step and share it between the crops."""
        if self.kind == "free":
            return self.weight
        if self.kind == "cosine":
            return F.normalize(self.weight, dim=1)
        return torch._weight_norm(self.weight_v, self.weight_g, 0)  # one pass each way: 3x faster than written out

    def norms(self) -> Tensor:
        """||w_k|| of the effective vectors, [K]."""
        return torch.linalg.vector_norm(self.vectors(), dim=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [..., P] -> <w_k, z> [..., K]: cosines when z and the prototypes have length one."""
        return F.linear(z, self.vectors())

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num={self.num}, kind={self.kind}"


def kappa(prototypes: Prototypes, temperature: float) -> Tensor:
    """Precision of each prototype, kappa_k = ||w_k|| / tau, [K] in float32 or float64 (DINO-vMF section 3.1)."""
    with torch.no_grad():
        norms = prototypes.norms()
    return (norms if norms.dtype == torch.float64 else norms.float()) / temperature


def _accept_layouts(module: Prototypes, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn prototypes in any of the three layouts in the wild into those of `module`, before they are loaded.

    The effective vectors stay the same; `cosine` keeps their directions only.
    """
    layouts = (
        ("weight_g", "weight_v"),  # torch.nn.utils.weight_norm: DINO, iBOT, DINOv2
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),  # its successor
        ("weight",),  # nn.Linear: DINOv3, and the kinds cosine and free here
    )
    found = next((names for names in layouts if all(prefix + name in state for name in names)), None)
    own = layouts[0] if module.kind == "weight_norm" else layouts[2]
    if found is None or found == own:
        return
    values = [state.pop(prefix + name) for name in found]
    magnitude, direction = values if len(values) == 2 else (values[0].norm(dim=1, keepdim=True), values[0])
    if module.kind == "weight_norm":
        state[prefix + "weight_g"], state[prefix + "weight_v"] = magnitude, direction
    else:
        directions = F.normalize(direction, dim=1)
        state[prefix + "weight"] = directions if module.kind == "cosine" else magnitude * directions
