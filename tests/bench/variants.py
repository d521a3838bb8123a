"""Our training step as it is, compiled, and with one thing each done in the plain way: what every part is worth.

A variant is the recipe with other switches, or the same method with one of its functions replaced by the plain form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn

from pretrain.methods.dino import Dino
from pretrain.models.network import Outputs
from pretrain.models.positions import PositionalViT
from pretrain.objectives.losses import LIVE_LOGITS
from pretrain.training.optim import OptimConfig
from pretrain.training.trainer import Trainer
from sizes import Size
from step import OurStep

Change = Callable[[Trainer], None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing done another way."""

    overrides: tuple[str, ...] = ()
    """Of the recipe."""
    change: Change = lambda trainer: None
    """Of the trainer, once it is built."""

    def build(self, size: Size, batch: int, device: str, precision: str, *, drop_path: float, compile: bool) -> OurStep:
        """Its step at this size."""
        switches = (f"model.drop_path={drop_path}", f"runtime.compile={str(compile).lower()}")
        ours = OurStep(size.recipe(batch, device, precision, [*switches, *self.overrides]))
        self.change(ours.trainer)
        return ours


def adamw_tensor_by_tensor(trainer: Trainer) -> None:
    """AdamW with a loop over tensors in place of the fused kernel."""
    trainer.optimizer = torch.optim.AdamW(
        trainer.optimizer.param_groups, betas=trainer.recipe.optim.betas, foreach=False, fused=False
    )
    for group in trainer.optimizer.param_groups:
        group["fused"] = group["foreach"] = False


def clip_tensor_by_tensor(trainer: Trainer) -> None:
    """Clipping that reads every norm on the host, as the official code does; the recipe's own is switched off."""
    method, parameters = _dino(trainer), [p for part in trainer.parameters for p in part]
    limit = OptimConfig().clip

    def before_update(self: Dino, step: int) -> None:
        Dino.before_update(self, step)
        for parameter in parameters:
            if parameter.grad is not None:
                factor = limit / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)

    _replace(method, before_update)


def teacher_tensor_by_tensor(trainer: Trainer) -> None:
    """The teacher follows with a loop over tensors."""
    method, momentum = _dino(trainer), trainer.recipe.teacher.momentum
    student = dict(method.student.named_parameters())
    pairs = [(parameter, student[name]) for name, parameter in method.teacher.named_parameters()]

    @torch.no_grad()
    def after_step(self: Dino, step: int) -> None:
        for theirs, ours in pairs:
            theirs.mul_(momentum).add_((1 - momentum) * ours)
        self.target.update()

    _replace(method, after_step)


def loss_pair_by_pair(trainer: Trainer) -> None:
    """The loss as it is written down: a softmax of K prototypes for each of the pairs of views."""

    def image_loss(self: Dino, student: Outputs, target: Tensor) -> Tensor:
        logits = self.student_logits(student)
        pairs = [(g, v) for g in range(len(target)) for v in range(len(logits)) if g != v]
        terms = [-(target[g] * logits[v].float().log_softmax(-1)).sum(-1).mean() for g, v in pairs]
        return torch.stack(terms).mean()

    _replace(_dino(trainer), image_loss)


def logits_in_chunks(trainer: Trainer) -> None:
    """The logits of an eighth of the images at a time: what bounding the memory costs."""
    method, recipe = _dino(trainer), trainer.recipe
    rows = (len(recipe.views.views) + 2) * recipe.optim.batch_size
    limit = max(LIVE_LOGITS["cross_entropy"] * rows * recipe.head.num_prototypes * 4 // 8, 1)
    runtime = recipe.runtime.model_copy(update={"max_logits_bytes": limit})
    method.recipe = recipe.model_copy(update={"runtime": runtime})


def whole_last_block(trainer: Trainer) -> None:
    """The last block for every token, though only its CLS token is read."""
    for network in (_dino(trainer).student, _dino(trainer).teacher):
        vit = network.backbone
        assert isinstance(vit, PositionalViT)

        def _pooled(self: PositionalViT, tokens: Tensor) -> Tensor:
            return self.forward_head(self.norm(self._through(self.blocks, tokens)))

        _replace(vit, _pooled)


def loss_read_every_step(trainer: Trainer) -> None:
    """The host waits for the loss before the backward pass, as the official code does."""

    def before_update(self: Dino, step: int) -> None:
        self.health.sum_loss.item()
        Dino.before_update(self, step)

    _replace(_dino(trainer), before_update)


ABLATIONS = {
    "ours": Variant(),
    "attention written out": Variant(("model.attention=math",)),
    "last block whole": Variant(change=whole_last_block),
    "loss pair by pair": Variant(change=loss_pair_by_pair),
    "logits in eight chunks": Variant(change=logits_in_chunks),
    "activations recomputed": Variant(("runtime.checkpoint_activations=true",)),
    "clipping tensor by tensor": Variant(("optim.clip=0",), clip_tensor_by_tensor),
    "AdamW tensor by tensor": Variant(change=adamw_tensor_by_tensor),
    "teacher tensor by tensor": Variant(change=teacher_tensor_by_tensor),
    "loss read every step": Variant(change=loss_read_every_step),
}
"""One change each, after the step as it is."""


def _dino(trainer: Trainer) -> Dino:
    assert isinstance(trainer.method, Dino)
    return trainer.method


def _replace(owner: nn.Module, function: Callable) -> None:
    """Give one object another method of this name, which must be there already."""
    assert hasattr(owner, function.__name__), function.__name__
    owner.__dict__[function.__name__] = MethodType(function, owner)
