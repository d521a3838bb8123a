"""One optimiser step, and the state that a checkpoint must hold to continue it bit by bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from pretrain.data.images import ImageSet
from pretrain.data.loader import Batch
from pretrain.errors import DinobenchError, UsageError
from pretrain.faults import is_out_of_memory
from pretrain.methods.method import Method, load_method
from pretrain.models import checkpoint, checkpoint_file
from pretrain.models.backbones import check_image_sizes
from pretrain.models.recompute import recompute_activations
from pretrain.training import distributed, health, optim, schedules, sharding
from pretrain.training.recipe import Recipe
from pretrain.training.runtime import Runtime, seed_everything


class Trainer:
    """A method, its optimiser and its schedules on one machine. It knows no method by name."""

    def __init__(self, recipe: Recipe, runtime: Runtime, plan: schedules.Plan, *, images: ImageSet | None = None):
        self.recipe, self.runtime, self.plan, self.images = recipe, runtime, plan, images
        seed_everything(recipe.seed)  # the same initial weights on every rank
        self.method = load_method(recipe.method.name, recipe.source)(recipe, plan)
        self.method.to(device=runtime.device, dtype=runtime.dtype)
        check_image_sizes(self.method.backbone(), sorted({view.size for view in recipe.views.views}))
        config = recipe.optim
        warmup = recipe.schedule.warmup_epochs
        self.learning_rates = schedules.cosine(config.peak_lr, config.min_lr, plan.epochs, plan.steps_per_epoch, warmup)
        self.weight_decays = schedules.cosine(
            config.weight_decay, config.weight_decay_end, plan.epochs, plan.steps_per_epoch
        )
        if recipe.runtime.checkpoint_activations:
            recompute_activations(self.method.student.backbone)
        if recipe.runtime.compile:
            _compile_blocks(self.method)
        self.replicated: list[nn.Parameter] = []
        if runtime.world_size > 1:
            self._distribute()
        self.groups = optim.parameter_groups(self.method.student, config)
        self.optimizer = optim.create_optimizer(config, sharding.split_groups(self.groups))
        self.parameters = optim.submodule_parameters(self.method.student)
        # Different randomness (stochastic depth) on every rank from here on.
        seed_everything(recipe.seed + 1, runtime.rank)

    def step(self, batch: Batch, step: int) -> None:
        """One optimiser step on this rank's images. Nothing here waits for the device."""
        config = self.recipe.runtime
        self._set_schedules(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.method.before_step(step)
        if self.runtime.dtype != torch.float32:
            batch = dataclasses.replace(batch, views=[view.to(self.runtime.dtype) for view in batch.views])
        parts = batch.split(config.accumulate)
        total = torch.zeros((), device=self.runtime.device, dtype=self.runtime.dtype)
        for i, part in enumerate(parts):
            with self.method.no_sync() if i < len(parts) - 1 else torch.enable_grad():
                with self.runtime.autocast():
                    loss, metrics = self.method.loss(part, step)
                (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
            self.method.health.observe_metrics(metrics, 1 / len(parts))
        sharding.average_gradients(self.replicated)
        self.method.health.observe_loss(total, step)
        self.method.before_update(step)
        optim.clip(self.parameters, self.recipe.optim.clip, self.recipe.optim.clip_scope)
        self.optimizer.step()
        self.method.after_step(step)

    def values(self, step: int) -> dict[str, float]:
        """Scheduled values of a step, for the log."""
        return {
            "optim/lr": float(self.learning_rates[step]),
            "optim/weight_decay": float(self.weight_decays[step]),
            **self.method.values(step),
        }

    def save(self, path: Path, step: int) -> None:
        """Write the state after `step` completed steps, atomically. With sharding the other ranks call `state`."""
        checkpoint.save(path, self.state(step))

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` completed steps holds: whole tensors, whatever the number of ranks.

        Raises:
            DinobenchError: a weight or a moment is not finite.
        """
        state = sharding.whole(self.method.state_dict())
        rest = {key: value for key, value in state.items() if not key.startswith(("student.", "teacher."))}
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.runtime.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        payload = {
            "format": checkpoint.FORMAT,
            "recipe": self.recipe.model_dump(mode="json"),
            "preset": self.recipe.preset,
            "step": step,
            "images_seen": step * self.recipe.optim.batch_size,
            "epoch": self.plan.epoch(step),
            "seed": self.recipe.seed,
            "teacher_temperature": self.method.teacher_temperature(max(step - 1, 0)),
            "student": _below("student.", state),
            "teacher": _below("teacher.", state),
            "target": rest,
            "optimizer": sharding.optimizer_state(self.optimizer, self.groups),
            "rng": rng,
        }
        if self.images is not None:
            payload["images"] = {"number": len(self.images), "fingerprint": self.images.fingerprint}
        health.refuse_non_finite({name: payload[name] for name in ("student", "teacher", "optimizer")}, step)
        return payload

    def restore(self, path: Path) -> int:
        """Continue from a checkpoint; returns the number of completed steps.

        Order: 1 weights, centre and health sums, 2 optimiser, 3 random state (last, so that nothing draws after it).

        Raises:
            DinobenchError: the checkpoint belongs to another recipe or to other images, or cannot be read.
        """
        payload = checkpoint_file.read_own(path, map_location=self.runtime.device)
        try:
            self._refuse_other(path, payload)
            self._load(payload)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValidationError) as error:
            if is_out_of_memory(error):
                raise
            raise DinobenchError(
                f"{path} does not fit this recipe ({' '.join(str(error).split())[:200]}): it was altered, or written "
                "by another version of dinobench; use that version, or start again with --new"
            ) from error
        return int(payload["step"])

    def _refuse_other(self, path: Path, payload: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe, or one made of other images."""
        found = Recipe.model_validate(payload["recipe"]).identity
        if found != self.recipe.identity:
            raise DinobenchError(
                f"{path} was written by the recipe {found}, this run is {self.recipe.identity}: "
                "give the recipe it was started with, or another --output"
            )
        made_of = payload.get("images")  # files of earlier versions do not say
        if self.images is None or made_of is None or made_of["fingerprint"] == self.images.fingerprint:
            return
        raise DinobenchError(
            f"{self.images.name} {self.images.split} has changed since {path} was written: it had "
            f"{made_of['number']} images (fingerprint {made_of['fingerprint'][:12]}), now {len(self.images)} "
            f"({self.images.fingerprint[:12]}). Put the images back, or start another run with --new"
        )

    def _load(self, payload: dict[str, Any]) -> None:
        """Weights, optimiser and random state, in this order."""
        networks = {f"{net}.{k}": v for net in ("student", "teacher") for k, v in payload[net].items()}
        self.method.load_state_dict(sharding.parts_like({**networks, **payload["target"]}, self.method.state_dict()))
        sharding.load_optimizer(self.optimizer, self.groups, payload["optimizer"])
        step = int(payload["step"])
        if self.runtime.rank == 0:
            torch.set_rng_state(payload["rng"]["cpu"].cpu())
            if self.runtime.device.type == "cuda" and "cuda" in payload["rng"]:
                torch.cuda.set_rng_state(payload["rng"]["cuda"].cpu(), self.runtime.device)
        else:
            seed_everything(self.recipe.seed + 1 + step, self.runtime.rank)

    def _set_schedules(self, step: int) -> None:
        frozen = self.plan.epoch(step) < self.recipe.optim.freeze_last_layer_epochs
        lr, weight_decay = float(self.learning_rates[step]), float(self.weight_decays[step])
        optim.set_rates(self.optimizer, lr, weight_decay, freeze_last_layer=frozen)

    def _distribute(self) -> None:
        student: nn.Module = self.method.student
        if self.runtime.device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            self.method.teacher = nn.SyncBatchNorm.convert_sync_batchnorm(self.method.teacher)
        if self.recipe.runtime.sharding == "fsdp":
            self._shard()
            return
        self.method.distribute(distributed.replicate(student, self.recipe.runtime.gradient_compression))

    def _shard(self) -> None:
        sharding.refuse_unshardable(self.recipe)
        self.replicated = sharding.shard(self.method.student, self.runtime.device)
        if self.method.teacher is not self.method.student:
            sharding.shard(self.method.teacher, self.runtime.device)


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def local_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """Images per rank and step.

    Raises:
        UsageError: the batch cannot be divided evenly.
    """
    if batch_size % (world_size * accumulate):
        raise UsageError(
            f"optim.batch_size={batch_size} cannot be divided over {world_size} ranks x {accumulate} micro-batches: "
            f"use a multiple of {world_size * accumulate}"
        )
    return batch_size // world_size


def _compile_blocks(method: Method) -> None:
    """Compile block by block: one block's compile time instead of a network's, and one graph per crop size."""
    from pretrain.models.drop_path import share_rates  # timm takes seconds to import

    for network in (method.student, method.teacher):
        backbone = network.get_submodule("backbone")
        blocks = list(getattr(backbone, "blocks", [backbone]))
        share_rates(blocks)
        for block in blocks:
            block.compile(dynamic=False)
        if hasattr(backbone, "cls_of"):
            backbone.cls_of = torch.compile(backbone.cls_of, dynamic=False)
