"""Projection heads and prototypes of other projects, in the form of `ProjectionHead`.

mlp.*, layers.*                  Linear [BatchNorm] activation ... Linear, counted as in an nn.Sequential
fc1, bn1, fc2, bn2, fc3          the same in MSN
last_layer.*, prototypes.*       prototypes: weight_g and weight_v, parametrizations.weight.original0 and 1, weight
last_layer2.*                    prototypes of the patches (iBOT), see patch_prototypes
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pretrain.models.heads import HeadConfig
from pretrain.models.prototypes import PrototypeKind, Prototypes
from pretrain.models.timm_names import State

_MSN = {"fc1": 0, "bn1": 1, "fc2": 3, "bn2": 4, "fc3": 6}
_MSN_WITHOUT_NORM = {"fc1": 0, "fc2": 2, "fc3": 4}
_LAYOUTS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight",),
)


@dataclass(frozen=True)
class ForeignPrototypes:
    """Prototypes [K, P] as they are stored, under the names of `Prototypes`."""

    kind: PrototypeKind
    state: State

    @property
    def shape(self) -> tuple[int, int]:
        """K and P."""
        num, dim = self.state["weight_v" if self.kind == "weight_norm" else "weight"].shape
        return num, dim

    def build(self) -> Prototypes:
        """The prototypes alone, without the MLP before them."""
        num, dim = self.shape
        prototypes = Prototypes(dim, num, self.kind)
        prototypes.load_state_dict(self.state)
        return prototypes


def read_prototypes(state: State, prefix: str, *, cosine: bool = False) -> ForeignPrototypes | None:
    """The prototypes below `prefix` in any of the three layouts; None where there are none.

    Args:
        state: parameters of a head.
        prefix: `last_layer.` or `prototypes.`.
        cosine: the project normalises plain weights before it uses them.
    """
    for names in _LAYOUTS:
        values = [state.get(prefix + name) for name in names]
        if any(value is None or value.ndim != 2 or not value.shape[1] for value in values):
            continue
        if len({len(value) for value in values if value is not None}) > 1:
            continue
        if len(values) == 2:
            return ForeignPrototypes("weight_norm", dict(zip(_LAYOUTS[0], values, strict=True)))  # type: ignore[arg-type]
        return ForeignPrototypes("cosine" if cosine else "free", {"weight": values[0]})  # type: ignore[dict-item]
    return None


def read_mlp(
    state: State, prototypes: ForeignPrototypes, activation: Literal["gelu", "relu"]
) -> tuple[HeadConfig, State] | None:
    """The head of an MLP and its prototypes, with its parameters `mlp.*` and `last_layer.*`.

    None where there is no MLP, or none that ends in the prototypes' P dimensions.

    Args:
        state: parameters of the head.
        prototypes: those it ends in.
        activation: between its layers; it leaves no trace in the weights.
    """
    mlp = _numbered(state)
    if "mlp.weight" in mlp:
        linear = {0: mlp["mlp.weight"]}
    else:
        linear = {int(number): mlp[f"mlp.{number}.weight"] for number in _numbers(mlp, 2)}
    num, bottleneck = prototypes.shape
    order = sorted(linear)
    if not order or num < 2 or any(not all(weight.shape) for weight in linear.values()):
        return None
    if linear[order[-1]].shape[0] != bottleneck:
        return None
    statistics = sorted(int(name.split(".")[1]) for name in mlp if name.endswith("running_mean"))
    config = HeadConfig(
        layers=len(order),
        hidden=linear[order[0]].shape[0],
        bottleneck=bottleneck,
        batch_norm=bool(statistics) and statistics[0] < order[-1],
        final_batch_norm=bool(statistics) and statistics[-1] > order[-1],
        activation=activation,
        num_prototypes=num,
        prototypes=prototypes.kind,
    )
    return config, {**mlp, **{f"last_layer.{name}": value for name, value in prototypes.state.items()}}


def _numbered(state: State) -> State:
    """The MLP under `mlp.<place>.*`."""
    msn = _MSN if "bn1.weight" in state else _MSN_WITHOUT_NORM
    found = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if first in ("mlp", "layers"):
            found[f"mlp.{rest}"] = value
        elif first in msn:
            found[f"mlp.{msn[first]}.{rest}"] = value
    return found


def _numbers(mlp: dict[str, Tensor], ndim: int) -> list[str]:
    matches = (re.fullmatch(r"mlp\.(\d+)\.weight", name) for name, value in mlp.items() if value.ndim == ndim)
    return [match[1] for match in matches if match]
