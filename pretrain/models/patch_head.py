"""The patch objective of iBOT and DINOv2: its weight, its head and its targets, as switches.

The three heads in the wild:
    shared       patch tokens use MLP and prototypes of the image head (iBOT `shared_head`, DINOv2's default)
    last_layer   the same MLP, prototypes of their own (iBOT's `last_layer2`)
    separate     a head of their own (DINOv2 `separate_head`, the ViT-L and ViT-g configurations)
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pretrain.errors import UsageError
from pretrain.models.heads import HeadConfig
from pretrain.objectives.targets import Centring, TargetConfig


class PatchConfig(BaseModel):
    """The loss on masked patches. None means: as for the image tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=0.0, ge=0)
    """lambda_2 of iBOT; 0 = no patch objective."""
    head: Literal["shared", "last_layer", "separate"] = "shared"
    num_prototypes: int | None = Field(default=None, ge=2)
    """K' of prototypes of their own."""
    bottleneck: int | None = Field(default=None, ge=1)
    """P' of a separate head."""
    centring: Centring | None = None
    temperature: float | None = Field(default=None, gt=0)
    """tau_t of the patches after the warm-up."""
    warmup_temperature: float | None = Field(default=None, gt=0)
    warmup_epochs: int | None = Field(default=None, ge=0)
    center_tokens: Literal["all", "masked"] = "all"
    """Which teacher tokens move the centre: every patch (iBOT) or the masked ones (DINOv2)."""

    def head_config(self, image: HeadConfig) -> HeadConfig:
        """The head of the patch tokens."""
        own = {"num_prototypes": self.num_prototypes, "bottleneck": self.bottleneck}
        changes = {key: value for key, value in own.items() if value is not None}
        refused = set(changes) - {"shared": set(), "last_layer": {"num_prototypes"}, "separate": set(own)}[self.head]
        if refused:
            raise UsageError(
                f"patch.{sorted(refused)[0]} does not go with patch.head={self.head}: leave it out, or set "
                "patch.head=separate"
            )
        return image.model_copy(update=changes)

    def target_config(self, image: TargetConfig) -> TargetConfig:
        """The targets of the patch tokens."""
        names = ("centring", "temperature", "warmup_temperature", "warmup_epochs")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return image.model_copy(update=changes)
