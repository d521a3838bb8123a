"""SwAV: swapping assignments between views.

Paper: Caron et al., NeurIPS 2020, arXiv 2006.09882
Objective: cross-entropy of the code of one view, found by Sinkhorn-Knopp, and the prediction from every other view

One network; the codes of a global view g balance the prototypes over the batch (and, with a queue, over the rows of
past batches too), and the other views predict them (eq. 2 and appendix on multi-crop):

    L = mean_{g <= G} mean_{v != g}  -p_g . log q_v      q_v = softmax(z_v C^T / tau)
    p_g = rows of the batch in Sinkhorn(rows of g and of g's queue, times C^T / eps)

Each global view is balanced by itself, as in the official code (dino_sk balances both together). The queue holds
bottleneck outputs of past batches of all ranks, newest first, one for each global view, and is read once it is full.
Every rank keeps the whole queue and balances its share of it, so that a checkpoint holds everything.

Shapes: V views (globals first), G = 2 global ones, B images of this rank, L rows of the queue, P bottleneck, K
prototypes C [K, P] of unit length.
The recipe holds eps (target.temperature), tau (objective.student_temperature) and the queue (method.parameters).
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pretrain.errors import UsageError
from pretrain.methods.dino import Dino
from pretrain.methods.siamese import NUM_TEACHER_VIEWS
from pretrain.models.network import Outputs
from pretrain.objectives.ranks import gather_rows, rank
from pretrain.training import runtime
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan


class Parameters(BaseModel):
    """The queue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue_length: int = Field(default=0, ge=0)
    """L, over all ranks: a multiple of the batch size (official for batch 256: 3840); 0 = no queue."""
    queue_start_epoch: int = Field(default=15, ge=0)
    """First epoch whose outputs enter the queue."""


class Swav(Dino):
    """SwAV."""

    Parameters = Parameters
    queue: Tensor

    def __init__(self, recipe: Recipe, plan: Plan):
        config = Parameters(**recipe.method.parameters)
        batch_size = recipe.optim.batch_size
        if config.queue_length % batch_size:
            raise UsageError(
                f"method.parameters.queue_length={config.queue_length} must be a multiple of optim.batch_size="
                f"{batch_size}, for example {(config.queue_length // batch_size + 1) * batch_size}"
            )
        if config.queue_length and recipe.target.centring not in ("sinkhorn", "softmax_batch"):
            raise UsageError(
                f"a queue needs targets that balance rows, found target.centring={recipe.target.centring}: set it to "
                "sinkhorn, or method.parameters.queue_length to 0"
            )
        super().__init__(recipe, plan)
        self.queue_length = config.queue_length
        self._queue_start = config.queue_start_epoch * plan.steps_per_epoch
        self.register_buffer("queue", torch.zeros(NUM_TEACHER_VIEWS, config.queue_length, recipe.head.bottleneck))
        self._new_rows: list[Tensor] = []

    @torch.no_grad()
    def image_targets(self, teacher: Outputs, step: int) -> Tensor:
        """Codes [G, B, K] of the global views."""
        tau = self.teacher_temperature(step)
        assert teacher.vectors is not None
        normaliser = self.teacher.head.log_normaliser(tau, teacher.vectors)
        logits = []
        for z, past in zip(teacher.z, self._past_rows(step), strict=True):
            rows = torch.cat([z, past])
            logits.append(self.target.centred(rows @ teacher.vectors.T, tau, normaliser)[: len(z)])
        if self.queue_length and step >= self._queue_start:
            self._new_rows.append(teacher.z)
        stacked = torch.stack(logits)
        target = stacked.softmax(-1)
        self.health.observe(target.flatten(0, 1), stacked.flatten(0, 1), teacher.features.flatten(0, 1))
        return target

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self._new_rows:
            self._push(torch.cat(self._new_rows, dim=1))
            self._new_rows = []

    @torch.no_grad()
    def _push(self, z: Tensor) -> None:
        """Put this rank's [G, B, P] of a whole step, and the other ranks', in front of the queue."""
        rows = gather_rows(z.transpose(0, 1).flatten(1))  # an image's views side by side: [W B, G P]
        new = rows.unflatten(1, (len(z), -1)).transpose(0, 1)
        self.queue.copy_(torch.cat([new, self.queue], dim=1)[:, : self.queue_length])

    def _past_rows(self, step: int) -> Tensor:
        """This rank's share of the queue [G, L / W, P]; no rows before it is full."""
        # Counted from the step: asking the device whether the last row is filled would wait for it.
        seen = (step - self._queue_start) * self.recipe.optim.batch_size
        if not self.queue_length or seen < self.queue_length:
            return self.queue[:, :0]
        return self.queue.chunk(runtime.world_size(), dim=1)[rank()]


METHOD = Swav
